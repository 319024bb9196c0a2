"""The receiving half of a data channel: messages out of the channel, payload into local streams.

One message is taken at a time and none while something received waits for IN or for stderr: that
is the whole of the back-pressure. Small messages are read many at once, and payloads for IN that
follow each other are written in one go; large payloads that nobody looks at are spliced from the
channel into IN (``framing`` tells when). docs/spec/wire-protocol.md 10.3.
"""

from __future__ import annotations

import os

from sluice.errors import RemoteError
from sluice.flow.callstate import TO_HELLO, TO_IN, TO_STATUS, TO_STDERR
from sluice.flow.framing import BULK, Framer
from sluice.flow.spare import CANNOT
from sluice.wire.messages import DATA_STDIN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.flow.callstate import CallState
    from sluice.flow.endpoint import Endpoint
    from sluice.flow.inlet import Inlet

# Reads in one go before the loop sees to its other descriptors.
SHARE = 16

# Pieces written together. A buffer full of messages of one byte would else become 7,000 objects.
_BATCH = 512


class Receiver:
    """Takes messages from ``end`` by the rules of ``state``.

    ``attached`` says that the local streams are there; before that only HELLO is taken. ``inlet``
    is IN, if there is one. The callbacks get the rest: ``on_hello(body)``, ``on_status()`` when the
    exit code has been put into ``state``, ``on_stderr(payload)``, ``on_warning(text)`` (once).
    """

    def __init__(
        self,
        state: CallState,
        end: Endpoint,
        *,
        on_hello: Callable[[bytes], None],
        on_status: Callable[[], None],
        on_stderr: Callable[[memoryview], None],
        on_warning: Callable[[str], None] | None,
    ) -> None:
        """Begin before the handshake."""
        self.end = end
        self.attached = False
        self.inlet: Inlet | None = None
        self.stderr: Inlet | None = None
        # Payload bytes for IN.
        self.received = 0
        self.spliced = 0
        self._state = state
        self._framer = Framer(state.check)
        self._on_hello = on_hello
        self._on_status = on_status
        self._on_stderr = on_stderr
        self._on_warning = on_warning
        self._warned: list[str] = []
        # The first bytes of a HELLO or of an exit code that came in pieces.
        self._body = b""

    def may_take(self) -> bool:
        """Tell whether nothing received waits, and there is somebody to take more."""
        if self.inlet is not None and self.inlet.holding:
            return False
        if self.stderr is not None and self.stderr.holding:
            return False
        return self.attached or not self._state.opened

    def may_read(self) -> bool:
        """Tell whether bytes may be taken from the channel now."""
        if self._state.lost or (self.inlet is not None and self.inlet.full):
            return False
        return self.may_take()

    def run(self) -> None:
        """Take messages until the channel is empty, something is full, or the share is used.

        Raises RemoteError where the other side breaks the protocol. Sets ``state.lost`` at the end
        of the channel.
        """
        framer = self._framer
        self._take_pieces()
        for _ in range(SHARE):
            if not self.may_read():
                return
            if framer.left >= BULK and self._may_splice():
                if not self._splice():
                    return
                continue
            try:
                count = os.readv(self.end.fd, [framer.room()])
            except BlockingIOError:
                return
            except OSError:
                # A reset is an end-of-file.
                count = 0
            if not count:
                self._ended()
                return
            framer.filled(count)
            self._take_pieces()

    def _take_pieces(self) -> None:
        """Deliver what was read, in order; payloads for IN that follow each other in one write."""
        framer, state = self._framer, self._state
        batch: list[memoryview] = []
        while self.may_take():
            piece = framer.next()
            if piece is None:
                break
            kind, payload, last = piece
            route = state.route(kind)
            if route == TO_IN and payload:
                if (kind == DATA_STDIN) is state.caller:
                    self.warn("payload of the wrong direction was taken as if it were right")
                batch.append(payload)
                if len(batch) == _BATCH:
                    self._deliver(batch)
                    batch = []
                continue
            if batch:
                self._deliver(batch)
                batch = []
            self._take_other(route, payload, last)
        if batch:
            self._deliver(batch)

    def _deliver(self, batch: list[memoryview]) -> None:
        """Give payload to IN; without one it is discarded."""
        self.received += sum(map(len, batch))
        if self.inlet is not None:
            self.inlet.put(batch)

    def _take_other(self, route: int, payload: memoryview, last: bool) -> None:
        """Take a piece of anything but payload for IN."""
        if route == TO_IN:
            if self.inlet is not None:
                self.inlet.end_of_file()
        elif route == TO_STDERR:
            if payload:
                self._on_stderr(payload)
        elif route in (TO_STATUS, TO_HELLO):
            self._body += bytes(payload[: 4 - len(self._body)])
            if last:
                body, self._body = self._body, b""
                if route == TO_HELLO:
                    self._on_hello(body)
                else:
                    self._state.exit_code(body)
                    self._on_status()
        else:
            self.warn("a message that only a caller takes was ignored")

    def _may_splice(self) -> bool:
        """Tell whether the kernel may move the payload under way into IN."""
        inlet, state = self.inlet, self._state
        return (
            inlet is not None
            and state.opened
            and state.route(self._framer.kind) == TO_IN
            and inlet.may_splice(self.end)
        )

    def _splice(self) -> bool:
        """Move payload into IN; return False where one of the two must be awaited."""
        assert self.inlet is not None
        count = self.inlet.splice(self.end, self._framer.left)
        if count > 0:
            self.received += count
            self.spliced += count
            self._framer.skip(count)
        elif not count:
            self._ended()
        return count > 0 or count == CANNOT

    def _ended(self) -> None:
        """The other side has closed, and all it sent before is delivered (section 10.8)."""
        if self._framer.inside:
            raise RemoteError("the channel ended inside a message")
        if not self._state.opened:
            raise RemoteError("the channel ended before the handshake")
        self._state.lost = True

    def warn(self, text: str) -> None:
        """Tell of something odd, each once a call: the other side chooses how often it happens."""
        if self._on_warning is not None and text not in self._warned:
            self._warned.append(text)
            self._on_warning(text)

    def rest(self) -> None:
        """Give the buffer back while nothing needs it."""
        if self.may_take():
            self._framer.rest()
