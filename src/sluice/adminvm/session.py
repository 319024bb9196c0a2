"""A local client's session on a daemon socket, without I/O (docs/spec/wire-protocol.md 6.4, 6.5).

Theory. A session carries exactly one request::

    HELLO --good HELLO--> COMMAND --one request--> RUNNING --anything--> (closed)

The daemon greets first. Every error closes the session without a word; ``RemoteError`` says why,
for our log. RUNNING means that the request was taken: from then on the session only serves to tell
the client, by end-of-file, that the connection it asked for has ended.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from sluice.errors import RemoteError
from sluice.wire import messages as wire


class State(enum.Enum):
    """Where a session stands."""

    HELLO = "hello"  # ours is sent, the client's is awaited
    COMMAND = "command"
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class LocalRequest:
    """What a local client asks for, checked in form (6.5, checks 1 to 5 and 9)."""

    kind: int
    domain: int
    port: int
    text: bytes  # with its final NUL

    def check_port(self) -> None:
        """Refuse a port that no daemon can have handed out. Raises RemoteError (check 9)."""
        if self.port and not wire.FIRST_DATA_PORT <= self.port <= wire.LAST_DATA_PORT:
            raise RemoteError(f"port {self.port} in a request")


class Session:
    """State of one session. ``greeting`` must be sent before anything else."""

    greeting = wire.encode_hello(wire.LOCAL_VERSION)

    def __init__(self) -> None:
        """Begin with the client's HELLO awaited."""
        self.state = State.HELLO
        self._reader = wire.MessageReader(wire.HELLO_ONLY)

    def receive(self, data: bytes) -> LocalRequest | None:
        """Take bytes of the client; return its request once, when it is whole.

        Raises RemoteError where the session must be closed. Bytes that follow a request in the
        same read raise at the next call, or in ``excess``, so that the request is served first.
        """
        if self.state is State.RUNNING:
            raise RemoteError("a local client sent more than one request")
        self._reader.feed(data)
        if self.state is State.HELLO:
            message = self._reader.next()
            if message is None:
                return None
            wire.negotiate(
                wire.decode_hello(*message), own=wire.LOCAL_VERSION, minimum=wire.LOCAL_MINIMUM
            )
            self.state = State.COMMAND
            self._reader.lengths = wire.FROM_LOCAL_CLIENT
        message = self._reader.next()
        if message is None:
            return None
        domain, port, text = wire.decode_exec(message[1])
        if text[-1:] != b"\0":
            raise RemoteError("a local client's text does not end with NUL")
        self.state = State.RUNNING
        return LocalRequest(message[0], domain, port, text)

    @property
    def excess(self) -> bool:
        """Whether the client sent something after its request."""
        return self.state is State.RUNNING and self._reader.pending > 0
