"""The agent's end of a control channel: messages in, events out; requests in, messages out.

Theory. The channel has two states, *greeting* (nothing but HELLO is legal) and *open* (HELLO is
not legal any more). The AdminVM is trusted, so everything unexpected means that the stream is out
of step and is raised as RemoteError: the agent then ends. What a local client of the domain asks
for is passed on unread but for its identifier, which becomes one of ours; the AdminVM validates
it. There is no I/O here. docs/spec/wire-protocol.md 4.3, 7.4, 7.5.
"""

from __future__ import annotations

from sluice.errors import RemoteError
from sluice.wire.messages import (
    EXEC_CMDLINE,
    FROM_DAEMON,
    HELLO_ONLY,
    IDENT_SIZE,
    JUST_EXEC,
    SERVICE_CONNECT,
    c_string,
    decode_exec,
    decode_hello,
    downgrade_trigger4,
    encode_hello,
    encode_terminated,
    negotiate,
    pad,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# The messages that carry the two descriptors of their receiver over `passed` (section 20).
CARRYING = (EXEC_CMDLINE, JUST_EXEC, SERVICE_CONNECT)

_IDENT_AT = 128


class Opened:
    """The handshake is complete; ``version`` is the effective one."""

    __slots__ = ("version",)

    def __init__(self, version: int) -> None:
        """Keep the version."""
        self.version = version


class Execute:
    """Run ``text`` (``kind``: EXEC_CMDLINE or JUST_EXEC) for the data channel named (7.4.1)."""

    __slots__ = ("domain", "kind", "port", "text")

    def __init__(self, kind: int, domain: int, port: int, text: bytes) -> None:
        """Keep the fields; ``text`` ends before its first NUL."""
        self.kind = kind
        self.domain = domain
        self.port = port
        self.text = text


class Connect:
    """A request of ours was allowed: ``client`` is who made it, or None where unknown (7.4.2)."""

    __slots__ = ("client", "domain", "port")

    def __init__(self, client: Any, domain: int, port: int) -> None:
        """Keep the fields."""
        self.client = client
        self.domain = domain
        self.port = port


class Refuse:
    """A request of ours was refused: ``client`` is who made it, or None where unknown (7.4.3)."""

    __slots__ = ("client",)

    def __init__(self, client: Any) -> None:
        """Keep the client."""
        self.client = client


class AgentLink:
    """The state of one control channel, from the connection to its end."""

    def __init__(self) -> None:
        """Begin in the greeting; send ``greeting()`` first."""
        self.version = 0
        self.lengths = HELLO_ONLY
        self._waiting: dict[bytes, Any] = {}
        self._next_ident = 0

    def greeting(self) -> bytes:
        """Return the HELLO that the agent sends without waiting (4.3)."""
        return encode_hello()

    def receive(self, kind: int, body: bytes) -> Opened | Execute | Connect | Refuse:
        """Turn a message whose length was checked against ``lengths`` into what it means.

        Raises RemoteError where the channel must be given up.
        """
        if not self.version:
            self.version = negotiate(decode_hello(kind, body))
            self.lengths = FROM_DAEMON
            return Opened(self.version)
        if kind in CARRYING:
            domain, port, text = decode_exec(body)
            # The last byte counts as a NUL whatever it is (7.4).
            text = c_string(text[:-1])
            if kind == SERVICE_CONNECT:
                return Connect(self._waiting.pop(text, None), domain, port)
            return Execute(kind, domain, port, text)
        if kind not in FROM_DAEMON:
            raise RemoteError(f"message of type {kind:#x} from the daemon")
        return Refuse(self._waiting.pop(c_string(body), None))

    def trigger(self, client: Any, untrusted_body: bytes) -> bytes | None:
        """Return the message that asks for what a local client wants (7.5).

        The client is remembered under a fresh identifier until the answer comes. None means that
        the effective version cannot express the call: the client is to be refused.
        """
        ident = self._fresh_ident()
        body = (
            untrusted_body[:_IDENT_AT]
            + pad(ident, IDENT_SIZE)
            + untrusted_body[_IDENT_AT + IDENT_SIZE :]
        )
        message = downgrade_trigger4(body, self.version)
        if message is not None:
            self._waiting[ident] = client
        return message

    def _fresh_ident(self) -> bytes:
        """Return ``SOCKET<n>`` with a number that no outstanding request has (7.5.2)."""
        while True:
            self._next_ident = self._next_ident % 0x7FFFFFFF + 1
            ident = b"SOCKET%d" % self._next_ident
            if ident not in self._waiting:
                return ident

    def abandon(self) -> list[Any]:
        """Return the clients that still wait and forget them: the channel is gone (7.7)."""
        clients = list(self._waiting.values())
        self._waiting.clear()
        return clients

    def terminated(self, domain: int, port: int) -> bytes:
        """Return the message that reports the end of a data channel (7.6)."""
        return encode_terminated(domain, port)
