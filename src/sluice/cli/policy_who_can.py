"""``sluice policy who-can``: every source that can reach a service of a domain."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from sluice.cli.policy_common import Place, check_domain, place_options, say, tell_policy_errors
from sluice.policy.classes import UNKNOWN, World
from sluice.policy.reach import Reach, who_can


@click.command(short_help="List who can reach a service of a domain.")
@click.argument("service", metavar="SERVICE[+ARG]")
@click.argument("domain")
@click.option("--all", "show_all", is_flag=True, help="Name every target that can be asked for.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@place_options
@tell_policy_errors
def command(service: str, domain: str, show_all: bool, as_json: bool, place: Place) -> None:
    """List every source that can call SERVICE of DOMAIN, however it names it.

    Without +ARG: with any argument. By name, redirect, default, relay, or as the choice in a
    question. DOMAIN may be @dispvm:NAME. New disposables count as sources, and so does what is
    not in the registry. Exit status 0 if anybody can, 1 if nobody.
    """
    info = place.info()
    check_domain(info, domain)
    policy = place.load()
    world = World(info, [policy])
    name, plus, argument = service.partition("+")
    target = "dom0" if domain == "@adminvm" else domain
    found = who_can(world, policy, name, plus + argument if plus else None, target)
    if as_json:
        click.echo(json.dumps([_to_json(world, way) for way in found], indent=2))
    else:
        _print(world, found, None if show_all else 6)
    sys.exit(0 if found else 1)


def _print(world: World, found: list[Reach], most: int | None) -> None:
    by_source: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for way in found:
        how = (way.verb, str(way.call), way.rule.place, _extra(way))
        by_source.setdefault(way.source, {}).setdefault(how, []).extend(_asked(way))
    # Sources that can do the same are shown together.
    alike: dict[tuple[str, ...], list[str]] = {}
    for source in sorted(by_source, key=lambda name: (name == UNKNOWN, name)):
        lines = tuple(
            f"  {verb:5} {call}  asking for {_some(asked, most)}{extra}  ({place})"
            for (verb, call, place, extra), asked in by_source[source].items()
        )
        alike.setdefault(lines, []).append(world.label(source))
    for lines, sources in alike.items():
        say("\n".join([", ".join(sources), *lines]))
    if not by_source:
        say("nobody")


def _some(asked: list[str], most: int | None) -> str:
    names = list(dict.fromkeys(asked))
    if most is None or len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def _asked(way: Reach) -> list[str]:
    # Whoever can name a target by UUID can name it by name, but for a domain its own.
    named = [name for name in way.asked if "uuid:" not in name] or list(way.asked)
    return ["(no target)" if name == "@default" else name for name in named]


def _extra(way: Reach) -> str:
    parts = []
    if way.rule.action.via:
        parts.append(" through " + ", ".join(map(str, way.rule.action.via)))
    if way.user:
        parts.append(f" as {way.user}")
    if way.relay:
        parts.append(f" carried by {way.relay}")
    return "".join(parts)


def _to_json(world: World, way: Reach) -> dict[str, Any]:
    return {
        "source": way.source,
        "known": way.source not in world.unknown,
        "call": str(way.call),
        "asked": list(way.asked),
        "decision": way.verb,
        "target": way.target,
        "relay": way.relay,
        "relay_service": way.service,
        "user": way.user,
        "via": [str(hop) for hop in way.rule.action.via],
        "rule": {"file": way.rule.file, "line": way.rule.line},
    }
