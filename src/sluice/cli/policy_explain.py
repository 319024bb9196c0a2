"""``sluice policy explain``: the decision on one call, the rule that made it, and why no other."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from sluice.cli.policy_common import Place, place_options, say, tell_policy_errors
from sluice.policy.confirmation import guivm_for
from sluice.policy.decisions import settle
from sluice.policy.explain import Explanation, explain
from sluice.policy.resolution import Allow, Ask, Deny
from sluice.policy.rules import Request, Rule
from sluice.policy.system_info import SystemInfo
from sluice.wire.names import escape

_VERBS = {Allow: "allow", Ask: "ask", Deny: "deny"}


@click.command(short_help="Say how a call is decided, and why.")
@click.argument("source")
@click.argument("target")
@click.argument("service", metavar="SERVICE[+ARG]")
@click.option("--from", "requested_source", metavar="REMOTE", help="The call is made for REMOTE.")
@click.option("--all", "show_all", is_flag=True, help="Show every rule that came near.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@place_options
@tell_policy_errors
def command(
    source: str,
    target: str,
    service: str,
    requested_source: str | None,
    show_all: bool,
    as_json: bool,
    place: Place,
) -> None:
    """Say how a call is decided, and why.

    TARGET may be a name, uuid:UUID, @dispvm, @dispvm:NAME, @adminvm, or @default (also "") for
    a call that names none. Exit status 0 for allow, 1 for deny, 3 for ask.
    """
    info = place.info()
    request = Request.of(service, source, target, requested_source)
    found = explain(place.load(), request, info)
    if as_json:
        click.echo(json.dumps(_to_json(found, info), indent=2))
    else:
        _print(found, info, None if show_all else 10)
    sys.exit({"allow": 0, "ask": 3, "deny": 1}[_VERBS[type(found.resolution)]])


def _print(found: Explanation, info: SystemInfo, most: int | None) -> None:
    resolution = found.resolution
    request = found.request
    asked = escape(request.target) or "(no target)"
    say(f"{escape(request.source)} -> {asked}: {escape(request.call)}")
    if resolution.requested_target not in (request.target, ""):
        say(f"  taken as a call of {escape(resolution.requested_target)}")
    say(f"  {settle(resolution, info)[0]}")
    if isinstance(resolution, Deny):
        say(f"  {resolution.cause}: {resolution.message}")
        told = resolution.notify and guivm_for(resolution, info) is not None
        say(f"  the user is {'told' if told else 'not told'}")
    if found.direction is not None and found.direction.service is not None:
        direction = found.direction
        say(f"  carried by {direction.target} as {escape(direction.service or '')}")
    if resolution.rule is not None:
        say(f"  decided by {resolution.rule.place}")
        say(f"    {_text(resolution.rule)}")
    if resolution.reason is not None:
        say(f"  reason: {escape(resolution.reason)}")
    for note in found.notes:
        say(f"  note: {note}")
    if found.near:
        say("\nCame near:")
        for near in found.near[:most]:
            say(f"  {near.rule.place}\n    {_text(near.rule)}")
            for reason in near.reasons:
                say(f"    but {reason}")
        if most is not None and len(found.near) > most:
            say(f"  ... and {len(found.near) - most} more (--all)")
    if found.overruled:
        say("\nWould match as well, but come later:")
        for rule in found.overruled[:most]:
            say(f"  {rule.place}\n    {_text(rule)}")
        if most is not None and len(found.overruled) > most:
            say(f"  ... and {len(found.overruled) - most} more (--all)")


def _text(rule: Rule) -> str:
    return escape(str(rule).replace("\t", "  "))


def _rule(rule: Rule | None) -> dict[str, Any] | None:
    if rule is None:
        return None
    return {"file": rule.file, "line": rule.line, "text": str(rule)}


def _to_json(found: Explanation, info: SystemInfo) -> dict[str, Any]:
    resolution = found.resolution
    decision, direction = settle(resolution, info)
    return {
        "decision": decision.verb,
        "cause": str(resolution.cause),
        "message": resolution.message if isinstance(resolution, Deny) else None,
        "notify": decision.notify,
        "requested_target": resolution.requested_target,
        "target": decision.target,
        "targets": list(decision.candidates) if decision.verb == "ask" else None,
        "default_target": decision.default_target,
        "user": decision.user,
        "autostart": decision.autostart,
        "service": direction.service if direction else None,
        "via": [str(hop) for hop in resolution.via],
        "limit": str(resolution.limit) if resolution.limit else None,
        "reason": resolution.reason,
        "rule": _rule(resolution.rule),
        "near": [{"rule": _rule(near.rule), "reasons": list(near.reasons)} for near in found.near],
        "overruled": [_rule(rule) for rule in found.overruled],
        "notes": list(found.notes),
    }
