"""The package ``plugins`` that plugins of the earlier proxy import (docs/spec/proxy.md 7).

``install`` puts this module's public names into a package called ``plugins`` whose path leads to
the owner's directories, so that plugins find base classes, helpers and each other as they did. The
helpers are coroutines that wait for the descriptor; none of them spins.

File objects are binary and non-blocking. What cannot be written at once a ``PipeWriter`` keeps, so
that a plugin that does not look at what ``write`` returns loses nothing.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

READ_BUF_SIZE = 65536
# What a writer keeps for a plugin that writes without waiting.
_MAX_KEPT = 64 << 20

__all__ = [
    "READ_BUF_SIZE",
    "AbortException",
    "QrexecDestinationPlugin",
    "QrexecProxyPlugin",
    "QrexecProxyPluginException",
    "QrexecSourcePlugin",
    "connect_noblock",
    "discard_noblock",
    "flush_noblock",
    "get_logger",
    "open_pipe",
    "open_single_pipe",
    "read_full_noblock",
    "read_noblock",
    "write_noblock",
]


class QrexecProxyPluginException(Exception):
    """Something is wrong in or with a plugin; ends the call."""


class AbortException(QrexecProxyPluginException):
    """What a plugin raises to end the call on purpose; its text goes to log and audit."""


class Meta(dict[str, Any]):
    """What a plugin is told of the call: ``chain``, ``src``, ``dst``, ``qrexec``; items or fields.

    ``src`` and ``dst`` are names of domains, ``qrexec`` is the service with its argument.
    """

    def __getattr__(self, name: str) -> Any:
        """Return an item as a field."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Plugin:
    """What the three kinds have in common."""

    def __init__(self, logger: logging.Logger, meta: Meta, config: Any = None) -> None:
        """Keep logger, meta and configuration (an empty dict where there is none)."""
        self.logger = logger
        self.meta = meta
        self.config = {} if config is None else config


class QrexecProxyPlugin(_Plugin):
    """A plugin between source and destination."""

    async def proxy(self, src_r: Any, src_w: Any, dst_r: Any, dst_w: Any) -> None:
        """Move the bytes: read ``src_r`` and ``dst_r``, write ``dst_w`` and ``src_w``."""
        raise NotImplementedError("a proxy plugin needs the coroutine proxy")


class QrexecSourcePlugin(_Plugin):
    """A plugin that is the call's source end."""

    async def communicate_src(self, src_r: Any, src_w: Any) -> None:
        """Read from ``src_r`` what is for the source; write to ``src_w`` what the source says."""
        raise NotImplementedError("a source plugin needs the coroutine communicate_src")


class QrexecDestinationPlugin(_Plugin):
    """A plugin that is the call's destination end."""

    async def communicate_dst(self, dst_r: Any, dst_w: Any) -> None:
        """Read from ``dst_r`` what is for the destination; write its answer to ``dst_w``."""
        raise NotImplementedError("a destination plugin needs the coroutine communicate_dst")


# --- file objects -------------------------------------------------------------------------------


class PipeReader(io.FileIO):
    """The read end of a pipe, non-blocking: ``read`` gives None while there is nothing."""

    def __init__(self, fd: int) -> None:
        """Take the descriptor, which it closes."""
        os.set_blocking(fd, False)
        super().__init__(fd, "rb")
        self.finished = False
        self.waiting: set[asyncio.Future[None]] = set()

    def read(self, size: int | None = -1, /) -> Any:
        """Return bytes, none at the end, or None."""
        data = super().read(-1 if size is None else size)
        return b"" if data is None and self.finished else data

    read1 = read

    def finish(self) -> None:
        """Let it end after what is in the pipe, whoever still holds the other side."""
        self.finished = True
        for future in self.waiting:
            if not future.done():
                future.set_result(None)


class PipeWriter(io.FileIO):
    """The write end of a pipe, non-blocking. ``write`` takes everything; ``flush`` may leave some.

    Once nobody reads any more, what is written is discarded.
    """

    def __init__(self, fd: int) -> None:
        """Take the descriptor, which it closes."""
        os.set_blocking(fd, False)
        super().__init__(fd, "wb")
        self.gone = False
        self.kept = bytearray()

    def write(self, data: Any, /) -> int:
        """Take all of ``data``. Raises BlockingIOError over what may be kept."""
        size = memoryview(data).nbytes
        if len(self.kept) + size > _MAX_KEPT:
            raise BlockingIOError("written much faster than it is read: wait with flush_noblock")
        self.kept += data
        self.flush()
        return size

    def flush(self) -> None:
        """Write of what is kept as much as goes."""
        super().flush()
        while self.kept and not self.gone:
            try:
                del self.kept[: os.write(self.fileno(), bytes(self.kept[:READ_BUF_SIZE]))]
            except BlockingIOError:
                return
            except BrokenPipeError:
                self.gone = True
        if self.gone:
            self.kept.clear()

    def close(self) -> None:
        """Close; what is kept is still written, in the background, as fast as it is read."""
        if self.closed:
            return
        if self.kept:
            _Rest(os.dup(self.fileno()), self.kept)
        super().close()


