"""Log lines of domains, bounded: what a domain can cause to be written is little and is folded.

Two sources: events that a domain causes (refused floods, bad messages), and what its agent and its
services write to the sandbox's stderr. Both pass a bucket of lines; what is over is counted and
said once a second. Every line is escaped before it goes anywhere.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence

from sluice.adminvm.bucket import TokenBucket
from sluice.wire.names import escape

LINES_A_SECOND = 20.0
LINES_BURST = 200.0
MAX_LINE = 1024
READ_SIZE = 16384
PACE = 1 << 20  # bytes a second that are read of a sandbox's stderr, in the long run

Log = Callable[[str], None]


class FoldedLog:
    """At most so many lines a second; one more line tells how many were left out."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        log: Log,
        *,
        rate: float = LINES_A_SECOND,
        burst: float = LINES_BURST,
    ) -> None:
        """Take the loop for its clock and timer, and where lines go."""
        self._loop = loop
        self._log = log
        self._bucket = TokenBucket(rate, burst, loop.time)
        self._left_out = 0
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, text: str) -> None:
        """Write ``text``, or count it."""
        if self._bucket.take():
            self._log(text)
        else:
            self._leave_out(1)

    def untrusted(self, lines: Sequence[bytes], limit: int) -> None:
        """Write lines of a domain, escaped and cut to ``limit`` characters, or count them.

        What is left out is not looked at: a flood of short lines must cost next to nothing.
        """
        for at, line in enumerate(lines):
            if not self._bucket.take():
                self._leave_out(len(lines) - at)
                return
            self._log(escape(line, limit))

    def _leave_out(self, count: int) -> None:
        self._left_out += count
        if self._timer is None:
            self._timer = self._loop.call_later(1.0, self.flush)

    def flush(self) -> None:
        """Say now how many lines were left out."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._left_out:
            self._log(f"({self._left_out} more lines left out)")
            self._left_out = 0


class Counted:
    """Events of one kind that are only counted, and told once a second by their number."""

    def __init__(self, loop: asyncio.AbstractEventLoop, tell: Callable[[str, int], None]) -> None:
        """``tell`` gets a reason and how often it happened since it was told last."""
        self._loop = loop
        self._tell = tell
        self._counts: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, reason: str) -> None:
        """Count one event; ``reason`` is one of a few fixed texts."""
        self._counts[reason] = self._counts.get(reason, 0) + 1
        if self._timer is None:
            self._timer = self._loop.call_later(1.0, self.flush)

    def flush(self) -> None:
        """Tell now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        counts, self._counts = self._counts, {}
        for reason, count in counts.items():
            self._tell(reason, count)


class StderrReader:
    """Reads a sandbox's stderr and hands its lines on, escaped, cut and folded."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, fd: int, log: FoldedLog, *, last: bool = True
    ) -> None:
        """Take the read end of the pipe; it belongs to the reader.

        ``last``: nothing is logged after its end, so that what was left out is said then.
        """
        self._loop = loop
        self._fd = fd
        self._log = log
        self._last = last
        self._line = bytearray()
        self._bucket = TokenBucket(PACE, PACE, loop.time)
        self._timer: asyncio.TimerHandle | None = None
        os.set_blocking(fd, False)
        loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        try:
            untrusted_data = os.read(self._fd, READ_SIZE)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EINTR):
                return
            untrusted_data = b""
        if not untrusted_data:
            self.close()
            return
        debt = self._bucket.spend(len(untrusted_data))
        if debt:
            # The domain's writers block meanwhile, which is theirs to bear.
            self._loop.remove_reader(self._fd)
            self._timer = self._loop.call_later(debt, self._again)
        *lines, rest = (bytes(self._line) + untrusted_data).split(b"\n")
        self._log.untrusted(lines, MAX_LINE)
        if len(rest) > MAX_LINE:
            self._log.untrusted([rest], MAX_LINE)
            rest = b""
        self._line = bytearray(rest)

    def _again(self) -> None:
        self._timer = None
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Hand on what is left and close the pipe."""
        if self._fd < 0:
            return
        if self._timer is not None:
            self._timer.cancel()
        else:
            self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
        if self._line:
            self._log.untrusted([bytes(self._line)], MAX_LINE)
            self._line.clear()
        if self._last:
            self._log.flush()
