"""Streams of text into lines for the log, whatever the other side sends."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.proxy.verdicts import Bytes

MAX_LINE = 1024


class LineSplitter:
    """Cuts bytes into lines of at most ``MAX_LINE`` bytes and hands each on, undecoded escaped."""

    def __init__(self, write: Callable[[str], None]) -> None:
        """Take what is called with each line, escaped, without its end."""
        self._write = write
        self._rest = b""

    def feed(self, untrusted_data: Bytes) -> None:
        """Take bytes; whole lines are written."""
        *lines, self._rest = (self._rest + bytes(untrusted_data)).split(b"\n")
        for line in lines:
            self._show(line)
        while len(self._rest) > MAX_LINE:
            self._show(self._rest[:MAX_LINE])
            self._rest = self._rest[MAX_LINE:]

    def end(self) -> None:
        """Write what is left over."""
        if self._rest:
            self._show(self._rest)
            self._rest = b""

    def _show(self, line: bytes) -> None:
        from sluice.wire.names import escape

        self._write(escape(line.rstrip(b"\r"), MAX_LINE))
