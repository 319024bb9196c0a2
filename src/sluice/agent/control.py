"""Bytes of the control channel: from its descriptor to messages, and back.

Theory. The channel is a stream socket, connected over `socketdir` or inherited (`passed`; then
messages come with descriptors). Writing never blocks: what the AdminVM does not take yet is held,
and while more than a bound is held no new local requests are accepted, which are the only thing
that could make it grow. docs/spec/wire-protocol.md 7.3, 20.
"""

from __future__ import annotations

import os

from sluice.agent.link import CARRYING, AgentLink
from sluice.errors import RemoteError
from sluice.vchan.passed import FdMessageReader, close_all, recv_with_fds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.agent.link import Connect, Execute, Opened, Refuse
    from sluice.flow.reactor import Loop

MAX_HELD = 65536
READ_SIZE = 65536
HANDSHAKE_TIMEOUT = 10.0


class Control:
    """One connected control channel.

    ``on_event(event, fds)`` gets what the link makes of each message; the descriptors are the
    receiver's. ``on_end(None)`` means the other side closed, ``on_end(reason)`` that it broke
    the protocol or does not answer; called once, the channel is closed then.
    """

    def __init__(
        self,
        loop: Loop,
        fd: int,
        *,
        passed: bool,
        on_event: Callable[[Opened | Execute | Connect | Refuse, list[int]], None],
        on_end: Callable[[str | None], None],
        on_pressure: Callable[[bool], None],
        handshake_timeout: float | None = HANDSHAKE_TIMEOUT,
    ) -> None:
        """Send HELLO and begin to read. ``on_pressure(True)`` asks to stop new requests."""
        self.link = AgentLink()
        self.passed = passed
        self._loop = loop
        self._fd = fd
        self._on_event = on_event
        self._on_end = on_end
        self._on_pressure = on_pressure
        self._reader = FdMessageReader(self.link.lengths, CARRYING if passed else ())
        self._held = bytearray()
        self._writing = False
        self._pressed = False
        os.set_blocking(fd, False)
        self._deadline = None
        if handshake_timeout is not None:
            self._deadline = loop.call_later(
                handshake_timeout, self._finish, "no HELLO came in time"
            )
        loop.add_reader(fd, self._readable)
        self.send(self.link.greeting())

    @property
    def open(self) -> bool:
        """Tell whether the handshake is complete and the channel not closed."""
        return self._fd >= 0 and self.link.version != 0

    # --- in ------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            if self.passed:
                data, fds = recv_with_fds(self._fd, self._reader.wanted)
            else:
                data, fds = os.read(self._fd, READ_SIZE), []
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            close_all(fds)
            self._finish(None)
            return
        try:
            self._reader.feed(data, fds)
            while self._fd >= 0:
                message = self._reader.next()
                if message is None:
                    return
                self._take(*message)
        except RemoteError as error:
            self._finish(str(error))

    def _take(self, kind: int, body: bytes, fds: list[int]) -> None:
        event = self.link.receive(kind, body)
        self._reader.lengths = self.link.lengths
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._on_event(event, fds)

    # --- out -----------------------------------------------------------------------------------

    def send(self, message: bytes) -> None:
        """Send a message, holding what does not go out at once."""
        if self._fd < 0:
            return
        self._held += message
        if not self._writing:
            self._flush()
        self._tell_pressure()

    def _flush(self) -> None:
        try:
            while self._held:
                del self._held[: os.write(self._fd, self._held)]
        except BlockingIOError:
            pass
        except OSError:
            # The other side is gone: the reader is about to find its end, after whatever it
            # said last.
            self._held.clear()
        self._watch_writable(bool(self._held))
        self._tell_pressure()

    def _tell_pressure(self) -> None:
        pressed = len(self._held) > MAX_HELD
        if pressed != self._pressed:
            self._pressed = pressed
            self._on_pressure(pressed)

    def _watch_writable(self, wanted: bool) -> None:
        if wanted == self._writing:
            return
        self._writing = wanted
        if wanted:
            self._loop.add_writer(self._fd, self._flush)
        else:
            self._loop.remove_writer(self._fd)

    # --- end -----------------------------------------------------------------------------------

    def _finish(self, reason: str | None) -> None:
        if self._fd < 0:
            return
        self.close()
        self._on_end(reason)

    def close(self) -> None:
        """Close the channel without telling anybody."""
        if self._fd < 0:
            return
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._watch_writable(False)
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._reader.close()
