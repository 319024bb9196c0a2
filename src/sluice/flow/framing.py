"""Data messages out of a byte stream, piece by piece and without collecting them.

A payload may be handed on before all of it has arrived, so a ``Framer`` never holds more than it
read in one go, and it knows at any moment how many bytes of the payload under way are still in the
channel: those may be moved by the kernel instead (``skip``). Because bytes that were read ahead
cannot be spliced any more, it reads ahead only while messages are small: then one read brings many
of them. While they are large it asks for what is left of one and exactly the next header.

Sans-I/O: give it bytes, take pieces. docs/spec/wire-protocol.md 3.1, 10.3.
"""

from __future__ import annotations

from sluice.flow.spare import borrow_buffer, return_buffer
from sluice.wire.messages import HEADER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Payloads of at least so many bytes are worth a splice; below, copying is cheaper.
BULK = 16384


_NONE = bytearray()


class Framer:
    """Takes bytes of one direction of a data channel and gives pieces of payload.

    ``check(kind, size)`` is called for each header before anything of its payload is taken; what it
    raises goes to the caller of ``next``.
    """

    __slots__ = ("_buffer", "_check", "_end", "_exact", "_start", "_view", "kind", "left")

    def __init__(self, check: Callable[[int, int], None]) -> None:
        """Begin between two messages."""
        self._check = check
        self._buffer = _NONE
        self._view = memoryview(_NONE)
        self._start = self._end = 0
        self._exact = False
        self.kind = 0
        self.left = 0

    def room(self) -> memoryview:
        """Return where to put the next bytes. No piece given before is valid after this."""
        have = self._end - self._start
        if not self._buffer:
            self._buffer = borrow_buffer()
            self._view = memoryview(self._buffer)
        elif have and self._start:
            # Less than a header, always: next() has given away everything else.
            self._buffer[:have] = self._buffer[self._start : self._end]
        self._start, self._end = 0, have
        if self._exact:
            # What is left of a large payload, and the header behind it.
            return self._view[have : self.left + 8]
        return self._view[have:]

    def filled(self, count: int) -> None:
        """Say how many bytes were put there."""
        self._end += count

    def next(self) -> tuple[int, memoryview, bool] | None:
        """Return (type, piece of payload, whether it is the last piece), or None: more is needed.

        A message without payload gives one empty last piece.
        """
        have = self._end - self._start
        if self.left == 0:
            if have < 8:
                return None
            kind, size = HEADER.unpack_from(self._buffer, self._start)
            self._check(kind, size)
            self.kind = kind
            self._start += 8
            have -= 8
            self._exact = size >= BULK
            if size == 0:
                return kind, self._view[:0], True
            self.left = size
        if not have:
            return None
        count = min(self.left, have)
        piece = self._view[self._start : self._start + count]
        self._start += count
        self.left -= count
        return self.kind, piece, self.left == 0

    def skip(self, count: int) -> bool:
        """Say that ``count`` bytes of the payload were moved past us; tell whether that ends it."""
        self.left -= count
        return self.left == 0

    @property
    def inside(self) -> bool:
        """Whether the stream would be truncated if it ended now."""
        return self.left > 0 or self._end > self._start

    def rest(self) -> None:
        """Give the buffer away while it is empty. No piece given before is valid after this."""
        if self._buffer and self._start == self._end:
            return_buffer(self._buffer)
            self._buffer = _NONE
            self._view = memoryview(_NONE)
            self._start = self._end = 0
