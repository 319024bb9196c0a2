"""The calls under way, on disk, so that a call has its record even if the AdminVM is killed.

Theory. An audit record is written when a call ends, and a SIGKILL leaves no time to end anything.
So what is known of a call is appended here when it begins and again when it is connected, and a
line with its number when it has ended; a file without calls under way is emptied. Whoever starts
next finds the calls that were cut, and records them. Nothing is synced: a process that is killed
loses nothing that it has written, and after a crash of the machine there is no call left to tell.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import msgspec

MAX_BYTES = 1 << 20
CUT = "the AdminVM was killed"


class Journal:
    """One file of begun and ended calls. Errors of the disk lose its service, never a call."""

    def __init__(self, path: str | os.PathLike[str], recover: Callable[[bytes], None]) -> None:
        """Give the records of cut calls, as lines for the audit log, to ``recover``; begin anew.

        Raises OSError where the file cannot be opened.
        """
        self._path = os.fspath(path)
        self._begun: dict[int, bytes] = {}
        self._size = 0
        for line in cut_calls(self._path):
            recover(line)
        self._fd = self._open(self._path, os.O_TRUNC)

    @staticmethod
    def _open(path: str, more: int) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(path, flags | more, 0o600)

    def begin(self, number: int, line: bytes) -> None:
        """Note a call and what is known of it, or more of one that was noted before."""
        self._begun[number] = line
        self._append(line)

    def end(self, number: int) -> None:
        """Note that the record of a call has been written."""
        if self._begun.pop(number, None) is None or self._fd < 0:
            return
        if self._begun:
            self._append(b"%d\n" % number)
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            self._size = 0

    def _append(self, line: bytes) -> None:
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            if self._size + len(line) > MAX_BYTES + 2 * sum(map(len, self._begun.values())):
                self._rewrite()
            self._size += os.write(self._fd, line)

    def _rewrite(self) -> None:
        """Leave out what has ended: write beside and put in place."""
        content = b"".join(self._begun.values())
        fresh = self._open(self._path + ".new", os.O_TRUNC)
        view = memoryview(content)
        while view:
            view = view[os.write(fresh, view) :]
        os.replace(self._path + ".new", self._path)
        os.close(self._fd)
        self._fd, self._size = fresh, len(content)

    def close(self) -> None:
        """Close the file; the calls that are still noted were cut."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def cut_calls(path: str) -> list[bytes]:
    """Return the audit lines of the calls that began in ``path`` and did not end.

    A last line that was torn is left out, and so is what cannot be read at all.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read(64 << 20).split(b"\n")[:-1]
    except OSError:
        return []
    begun: dict[int, dict[str, object]] = {}
    for line in lines:
        try:
            entry = msgspec.json.decode(line)
        except msgspec.DecodeError:
            continue
        if isinstance(entry, int):
            begun.pop(entry, None)
        elif isinstance(entry, dict) and isinstance(entry.get("id"), int):
            begun[entry["id"]] = {**entry, "cause": CUT}
    return [msgspec.json.encode(entry) + b"\n" for entry in begun.values()]
