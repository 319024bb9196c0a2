"""The sending half of a data channel: local streams into messages, messages into the channel.

At most one data message is under way at a time, and nothing is read from a local stream before it
has gone: that is the whole of the back-pressure. What waits for the channel is, in this order,

1. ``_head``: bytes of ours, a header with or without its payload;
2. ``_owed``: payload that waits in a pipe of ours, to be spliced behind its header;
3. ``_tail``: control messages that came meanwhile.

Large payloads go by splice through a private pipe: *first* into it, which tells how many bytes
there are, then the header, then out of it. Asking the source how much it has (FIONREAD) and
promising that in a header would cost as many calls and would be a lie as soon as somebody else
reads from the same stdin. No byte is copied on the way, and no end-of-file can cut a message.

Small amounts are read and written in one piece, with the header in the same buffer. Which of the
two is used follows the size of the message before.

docs/spec/wire-protocol.md 10.2, 10.4.
"""

from __future__ import annotations

import os

from sluice.flow.framing import BULK
from sluice.flow.spare import (
    CANNOT,
    SINK_FULL,
    borrow_buffer,
    borrow_pipe,
    return_buffer,
    return_pipe,
    splice,
)
from sluice.wire.messages import HEADER, MAX_DATA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.flow.endpoint import Endpoint

# What take() returns besides a number of bytes.
ENDED = 0
EMPTY = -1


class Sender:
    """Puts messages into ``fd``, which is non-blocking and belongs to somebody else."""

    def __init__(self, fd: int) -> None:
        """Begin with nothing to send; ``limit`` is set to the payload limit of the version."""
        self._fd = fd
        self.limit = MAX_DATA
        # Payload bytes taken from local streams.
        self.taken = 0
        self.spliced = 0
        self._head: list[bytes | memoryview] = []
        self._owed = 0
        self._tail: list[bytes] = []
        self._pipe: tuple[int, int] | None = None
        self._buffer: bytearray | None = None
        self._bulk = False

    @property
    def pending(self) -> bool:
        """Whether something waits for the channel."""
        return bool(self._head or self._owed or self._tail)

    def queue(self, message: bytes) -> None:
        """Put a whole message behind everything that waits."""
        if self._owed:
            self._tail.append(message)
        else:
            self._head.append(message)

    def flush(self) -> bool:
        """Write what waits; return whether all of it has gone. Raises OSError (EPIPE, ...)."""
        while True:
            if self._head:
                if not self._write_head():
                    return False
            elif self._owed:
                if not self._splice_owed():
                    return False
            elif self._tail:
                self._head, self._tail = list(self._tail), []
            else:
                return True

    def _write_head(self) -> bool:
        """Write of the head what the channel takes; return False where it takes nothing."""
        head = self._head
        try:
            count = os.writev(self._fd, head[:64]) if len(head) > 1 else os.write(self._fd, head[0])
        except BlockingIOError:
            return False
        while head and count >= len(head[0]):
            count -= len(head.pop(0))
        if count:
            head[0] = memoryview(head[0])[count:]
        return True

    def _splice_owed(self) -> bool:
        """Move owed payload; return False where the channel takes nothing."""
        pipe = self._pipe
        assert pipe is not None
        count = splice(pipe[0], self._fd, self._owed)
        if count == SINK_FULL:
            return False
        if count == CANNOT:
            # Not a thing to splice into: the payload becomes bytes of ours.
            payload = os.read(pipe[0], self._owed)
            self._head.append(payload)
            count = len(payload)
        self._owed -= count
        if not self._owed:
            self._pipe = None
            return_pipe(pipe, True)
        return True

    def take(
        self,
        source: Endpoint,
        kind: int,
        look: Callable[[memoryview], None] | None = None,
    ) -> int:
        """Make one message of type ``kind`` of what ``source`` has; only when nothing is pending.

        ``look`` is shown the payload, which then is not spliced. Returns the number of bytes, ENDED
        or EMPTY. Raises OSError where the source is broken.
        """
        if self._bulk and look is None and source.spliceable:
            count = self._take_pages(source, kind)
            if count is not None:
                return count
        return self._take_copy(source, kind, look)

    def _take_copy(
        self, source: Endpoint, kind: int, look: Callable[[memoryview], None] | None
    ) -> int:
        """Read a message behind the place of its header."""
        buffer = self._buffer
        if buffer is None:
            buffer = self._buffer = borrow_buffer()
        view = memoryview(buffer)
        try:
            count = os.readv(source.fd, [view[8 : 8 + self.limit]])
        except BlockingIOError:
            return EMPTY
        except ConnectionResetError:
            return ENDED
        if not count:
            return ENDED
        HEADER.pack_into(buffer, 0, kind, count)
        if look is not None:
            look(view[8 : 8 + count])
        self._head.append(view[: 8 + count])
        self.taken += count
        self._bulk = count >= BULK
        return count

    def _take_pages(self, source: Endpoint, kind: int) -> int | None:
        """Splice a message into a private pipe; None where it must be copied."""
        pipe = self._pipe = borrow_pipe()
        if pipe is None:
            return None
        try:
            count = splice(source.fd, pipe[1], self.limit)
        except ConnectionResetError:
            count = ENDED
        if count > 0:
            self._head.append(HEADER.pack(kind, count))
            self._owed = count
            self.taken += count
            self.spliced += count
            self._bulk = count >= BULK
            return count
        self._pipe = None
        return_pipe(pipe, True)
        if count == CANNOT:
            source.spliceable = False
            return None
        return EMPTY if count else ENDED

    def rest(self) -> None:
        """Give the buffer back while nothing waits."""
        if self._buffer is not None and not self._head:
            return_buffer(self._buffer)
            self._buffer = None

    def close(self) -> None:
        """Drop what waits."""
        self._head.clear()
        self._tail.clear()
        self.rest()
        if self._pipe is not None:
            return_pipe(self._pipe, self._owed == 0)
            self._pipe = None
        self._owed = 0
