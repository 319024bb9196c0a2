"""``sluice policy what-can``: everything that a domain can reach, directly and through others."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from sluice.cli.policy_common import Place, check_domain, place_options, say, tell_policy_errors
from sluice.errors import LocalError
from sluice.policy.classes import World
from sluice.policy.reach import Reach, Step, what_can
from sluice.policy.system_info import is_dom0


@click.command(short_help="List what a domain can reach.")
@click.argument("source")
@click.option("--direct", is_flag=True, help="Only what it reaches itself.")
@click.option("--no-ask", is_flag=True, help="Leave out what a person would have to allow.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@place_options
@tell_policy_errors
def command(source: str, direct: bool, no_ask: bool, as_json: bool, place: Place) -> None:
    """List everything that SOURCE, a name or @dispvm:NAME, can reach.

    "Through" supposes the worst: that each domain which it reaches does its will. Exit status 0
    if there is anything, 1 if nothing.
    """
    info = place.info()
    check_domain(info, source)
    if is_dom0(source):
        raise LocalError("calls made by dom0 are not subject to policy: it reaches everything")
    policy = place.load()
    world = World(info, [policy])
    steps = what_can(world, policy, source, through=not direct, ask=not no_ask)
    if as_json:
        click.echo(json.dumps([_to_json(step) for step in steps], indent=2))
    else:
        _print(steps)
    sys.exit(0 if steps else 1)


def _print(steps: list[Step]) -> None:
    # Domains that are reached in the same way are shown together.
    alike: dict[tuple[int, str, tuple[str, ...]], list[str]] = {}
    for step in steps:
        path = " -> ".join(way.source for way in step.path)
        alike.setdefault((step.depth, path, tuple(_services(step.ways))), []).append(step.domain)
    depth = 0
    for (number, path, lines), domains in alike.items():
        if number != depth:
            depth = number
            say("directly:" if depth == 1 else f"through {depth - 1} other(s):")
        say(f"  {', '.join(domains)}" + (f"  (from {path})" if depth > 1 else ""))
        say("\n".join(f"      {line}" for line in lines))
    if not steps:
        say("nothing")


def _services(ways: tuple[Reach, ...]) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for way in ways:
        groups.setdefault((way.verb, way.rule.place), []).append(str(way.call))
    return [
        f"{verb:5} {', '.join(dict.fromkeys(calls))}  ({place})"
        for (verb, place), calls in groups.items()
    ]


def _to_json(step: Step) -> dict[str, Any]:
    return {
        "domain": step.domain,
        "depth": step.depth,
        "path": [
            {
                "source": way.source,
                "call": str(way.call),
                "asked": list(way.asked),
                "target": way.target,
            }
            for way in step.path
        ],
        "calls": [
            {
                "call": str(way.call),
                "asked": list(way.asked),
                "decision": way.verb,
                "rule": {"file": way.rule.file, "line": way.rule.line},
            }
            for way in step.ways
        ],
    }
