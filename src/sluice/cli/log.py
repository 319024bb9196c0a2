"""``sluice log``: the audit log, one line a call."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from sluice.cli.common import places, root_option, tell_errors
from sluice.wire.names import escape

POLL = 0.2  # seconds between two looks at the file


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on with new calls as they end.")
@click.option("--lines", "-n", default=20, show_default=True, help="How many of the last to show.")
@click.option("--domain", help="Only calls from or to this domain.")
@click.option("--refused", is_flag=True, help="Only calls that were refused.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as they are stored.")
@root_option
@tell_errors
def command(
    follow: bool, lines: int, domain: str | None, refused: bool, as_json: bool, root: str | None
) -> None:
    """Show what calls there were, whether they were allowed, and why not."""
    path = places(root).audit_file
    position = 0
    if path.exists():
        with open(path, errors="replace") as file:
            last = deque((line for line in file if wanted(line, domain, refused)), max(lines, 0))
            position = file.tell()
        for line in last:
            click.echo(line.rstrip("\n") if as_json else render(line))
    if follow:
        for line in new_lines(path, position):
            if wanted(line, domain, refused):
                click.echo(line.rstrip("\n") if as_json else render(line))


def wanted(line: str, domain: str | None, refused: bool) -> bool:
    """Tell whether a record is one of those that were asked for."""
    if domain is None and not refused:
        return True
    try:
        record = json.loads(line)
        ends = (record["source"], record["target"], record["requested_target"])
        return (domain is None or domain in ends) and (not refused or record["decision"] != "allow")
    except (ValueError, TypeError, KeyError):
        return False


def new_lines(path: Path, position: int) -> Iterator[str]:
    """Yield lines as they are appended, over rotations, for ever."""
    inode = path.stat().st_ino if path.exists() else -1
    held = ""
    while True:
        try:
            found = os.stat(path)
        except FileNotFoundError:
            time.sleep(POLL)
            continue
        if found.st_ino != inode or found.st_size < position:
            inode, position, held = found.st_ino, 0, ""
        with open(path, errors="replace") as file:
            file.seek(position)
            text = held + file.read()
            position = file.tell()
        *whole, held = text.split("\n")
        yield from whole
        if not whole:
            time.sleep(POLL)


def render(line: str) -> str:
    """Make one record readable; what cannot be read is shown escaped."""
    try:
        record = json.loads(line)
        return _render(record)
    except (ValueError, TypeError, KeyError, AttributeError):
        return escape(line.rstrip("\n"), 400)


def _render(record: dict[str, Any]) -> str:
    service = record["service"]
    if record.get("argument") is not None:
        service += "+" + record["argument"]
    what = record.get("command") or service
    target = record["target"]
    if record.get("requested_target") not in (None, "", target):
        target = f"{target} (asked for {record['requested_target']})"
    stages = record.get("stages") or {}
    milliseconds = max(stages.values(), default=0.0)
    parts = [
        record["time"],
        f"{record['source']} -> {target}",
        str(what),
        record["decision"],
        f"by {record['rule']}" if record.get("rule") else "",
        record.get("cause") or "",
        f"exit {record['exit_code']}" if record.get("exit_code") is not None else "",
        f"{milliseconds:.0f} ms" if stages else "",
        f"x{record['count']}" if record.get("count") else "",
    ]
    return escape("  ".join(part for part in parts if part), 1000)
