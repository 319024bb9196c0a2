"""Hearing that the configuration changed (docs/spec/proxy.md 3).

The directories in which files matter are watched by inotify(7), asked for through libc: the
libraries that do so wake up several times a second to look whether they should stop, and a server
whose calls idle must not wake up at all. Where the kernel cannot tell (a network file system, no
watch left), SIGHUP and the control socket remain.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from sluice.errors import ConfigError
from sluice.proxy.paths import configuration_files

if TYPE_CHECKING:
    import asyncio

    from sluice.proxy.model import Configuration

# Editors write in several steps: one reading for all that changes in so many seconds.
SETTLE = 0.1
_SUFFIXES = (".toml", ".json", ".py")
_EVENT = struct.Struct("iIII")
# From <sys/inotify.h>: what can make a difference to what is read.
_CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x8, 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF, _OVERFLOW, _ONLYDIR = 0x400, 0x800, 0x4000, 0x0100_0000
_MASK = (
    _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF
) | _ONLYDIR
_ALWAYS = _DELETE_SELF | _MOVE_SELF | _OVERFLOW


def directories(configuration: Configuration, path: str | None) -> list[str]:
    """Return the directories whose files matter: configuration, filters, plugins."""
    found: set[str] = set()
    try:
        files = configuration_files(path)
    except ConfigError:
        files = []
    for file in (*configuration.files, *files):
        # Where it is a link, both it and what it points to may change.
        for place in (os.path.abspath(file), os.path.realpath(file)):
            found |= {os.path.dirname(place), os.path.dirname(place) + "/proxy.d"}
    if path and os.path.isdir(path):
        found |= {os.path.abspath(path), os.path.abspath(path) + "/proxy.d"}
    found |= {*configuration.settings.filters, *configuration.settings.legacy_plugins}
    return sorted(directory for directory in found if os.path.isdir(directory))


def matters(name: str) -> bool:
    """Tell whether a file of that name is read, or a directory in which such may lie."""
    return not name.startswith(".") and (name.endswith(_SUFFIXES) or name == "proxy.d")


class Watcher:
    """Calls ``on_change()`` once things have settled after a change in the watched directories."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_change: Callable[[], None]) -> None:
        """Begin with no directory. Raises OSError where the kernel does not watch for us."""
        self._loop = loop
        self._on_change = on_change
        self._timer: asyncio.TimerHandle | None = None
        self._watches: dict[str, int] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        loop.add_reader(self._fd, self._readable)

    def watch(self, paths: Iterable[str]) -> None:
        """Watch these directories from now on. Raises OSError where there are too many."""
        wanted = set(paths)
        for path in set(self._watches) - wanted:
            self._libc.inotify_rm_watch(self._fd, self._watches.pop(path))
        for path in sorted(wanted):
            # Asked for again where it is known: the name may have come to mean another directory.
            number = self._libc.inotify_add_watch(self._fd, os.fsencode(path), _MASK)
            if number < 0:
                error = ctypes.get_errno()
                if error in (errno.ENOENT, errno.ENOTDIR):
                    continue
                raise OSError(error, os.strerror(error), path)
            self._watches[path] = number

    def close(self) -> None:
        """Watch no more."""
        if self._fd >= 0:
            if self._timer is not None:
                self._timer.cancel()
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if any(_tells(mask, name) for mask, name in _events(os.read(self._fd, 65536))):
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_later(SETTLE, self._settled)

    def _settled(self) -> None:
        self._timer = None
        self._on_change()


def _tells(mask: int, name: str) -> bool:
    return bool(mask & _ALWAYS) or matters(name)


def _events(raw: bytes) -> Iterable[tuple[int, str]]:
    """Yield mask and file name of each event."""
    at = 0
    while at < len(raw):
        _, mask, _, size = _EVENT.unpack_from(raw, at)
        at += _EVENT.size
        yield mask, os.fsdecode(raw[at : at + size].rstrip(b"\0"))
        at += size
