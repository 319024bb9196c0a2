"""``sluice policy diff``: exactly which calls two policies decide differently."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from sluice.cli.policy_common import Place, place_options, say, tell_policy_errors
from sluice.policy.classes import World
from sluice.policy.difference import Change, Group, changes_in, group
from sluice.policy.evaluation import Policy
from sluice.policy.rules import Rule


@click.command(short_help="Show which calls two policies decide differently.")
@click.argument("old", type=click.Path(exists=True))
@click.argument("new", type=click.Path(exists=True))
@click.option("--all", "show_all", is_flag=True, help="Show every pair of a group.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@place_options
@tell_policy_errors
def command(old: str, new: str, show_all: bool, as_json: bool, place: Place) -> None:
    """Show which calls change their decision between OLD and NEW (directories or files).

    Nothing is left out: requests that no rule can tell apart are one class, and every class is
    compared, with the domains of this system. Exit status 0 if nothing changes, 1 otherwise.
    """
    world = World(place.info(), [_load(old, place), _load(new, place)])
    found = list(changes_in(world))
    groups = group(found, world)
    if as_json:
        click.echo(json.dumps([_to_json(g) for g in groups], indent=2))
    else:
        for one in groups:
            _print(one, None if show_all else 8)
        count = sum(len(change.targets) for change in found)
        noun = "class" if count == 1 else "classes"
        say(f"{count} {noun} of calls in {len(groups)} groups change")
    sys.exit(1 if found else 0)


def _load(path: str, place: Place) -> Policy:
    if os.path.isdir(path):
        return place.load(directories=(path,))
    from sluice.cli.policy_common import ToolFiles
    from sluice.policy.loader import Loader

    with open(path, "rb") as stream:
        content = stream.read()
    directory = os.path.dirname(os.path.abspath(path))
    loader = Loader(ToolFiles(), [directory], legacy_directory=place.legacy)
    loaded = loader.load_text(content, path, directory)
    return Policy(loaded.rules, loaded.warnings)


def _print(one: Group, most: int | None) -> None:
    say(f"{', '.join(one.calls)}")
    say(f"  {one.old}  =>  {one.new}")
    by_targets: dict[tuple[str, ...], list[str]] = {}
    targets: dict[str, list[str]] = {}
    for source, target in one.pairs:
        targets.setdefault(source, []).append(_shown(target))
    for source, asked in targets.items():
        by_targets.setdefault(tuple(dict.fromkeys(asked)), []).append(source)
    rows = list(by_targets.items())
    for names, sources in rows[:most]:
        say(f"    {_some(sources, most)}  ->  {_some(list(names), most)}")
    if most is not None and len(rows) > most:
        say(f"    ... and {len(rows) - most} more lines (--all)")
    change = one.example
    service = "".join(change.call.sample)
    say(f"    for example {change.source} -> {_shown(change.target)} {service}:")
    say(f"      before {change.old}  ({_place(change.old_rule)})")
    say(f"      after  {change.new}  ({_place(change.new_rule)})")


def _shown(target: str) -> str:
    return "(no target)" if target == "@default" else target


def _some(names: list[str], most: int | None) -> str:
    shown = names if most is None or len(names) <= most + 2 else names[:most]
    more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    return ", ".join(shown) + more


def _place(rule: Rule | None) -> str:
    return "no rule" if rule is None else rule.place


def _to_json(one: Group) -> dict[str, Any]:
    return {
        "calls": list(one.calls),
        "old": one.old,
        "new": one.new,
        "pairs": [{"source": source, "target": target} for source, target in one.pairs],
        "example": _example(one.example),
    }


def _example(change: Change) -> dict[str, Any]:
    return {
        "source": change.source,
        "target": change.target,
        "service": "".join(change.call.sample),
        "old": str(change.old),
        "new": str(change.new),
        "old_rule": _place(change.old_rule),
        "new_rule": _place(change.new_rule),
    }
