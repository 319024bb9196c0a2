"""A local descriptor that takes received payload: a command's stdin, our stdout or stderr.

It holds what the descriptor did not accept (one message at most: nothing more is read from the
channel meanwhile), and an end-of-file that came behind it. docs/spec/wire-protocol.md 10.3, 10.5.
"""

from __future__ import annotations

import errno
import os

from sluice.flow.spare import CANNOT, SINK_FULL, splice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sluice.flow.endpoint import Endpoint


class Inlet:
    """Writes to ``end`` and tells ``on_closed()``, once, when that is over for any reason."""

    __slots__ = (
        "_eof",
        "_held",
        "_on_closed",
        "_table",
        "end",
        "error",
        "full",
        "on_unwanted",
        "open",
    )

    def __init__(
        self, end: Endpoint, on_closed: Callable[[], None], *, table: bytes | None = None
    ) -> None:
        """Take the endpoint, which the owner closes; ``table`` translates each byte."""
        self.end = end
        self.open = True
        # A splice into it was refused: what it is to take is still in the channel.
        self.full = False
        # Why writing failed, unless its reader just went away.
        self.error = ""
        # Called for each write that nobody takes, for a program that is to end by it.
        self.on_unwanted: Callable[[], None] | None = None
        self._on_closed = on_closed
        self._table = table
        self._held: bytes | memoryview = b""
        self._eof = False

    @property
    def holding(self) -> bool:
        """Whether something written to it waits for the descriptor."""
        return len(self._held) > 0

    @property
    def blocked(self) -> bool:
        """Whether the descriptor must become writable before anything else happens here."""
        return self.full or len(self._held) > 0

    def put(self, parts: Sequence[bytes | memoryview]) -> None:
        """Write ``parts`` one behind the other, or hold them; only while nothing is held.

        What is held stays a view of the caller's buffer, which must not change before.
        """
        if not self.open:
            self._unwanted()
            return
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if self._table is not None:
            data = bytes(data).translate(self._table)
        self._held = memoryview(data)
        self.flush()

    def end_of_file(self) -> None:
        """Close as soon as all before is written."""
        if self._held:
            self._eof = True
        else:
            self.close()

    def flush(self) -> None:
        """Write what is held, as far as the descriptor takes it. A failure closes."""
        self.full = False
        while self._held:
            try:
                count = self.end.write(self._held)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                    self.error = os.strerror(error.errno or 0)
                self.close()
                self._unwanted()
                return
            self._held = self._held[count:]
        if self._eof:
            self.close()

    def _unwanted(self) -> None:
        if self.on_unwanted is not None:
            self.on_unwanted()

    def may_splice(self, source: Endpoint) -> bool:
        """Tell whether the kernel can move bytes from ``source`` into it."""
        return (
            self.open
            and self.end.spliceable
            and self._table is None
            and not self._eof
            and (self.end.is_pipe or source.is_pipe)
        )

    def splice(self, source: Endpoint, most: int) -> int:
        """Move up to ``most`` bytes as ``spare.splice`` does. A broken IN closes."""
        try:
            count = splice(source.fd, self.end.fd, most)
        except OSError:
            # Which of the two is to blame shows when the bytes are copied.
            count = CANNOT
        if count == SINK_FULL:
            self.full = True
        elif count == CANNOT:
            self.end.spliceable = False
        return count

    def close(self) -> None:
        """Take nothing any more, and drop what is held."""
        if self.open:
            self.open = self.full = self._eof = False
            self._held = b""
            self._on_closed()
