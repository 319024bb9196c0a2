"""A call from within this process to its end, with input and output in memory."""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import dataclass

from sluice.errors import RemoteError, ResourceError
from sluice.flow.channel import DataChannel

MAX_OUTPUT = 64 << 20
READ_SIZE = 1 << 18


@dataclass(frozen=True, slots=True)
class Completed:
    """What a finished call left: the status of 10.7 and what the service wrote."""

    status: int
    stdout: bytes
    stderr: bytes


class _Feeder:
    """Writes a buffer into a pipe as it is emptied, then closes it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int, data: bytes) -> None:
        self._loop = loop
        self._fd = fd
        self._data = memoryview(data)
        os.set_blocking(fd, False)
        self._write()

    def _write(self) -> None:
        try:
            while self._data:
                self._data = self._data[os.write(self._fd, self._data) :]
        except BlockingIOError:
            self._loop.add_writer(self._fd, self._write)
            return
        except OSError:  # nobody reads it: that is the service's right
            pass
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1


class _Collector:
    """Reads a pipe to its end, within a bound."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, fd: int, bound: int, over: asyncio.Future[int]
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._bound = bound
        self._over = over
        self.data = bytearray()
        os.set_blocking(fd, False)
        loop.add_reader(fd, self.read)

    def read(self) -> None:
        while self._fd >= 0:
            try:
                piece = os.read(self._fd, READ_SIZE)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EINTR):
                    return
                piece = b""
            self.data += piece
            if len(self.data) > self._bound and not self._over.done():
                self._over.set_exception(ResourceError("the output of a call is too long"))
            if not piece or len(self.data) > self._bound:
                self.close()

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


async def run_to_end(
    read_fd: int, write_fd: int, data: bytes, *, max_output: int = MAX_OUTPUT
) -> Completed:
    """Be the caller on a data channel: send ``data`` and its end, collect what comes back.

    Takes over both descriptors. Raises RemoteError where the service's side breaks the protocol,
    ResourceError where it writes more than ``max_output`` bytes. Cancelling aborts the call.
    """
    loop = asyncio.get_running_loop()
    over: asyncio.Future[int] = loop.create_future()
    stderr = bytearray()

    def done(status: int) -> None:
        if not over.done():
            over.set_result(status)

    def fatal(reason: str) -> None:
        if not over.done():
            over.set_exception(RemoteError(reason))

    def error_output(piece: memoryview) -> None:
        stderr.extend(piece[: max(0, max_output - len(stderr))])

    stdin_read, stdin_write = os.pipe2(os.O_CLOEXEC)
    stdout_read, stdout_write = os.pipe2(os.O_CLOEXEC)
    channel = DataChannel(
        loop,
        read_fd,
        write_fd,
        caller=True,
        in_fd=stdout_write,
        out_fd=stdin_read,
        on_done=done,
        on_fatal=fatal,
        on_stderr=error_output,
    )
    collector = _Collector(loop, stdout_read, max_output, over)
    feeder = _Feeder(loop, stdin_write, data)
    try:
        channel.start()
        status = await over
        collector.read()
        return Completed(status, bytes(collector.data), bytes(stderr))
    finally:
        channel.close()
        feeder.close()
        collector.close()
