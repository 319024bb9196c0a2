"""One record a call, as a line of JSON (docs/spec/proxy.md 8).

Processes append to the same file: a line is one write to a file opened for appending, which the
kernel does not mix with another. The file is rotated under a lock when it is large. A line has at
most 4096 bytes: what is too long in it is cut, and marked by ``cut``.
"""

from __future__ import annotations

import fcntl
import os
import time

from sluice.wire.names import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sluice.proxy.flow import Flow
    from sluice.proxy.link import Call
    from sluice.proxy.stage import Cause

MAX_LINE = 4096
_SHOWN_ARGUMENT = 512


class Audit:
    """A file of records; ``path`` None keeps none."""

    def __init__(self, path: str | None, *, max_bytes: int = 16 << 20, keep: int = 4) -> None:
        """Take the file, the size at which it is rotated, and how many old ones stay."""
        self.path = path
        self._max_bytes = max_bytes
        self._keep = keep

    def write(self, record: dict[str, Any]) -> None:
        """Append one record. Raises OSError where it cannot be kept."""
        if self.path is not None:
            self.append(encode(record))

    def append(self, line: bytes) -> None:
        """Append a line that ``encode`` made. Raises OSError where it cannot be kept."""
        assert self.path is not None
        os.makedirs(os.path.dirname(self.path) or ".", 0o700, exist_ok=True)
        fd = self._open()
        try:
            if os.fstat(fd).st_size + len(line) > self._max_bytes:
                os.close(fd)
                fd = -1
                self._rotate()
                fd = self._open()
            os.write(fd, line)
        finally:
            if fd >= 0:
                os.close(fd)

    def _open(self) -> int:
        assert self.path is not None
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self.path, flags, 0o600)

    def _rotate(self) -> None:
        """Move ``x`` to ``x.1`` and so on, unless another process has done it meanwhile."""
        assert self.path is not None
        lock = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if os.stat(self.path).st_size < self._max_bytes // 2:
                    return
            except FileNotFoundError:
                return
            for number in range(self._keep - 1, 0, -1):
                try:
                    os.replace(f"{self.path}.{number}", f"{self.path}.{number + 1}")
                except FileNotFoundError:
                    continue
            os.replace(self.path, f"{self.path}.1")
        finally:
            os.close(lock)


def encode(record: dict[str, Any]) -> bytes:
    """Return the record as a line of at most MAX_LINE bytes."""
    line = _dumps(record)
    for victim in ("filters", "reason", "argument", "stages"):
        if len(line) < MAX_LINE:
            break
        record = {**record, "cut": True}
        value = record.get(victim)
        record[victim] = value[:64] if isinstance(value, str) else None
        line = _dumps(record)
    return line + b"\n"


def _dumps(value: Any) -> bytes:
    return _encode(value).encode("ascii")


def _encode(value: Any) -> str:
    """Write JSON. The module json costs a process that starts for each call 5 ms."""
    if value is None:
        return "null"
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{_quote(str(k))}:{_encode(v)}" for k, v in value.items()) + "}"
    return "[" + ",".join(map(_encode, value)) + "]"


def _quote(text: str) -> str:
    safe = escape(text, MAX_LINE)
    return '"' + safe.replace("\\", "\\\\").replace('"', '\\"') + '"'


def record_of(flow: Flow) -> dict[str, Any]:
    """Return the record of a call that is over."""
    assert flow.cause is not None
    record = refusal(flow.call, flow.cause)
    begun = flow.times["begun"]
    record["stages"] = {
        name: round((moment - begun) * 1000, 3)
        for name, moment in flow.times.items()
        if name != "begun"
    }
    record["bytes"] = flow.counters()
    elsewhere = getattr(flow.far, "filters", None)
    record["filters"] = elsewhere or [
        {"name": stage.name, "verdicts": stage.verdicts} for stage in flow.chain.stages
    ]
    return record


def refusal(call: Call, cause: Cause) -> dict[str, Any]:
    """Return the record of a call that never began."""
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    argument = call.argument
    return {
        "time": f"{stamp}.{int(now * 1000) % 1000:03d}Z",
        "id": call.ident,
        "form": call.form,
        "source": call.source,
        "target": call.target,
        "service": call.service,
        "argument": None if argument is None else escape(argument, _SHOWN_ARGUMENT),
        "chain": call.chain,
        "exit_code": cause.exit_code,
        "cause": cause.kind,
        "filter": cause.filter,
        "reason": cause.reason,
        "stages": {},
        "bytes": {},
        "filters": [],
    }
