"""What a command line of the protocol asks for: a service call or a shell command.

Theory. A daemon tells an agent what to run as one text: ``user:rest``, where the rest is either
``QUBESRPC descriptor source...`` (a service call) or a command for a shell; dom0's own services get
the same text without the user part. The text is parsed once, here, into a ``Command``; everything
behind it (lookup, configuration, environment, start) works on its fields.

The sender of a command line is the AdminVM, which is trusted, and the names in it were sanitised
there. Parsing is strict all the same. docs/spec/wire-protocol.md 9.1.
"""

from __future__ import annotations

from sluice.errors import LocalError
from sluice.wire.messages import EXIT_FAILURE, NAME_MAX, c_string

MARKER = b"QUBESRPC"
NOGUI = b"nogui:"
# In front of a shell command, which any shell takes for nothing (9.1.1).
HANGUP = b": hangup; "
MAX_DESCRIPTOR = 65000


class ServiceError(LocalError):
    """A service that cannot be started; ``code`` is the exit status the caller gets (2.2)."""

    def __init__(self, message: str, code: int = EXIT_FAILURE) -> None:
        """Take a message for the operator's log and 125 (a failure) or 127 (no such service)."""
        super().__init__(message)
        self.code = code


class Command:
    """One parsed command line (9.1). All fields are bytes; see ``parse_command``."""

    __slots__ = (
        "argument",
        "call_text",
        "descriptor",
        "hangup",
        "is_service",
        "lookup",
        "nogui",
        "service",
        "shell",
        "source",
        "text",
        "user",
    )

    def __init__(self, user: bytes, text: bytes, nogui: bool) -> None:
        """Begin with the user part, the text behind it, and whether that began with ``nogui:``.

        ``shell`` is the command for a shell, empty for a service call, and ``hangup`` whether it
        is to end when nobody waits for it any more (9.1.1). For a service call
        ``call_text`` is all that follows ``QUBESRPC ``, ``descriptor`` its first word as received,
        ``lookup`` the descriptor with a ``+`` in any case, ``argument`` None where there is no
        ``+``.
        """
        self.user = user
        self.text = text
        self.nogui = nogui
        self.is_service = False
        self.shell = b""
        self.hangup = False
        self.call_text = b""
        self.descriptor = b""
        self.lookup = b""
        self.service = b""
        self.argument: bytes | None = None
        self.source = b""

    def tokens(self) -> list[bytes]:
        """Split the call text for an executable service: 2 or 4 words, else ServiceError (9.1)."""
        words = [word for word in self.call_text.split(b" ") if word]
        if len(words) not in (2, 4):
            raise ServiceError(f"a service call of {len(words)} words instead of 2 or 4")
        return words


def with_hangup(text: bytes) -> bytes:
    """Have a command (without its user part) end when nobody waits for it any more (9.1.1).

    A service call stays as it is.
    """
    head = NOGUI if text.startswith(NOGUI) else b""
    body = text[len(head) :]
    return text if body.startswith(MARKER) else head + HANGUP + body


def parse_command(text: bytes, *, with_user: bool) -> Command:
    """Parse a command line up to its first NUL (9.1).

    ``with_user`` says whether it begins with ``user:``, as in a VM. Raises ServiceError with
    code 125 where the text breaks the grammar.
    """
    rest = c_string(text)
    user = b""
    if with_user:
        user, colon, rest = rest.partition(b":")
        if not colon:
            raise ServiceError("a command without the user part")
    nogui = rest.startswith(NOGUI)
    command = Command(user, rest, nogui)
    body = rest[len(NOGUI) :] if nogui else rest
    if not body.startswith(MARKER):
        command.hangup = body.startswith(HANGUP)
        command.shell = body[len(HANGUP) :] if command.hangup else body
        return command
    if body[len(MARKER) : len(MARKER) + 1] != b" ":
        raise ServiceError("QUBESRPC is not followed by a space")
    _parse_call(command, body[len(MARKER) + 1 :])
    return command


def _parse_call(command: Command, call_text: bytes) -> None:
    """Fill the fields of a service call (9.1, steps 5 to 11)."""
    descriptor, space, rest = call_text.partition(b" ")
    if not space:
        raise ServiceError("a service call without a source")
    if not descriptor or len(descriptor) > MAX_DESCRIPTOR:
        raise ServiceError(f"a service descriptor of {len(descriptor)} bytes")
    service, plus, argument = descriptor.partition(b"+")
    if not service or len(service) > NAME_MAX:
        raise ServiceError(f"a service name of {len(service)} bytes")
    source = rest.partition(b" ")[0]
    if not source:
        raise ServiceError("a service call with an empty source")
    command.is_service = True
    command.call_text = call_text
    command.descriptor = descriptor
    command.service = service
    command.argument = argument if plus else None
    command.lookup = descriptor if plus else descriptor + b"+"
    command.source = source
