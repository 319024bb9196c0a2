"""Calls whose process was killed still get their one audit record (docs/spec/proxy.md 8).

While a call is under way a file holds the record that it would have if the proxy were killed now.
The file is locked; the kernel lets go of the lock when the process dies in whatever way. The next
proxy that starts, of whatever form, turns files that nobody locks into records.
"""

from __future__ import annotations

import fcntl
import os
import time

from sluice.proxy import state
from sluice.proxy.audit import Audit, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SUFFIX = ".call"
# So many are looked at when a call starts: it is the call that waits for it.
_AT_ONCE = 64
# A file that was never completed belongs to nobody after so many seconds.
_ABANDONED = 60.0
_SEARCHED = 256 << 10


class Note:
    """The file of one call under way."""

    __slots__ = ("_fd", "_path")

    def __init__(self, fd: int, path: str) -> None:
        """Made by ``Unfinished.note``."""
        self._fd = fd
        self._path = path

    def done(self) -> None:
        """The call has its record: remove the file. May be repeated."""
        if self._fd >= 0:
            try:  # noqa: SIM105
                os.unlink(self._path)
            except OSError:
                pass
            os.close(self._fd)
            self._fd = -1


class Unfinished:
    """The files of all calls under way that are audited in the same place."""

    def __init__(self, base: str, audit: Audit) -> None:
        """Take the state directory, and where records go."""
        self._base = base
        self._audit = audit

    def note(self, ident: str, source: str, record: dict[str, Any]) -> Note | None:
        """Keep the record of a call for the case that we are killed; None where that cannot be.

        ``source`` is a valid name; ``under_way`` counts by it.
        """
        try:
            where = state.directory(self._base, "calls")
            path = f"{where}/{ident}+{source}{_SUFFIX}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(path + ".new", flags, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, os.fsencode(self._audit.path or "") + b"\n" + encode(record))
            os.rename(path + ".new", path)
        except OSError:
            os.close(fd)
            return None
        return Note(fd, path)

    def under_way(self, source: str) -> tuple[int, int]:
        """Return how many calls have a note, and how many of them are of one source.

        A call that makes its note first and counts then counts itself and all before it, so a
        bound cannot be passed by several at once.
        """
        try:
            names = os.listdir(os.path.join(self._base, "calls"))
        except OSError:
            return 0, 0
        calls = [name for name in names if name.endswith(_SUFFIX)]
        return len(calls), sum(name.endswith(f"+{source}{_SUFFIX}") for name in calls)

    def collect(self, most: int = _AT_ONCE) -> int:
        """Write the records of calls whose process is gone; return how many there were."""
        try:
            where = state.directory(self._base, "calls")
            names = sorted(os.listdir(where))
        except OSError:
            return 0
        found = 0
        for name in names[:most]:
            try:
                found += self._collect(f"{where}/{name}")
            except OSError:
                # Somebody else was quicker, or the disk is full: the next one will see.
                continue
        return found

    def _collect(self, path: str) -> bool:
        if not path.endswith(_SUFFIX):
            if time.time() - os.stat(path).st_mtime > _ABANDONED:
                os.unlink(path)
            return False
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink == 0:
                return False
            place, _, line = os.read(fd, 65536).partition(b"\n")
            if place != os.fsencode(self._audit.path or ""):
                return False
            ident = os.path.basename(path).partition("+")[0]
            # Killed between its record and the end of this file: it has its record.
            fresh = self._audit.path is not None and not self._recorded(ident)
            if fresh and line.endswith(b"\n"):
                self._audit.append(line)
            os.unlink(path)
            return fresh
        finally:
            os.close(fd)

    def _recorded(self, ident: str) -> bool:
        """Tell whether the last part of the audit file has a record of a call."""
        try:
            fd = os.open(self._audit.path or "", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            size = os.fstat(fd).st_size
            tail = os.pread(fd, _SEARCHED, max(size - _SEARCHED, 0))
        finally:
            os.close(fd)
        return f'"id":"{ident}"'.encode() in tail
