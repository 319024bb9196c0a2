"""Audit records, recorded calls and calls under way, as text for a person (proxy.md 8).

Everything shown is escaped: records and recordings hold what domains said.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from sluice.agent.procfs import stat_fields
from sluice.proxy import recording
from sluice.proxy.units import show_size
from sluice.wire.names import escape

_ARROWS = {"src2dst": "->", "dst2src": "<-"}
_DIRECTIONS = ("src2dst", "dst2src")
# Bytes of a recorded call on one line of `show`.
_ROW = 64


def record_line(line: str) -> str:
    """Return one line for the record of a call; what is no record is said to be none."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError
    except ValueError:
        return f"(no record: {escape(line, 60)})"
    call = f"{_text(record, 'service')}{_argument(record)}"
    who = f"{_text(record, 'source') or '?'} -> {_text(record, 'target') or '?'}"
    sizes = " ".join(f"{_ARROWS[name]}{show_size(_read(record, name))}" for name in _DIRECTIONS)
    shown = (
        f"{_text(record, 'time')[:19]} {who} {call} [{_text(record, 'chain')}] {sizes}"
        f" exit {_text(record, 'exit_code')}"
    )
    if record.get("cause") != "done":
        reason = _text(record, "reason", 300)
        name = _text(record, "filter") if record.get("filter") else ""
        shown += f" {_text(record, 'cause')}: " + ": ".join(filter(None, (name, reason)))
    return shown


def _text(record: dict[str, Any], key: str, limit: int = 100) -> str:
    value = record.get(key)
    return "" if value is None else escape(str(value), limit)


def _argument(record: dict[str, Any]) -> str:
    return "" if record.get("argument") is None else "+" + _text(record, "argument", 60)


def _read(record: dict[str, Any], direction: str) -> int:
    counters = record.get("bytes")
    inner = counters.get(direction) if isinstance(counters, dict) else None
    value = inner.get("read", 0) if isinstance(inner, dict) else 0
    return value if isinstance(value, int) else 0


def tail(path: str, count: int) -> list[str]:
    """Return the last ``count`` lines of a file and of those rotated before it."""
    lines: list[str] = []
    for name in (path, *(f"{path}.{number}" for number in range(1, 100))):
        try:
            with open(name, encoding="ascii", errors="backslashreplace") as stream:
                lines = stream.read().splitlines() + lines
        except OSError:
            break
        if len(lines) >= count:
            break
    return lines[-count:] if count else []


class Follower:
    """Reads what is appended to a file, through its rotations. ``poll`` returns whole lines."""

    def __init__(self, path: str) -> None:
        """Begin at the file's present end."""
        self._path = path
        self._file: BinaryIO | None = None
        self._rest = b""
        self._open(at_end=True)

    def _open(self, *, at_end: bool = False) -> None:
        try:
            self._file = open(self._path, "rb")  # noqa: SIM115
        except OSError:
            self._file = None
            return
        if at_end:
            self._file.seek(0, os.SEEK_END)

    def poll(self) -> list[str]:
        """Return the lines that came since the last time."""
        found = self._take()
        if self._rotated():
            if self._file is not None:
                self._file.close()
            self._rest = b""
            self._open()
            found += self._take()
        return found

    def _take(self) -> list[str]:
        if self._file is None:
            return []
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        return [line.decode("ascii", "backslashreplace") for line in lines]

    def _rotated(self) -> bool:
        try:
            now = os.stat(self._path)
        except OSError:
            return False
        if self._file is None:
            return True
        mine = os.fstat(self._file.fileno())
        return (now.st_ino, now.st_dev) != (mine.st_ino, mine.st_dev)


def recording_lines(stream: BinaryIO, *, decode: str = "text") -> Iterator[str]:
    """Yield a recorded call as lines; raises RecordingError for what is none.

    ``decode`` is ``text`` (escaped) or ``hex``.
    """
    call, frames = recording.read(stream)
    argument = call.get("argument")
    service = f"{call.get('service')}" + ("" if argument is None else f"+{argument}")
    moment = call.get("time")
    when = ""
    if isinstance(moment, (int, float)) and 0 <= moment < 1e11:
        when = time.strftime(" at %Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))
    yield escape(
        f"{call.get('source')} -> {call.get('target')} {service} [{call.get('chain')}]{when}", 400
    )
    ended = False
    for kind, moment, payload in frames:
        if kind == recording.END:
            ended = True
            yield f"{moment:9.3f}    {escape(payload, 400)}"
        elif kind >= recording.END_OF:
            yield f"{moment:9.3f} {_ARROWS[_DIRECTIONS[kind - 2]]} end"
        else:
            for at in range(0, len(payload), _ROW):
                row = payload[at : at + _ROW]
                shown = row.hex(" ") if decode == "hex" else escape(row, 4 * _ROW)
                yield f"{moment:9.3f} {_ARROWS[_DIRECTIONS[kind]]} {shown}"
    if not ended:
        yield "the record has no end: the proxy was killed, or it did not fit"


def program_calls(uid: int | None = None) -> list[dict[str, Any]]:
    """Return the calls under way in the program form, as far as ``/proc`` shows them.

    The same fields as those of the resident form; bytes are not known. ``id`` is ``pid:NUMBER``.
    """
    uid = os.geteuid() if uid is None else uid
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            call = _program_call(int(entry), uid)
            if call is not None:
                found.append(call)
    return sorted(found, key=lambda call: -call["seconds"])


def _program_call(pid: int, uid: int) -> dict[str, Any] | None:
    from sluice.proxy.names import CallNameError, parse_call_name

    try:
        if os.stat(f"/proc/{pid}").st_uid != uid:
            return None
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            words = stream.read(1 << 17).split(b"\0")[:-1]
        if len(words) < 2 or os.path.basename(words[-2]) != b"qrexec-proxy":
            return None
        with open(f"/proc/{pid}/environ", "rb") as stream:
            environment = stream.read(1 << 17).split(b"\0")
        ticks = int(stat_fields(pid)[19])
        name = parse_call_name(words[-1])
    except (OSError, CallNameError, ValueError, IndexError):
        return None
    sources = [word[21:] for word in environment if word.startswith(b"QREXEC_REMOTE_DOMAIN=")]
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return {
        "id": f"pid:{pid}",
        "form": "program",
        "source": escape(sources[0], 31) if sources else "?",
        "target": name.target,
        "service": name.service,
        "argument": name.argument,
        "chain": name.chain,
        "state": "open",
        "seconds": round(max(age, 0.0), 3),
        "bytes": {},
    }


class Rates:
    """Bytes a second of calls, from one look to the next."""

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def of(self, call: dict[str, Any], now: float) -> dict[str, tuple[int, float]]:
        """Return direction -> (bytes, bytes a second) of a call."""
        shown = {}
        for direction, counters in call["bytes"].items():
            size = int(counters["read"])
            before = self._seen.get((call["id"], direction))
            rate = 0.0
            if before is not None and now > before[0]:
                rate = (size - before[1]) / (now - before[0])
            self._seen[call["id"], direction] = (now, size)
            shown[direction] = (size, rate)
        return shown

    def forget(self, idents: set[str]) -> None:
        """Keep only what belongs to these calls."""
        self._seen = {key: value for key, value in self._seen.items() if key[0] in idents}
