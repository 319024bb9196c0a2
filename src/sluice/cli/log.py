"""``sluice log``: the calls, one line each, and what domains logged."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import click

from sluice.cli.common import places, root_option, tell_errors
from sluice.wire.names import escape

POLL = 0.2  # seconds between two looks at the file


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes.")
@click.option("--lines", "-n", default=20, show_default=True, help="How many of the last to show.")
@click.option("--domain", help="Only calls from or to this domain, and what it logged.")
@click.option("--refused", is_flag=True, help="Only calls that were refused.")
@click.option("--calls", is_flag=True, help="Only calls, not what domains logged.")
@click.option("--json", "as_json", is_flag=True, help="Print the records of calls as stored.")
@root_option
@tell_errors
def command(
    follow: bool,
    lines: int,
    domain: str | None,
    refused: bool,
    calls: bool,
    as_json: bool,
    root: str | None,
) -> None:
    """Show what calls there were, whether they were allowed, why not, and what domains logged."""
    where = places(root)
    tails = [Tail(where.audit_file, lambda line: wanted(line, domain, refused))]
    if not (refused or calls or as_json):
        tails.append(Tail(where.domain_log_file, lambda line: wanted_line(line, domain)))
    first = sorted((line for tail in tails for line in tail.poll(max(lines, 0))), key=time_of)
    show = (lambda line: line) if as_json else render
    for line in first[-lines:] if lines > 0 else []:
        click.echo(show(line))
    while follow:
        fresh = [line for tail in tails for line in tail.poll()]
        for line in fresh:
            click.echo(show(line))
        if not fresh:
            time.sleep(POLL)


def wanted(line: str, domain: str | None, refused: bool) -> bool:
    """Tell whether the record of a call is one of those that were asked for."""
    if domain is None and not refused:
        return True
    try:
        record = json.loads(line)
        ends = (record["source"], record["target"], record["requested_target"])
        return (domain is None or domain in ends) and (not refused or record["decision"] != "allow")
    except (ValueError, TypeError, KeyError):
        return False


def wanted_line(line: str, domain: str | None) -> bool:
    """Tell whether a line that a domain logged is one of those that were asked for."""
    try:
        return domain is None or json.loads(line)["domain"] == domain
    except (ValueError, TypeError, KeyError):
        return False


def time_of(line: str) -> str:
    """Return the time of a record, by which records of both kinds are ordered."""
    try:
        return str(json.loads(line)["time"])
    except (ValueError, TypeError, KeyError):
        return ""


class Tail:
    """A growing file, read from where the last look ended, over rotations.

    When it is rotated, ``path`` becomes ``path.1``, that ``path.2``, and the oldest is deleted. The
    file of the last look stays open: its rest can be read wherever it has gone, and no other file
    can have its number.
    """

    def __init__(self, path: Path, keep: Callable[[str], bool]) -> None:
        """Take the file, which need not exist yet, and which of its lines are kept."""
        self._path = path
        self._keep = keep
        self._file: BinaryIO | None = None
        self._position = 0

    def poll(self, most: int | None = None) -> list[str]:
        """Return the whole lines that came since the last look, the last ``most`` of them.

        The first look begins in the oldest file there is.
        """
        newer = self._newer()
        lines = self._read(most)
        for file in reversed(newer):
            if self._file is not None:
                self._file.close()
            self._file, self._position = file, 0
            lines += self._read(most)
        return lines if most is None else lines[max(len(lines) - most, 0) :]

    def _newer(self) -> list[BinaryIO]:
        """Open what is newer than the file of the last look, newest first."""
        files: list[BinaryIO] = []
        for number in itertools.count():
            name = f"{self._path}.{number}" if number else self._path
            try:
                file = open(name, "rb")  # noqa: SIM115  it stays open until the next rotation
            except FileNotFoundError:
                if number:
                    break
                continue  # the moment between the two steps of a rotation
            if self._file is not None and _same(file, self._file):
                file.close()
                break
            if files and _same(file, files[-1]):
                file.close()  # it was rotated while we looked
            else:
                files.append(file)
        return files

    def _read(self, most: int | None) -> list[str]:
        if self._file is None:
            return []
        if os.fstat(self._file.fileno()).st_size < self._position:
            self._position = 0
        self._file.seek(self._position)
        last: deque[str] = deque(maxlen=most)
        for piece in self._file:
            if not piece.endswith(b"\n"):
                break  # the rest of it is still to come
            self._position += len(piece)
            line = piece[:-1].decode("utf-8", "replace")
            if self._keep(line):
                last.append(line)
        return list(last)


def _same(one: BinaryIO, other: BinaryIO) -> bool:
    return os.path.sameopenfile(one.fileno(), other.fileno())


def render(line: str) -> str:
    """Make one record readable; what cannot be read is shown escaped."""
    try:
        record = json.loads(line)
        if "line" in record:
            return escape(f"{record['time']}  {record['domain']}: {record['line']}", 1000)
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
        f"({record['reason']})" if record.get("reason") else "",
        f"exit {record['exit_code']}" if record.get("exit_code") is not None else "",
        f"{milliseconds:.0f} ms" if stages else "",
        f"x{record['count']}" if record.get("count") else "",
    ]
    return escape("  ".join(part for part in parts if part), 1000)
