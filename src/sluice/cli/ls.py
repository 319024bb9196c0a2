"""``sluice ls``: the domains of a system and how they are."""

from __future__ import annotations

import json
from typing import Any

import click

from sluice.cli.common import ask, places, root_option, tell_errors
from sluice.domains.paths import Paths

COLUMNS = ("name", "class", "label", "state", "kind", "pid", "calls")


@click.command()
@click.option("--limits", is_flag=True, help="Show the limits of each domain and what holds them.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@root_option
@tell_errors
def command(limits: bool, as_json: bool, root: str | None) -> None:
    """List the domains."""
    paths = places(root)
    domains = describe(paths)
    if as_json:
        click.echo(json.dumps(domains, indent=2))
    elif limits:
        _table(("name", "limit", "value", "held by"), _limit_rows(domains))
    else:
        _table(COLUMNS, [[_shown(domain, column) for column in COLUMNS] for domain in domains])


def describe(paths: Paths) -> list[dict[str, Any]]:
    """Return the domains as the AdminVM knows them; from the file where none runs."""
    from sluice.adminvm.api import NotRunningError

    try:
        return list(ask(paths, "list"))
    except NotRunningError:
        if not paths.system_file.exists():
            raise
    from sluice.domains.system_file import load

    return [
        {
            "name": name,
            "class": settings.get("klass", "AppVM"),
            "label": settings.get("label", "red"),
            "kind": settings.get("kind"),
            "state": "Halted",
            "pid": -1,
            "calls": 0,
            "limits": [],
        }
        for name, settings in load(paths.system_file).domains.items()
    ]


def _shown(domain: dict[str, Any], column: str) -> str:
    value = domain.get(column, "")
    return "-" if column == "pid" and value == -1 else str(value)


def _limit_rows(domains: list[dict[str, Any]]) -> list[list[str]]:
    units = {"memory": " MiB"}
    return [
        [
            domain["name"],
            limit["name"],
            limit["value"] + units.get(limit["name"], ""),
            "nothing" if limit["by"] == "none" else limit["by"],
        ]
        for domain in domains
        for limit in domain.get("limits", [])
    ]


def _table(head: tuple[str, ...], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in ([title.upper() for title in head], *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())
