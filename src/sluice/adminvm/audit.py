"""The audit log: one JSON line for each call, whatever became of it.

A line is at most 4 KiB, so that it is written by one ``write`` and never torn; what came from a
domain is escaped and cut. The file is rotated by size and a fixed number of old ones is kept. A
full disk does not stop calls: the loss is counted and said once. A call that was under way when the
AdminVM was killed is recorded at the next start, from a journal (``journal``).

Fields of a call: ``time`` (UTC), ``id``, ``source``, ``target`` (the domain that answers, or what
was asked for where none was found), ``requested_target``, ``service``, ``argument`` (null where
there is no ``+``), ``rule`` (``FILE:LINE``), ``decision`` (allow, deny), ``cause`` (why it was
refused, or how it ended), ``stages`` (milliseconds since the request), ``exit_code`` (only where
the AdminVM saw it), ``command`` (dom0's shell commands), ``reason`` (where the rule gives one).
``count`` stands in a line that folds many refusals.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from sluice.adminvm.journal import Journal
from sluice.adminvm.rotated import RotatedFile
from sluice.wire.names import escape

MAX_LINE = 4096
MAX_FIELD = 256
MAX_ARGUMENT = 512

_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class CallRecord:
    """What is known of one call. ``clock`` is a monotonic one, in seconds."""

    number: int
    source: str
    service: str
    requested_target: str
    clock: Callable[[], float] = time.monotonic
    target: str = ""
    rule: str | None = None
    decision: str = "deny"
    cause: str = ""
    reason: str | None = None
    exit_code: int | None = None
    command: str | None = None
    count: int | None = None
    stages: dict[str, float] = field(default_factory=dict)
    wall: float = field(default_factory=time.time)
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        """Start the call's own clock."""
        self._began = self.clock()

    def stage(self, name: str) -> None:
        """Note that a stage was reached now."""
        self.stages[name] = round((self.clock() - self._began) * 1000, 3)

    def as_dict(self) -> dict[str, Any]:
        """Return the line's fields; everything in it is printable ASCII and bounded."""
        service, plus, argument = self.service.partition("+")
        line: dict[str, Any] = {
            "time": timestamp(self.wall),
            "id": self.number,
            "source": escape(self.source, 64),
            "target": escape(self.target or self.requested_target, 128),
            "requested_target": escape(self.requested_target, 128),
            "service": escape(service, MAX_FIELD),
            "argument": escape(argument, MAX_ARGUMENT) if plus else None,
            "rule": None if self.rule is None else escape(self.rule, MAX_FIELD),
            "decision": self.decision,
            "cause": escape(self.cause, MAX_FIELD),
            "stages": self.stages,
            "exit_code": self.exit_code,
        }
        if self.command is not None:
            line["command"] = escape(self.command, MAX_ARGUMENT)
        if self.reason is not None:
            line["reason"] = escape(self.reason, MAX_FIELD)
        if self.count is not None:
            line["count"] = self.count
        return line


def timestamp(wall: float) -> str:
    """Write a time in seconds since 1970 as UTC with milliseconds, as logs have it."""
    text = datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


class AuditLog(RotatedFile):
    """The rotated file of call records, and the journal of those that have none yet."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int = 16 << 20,
        keep: int = 4,
        *,
        on_trouble: Callable[[str], None] | None = None,
    ) -> None:
        """See ``RotatedFile``. The calls that were cut when we were killed are recorded now."""
        super().__init__(path, max_bytes, keep, on_trouble=on_trouble)
        self._journal = Journal(f"{self.path}.begun", self.append)

    def begin(self, record: CallRecord) -> None:
        """Note a call that is under way; it gets its record whatever becomes of us."""
        self._journal.begin(record.number, _line(record))

    def write(self, record: CallRecord) -> None:
        """Append one record."""
        self.append(_line(record))
        self._journal.end(record.number)

    def close(self) -> None:
        """Close both files."""
        super().close()
        self._journal.close()


def _line(record: CallRecord) -> bytes:
    line = _encode(record.as_dict()) + b"\n"
    if len(line) > MAX_LINE:  # escapes can double: give up the longest texts
        record.service = record.service[:64] + "..."
        record.command = None if record.command is None else record.command[:64] + "..."
        line = _encode(record.as_dict()) + b"\n"
    return line