class _Rest:
    """What a writer that was closed had still to write. The descriptor is closed after it."""

    def __init__(self, fd: int, data: bytearray) -> None:
        os.set_inheritable(fd, False)
        self._fd = fd
        self._data = data
        self._loop = asyncio.get_running_loop()
        self._loop.add_writer(fd, self._write)

    def _write(self) -> None:
        try:
            del self._data[: os.write(self._fd, bytes(self._data[:READ_BUF_SIZE]))]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._data.clear()
        if not self._data:
            self._loop.remove_writer(self._fd)
            os.close(self._fd)


def open_single_pipe() -> tuple[PipeReader, PipeWriter]:
    """Return (read end, write end) of a new pipe."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    return PipeReader(read_fd), PipeWriter(write_fd)


def open_pipe() -> tuple[PipeReader, PipeWriter, PipeReader, PipeWriter]:
    """Return two pipes for both directions: (r1, w1, r2, w2); what w1 writes r1 reads."""
    return (*open_single_pipe(), *open_single_pipe())


# --- coroutines ---------------------------------------------------------------------------------


async def _ready(file: Any, *, writing: bool = False) -> None:
    """Wait until a file object can be read or written, or was finished."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    fd = file.fileno()
    add, remove = loop.add_reader, loop.remove_reader
    if writing:
        add, remove = loop.add_writer, loop.remove_writer

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    try:
        add(fd, wake)
    except PermissionError:
        # A regular file is always ready.
        await asyncio.sleep(0)
        return
    waiting: set[asyncio.Future[None]] = getattr(file, "waiting", set())
    waiting.add(future)
    try:
        await future
    finally:
        waiting.discard(future)
        remove(fd)


async def read_noblock(file: Any, size: int = READ_BUF_SIZE) -> bytes:
    """Return up to ``size`` bytes as soon as there are any; none at the end."""
    while True:
        try:
            data = file.read(size)
        except BlockingIOError:
            data = None
        if data is not None:
            return bytes(data)
        await _ready(file)


async def read_full_noblock(file: Any, size: int = READ_BUF_SIZE) -> bytes:
    """Return ``size`` bytes, fewer only at the end."""
    parts = []
    while size > 0:
        data = await read_noblock(file, size)
        if not data:
            break
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


async def write_noblock(file: Any, data: Any) -> int:
    """Write all of ``data``, and return its size. Nobody reads any more: it is discarded."""
    view = memoryview(data).cast("B")
    await flush_noblock(file)
    at = 0
    while at < len(view) and not file.closed:
        try:
            at += file.write(view[at : at + READ_BUF_SIZE]) or 0
        except BlockingIOError as error:
            at += error.characters_written if hasattr(error, "characters_written") else 0
        except BrokenPipeError:
            break
        if isinstance(file, PipeWriter):
            await flush_noblock(file)
        elif at < len(view):
            await _ready(file, writing=True)
    return len(view)


async def flush_noblock(file: Any) -> None:
    """Wait until all that was written has left. A closed file has nothing to flush."""
    while not file.closed:
        try:
            file.flush()
        except BlockingIOError:
            await _ready(file, writing=True)
            continue
        except BrokenPipeError:
            return
        if not getattr(file, "kept", b""):
            return
        await _ready(file, writing=True)


async def discard_noblock(file: Any) -> int:
    """Read to the end, keep nothing, and return how much it was."""
    size = 0
    while data := await read_noblock(file):
        size += len(data)
    return size


async def connect_noblock(reader: Any, writer: Any) -> int:
    """Move all bytes from ``reader`` to ``writer``, close that at the end, return their number."""
    size = 0
    while data := await read_noblock(reader):
        size += len(data)
        await write_noblock(writer, data)
    await flush_noblock(writer)
    writer.close()
    return size


def get_logger(name: str | None = None) -> logging.Logger:
    """Return a logger whose lines go to the proxy's log."""
    return logging.getLogger(name or "plugin")


def install(directories: Iterable[str]) -> ModuleType:
    """Make the package ``plugins`` importable and return it."""
    package = ModuleType("plugins", "What plugins of the earlier proxy import.")
    package.__path__ = list(directories)
    package.__dict__.update({name: globals()[name] for name in __all__}, __all__=list(__all__))
    sys.modules["plugins"] = package
    return package
