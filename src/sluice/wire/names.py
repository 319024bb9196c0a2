"""Names that domains send, and what may be done with them.

Everything a domain sends is ``untrusted`` until a function here has looked at it. There are three
ways out: *sanitise* (replace what is not allowed, as the daemon does with names in a trigger),
*validate* (refuse), and *escape* (make it fit to be shown to a person or written to a log).
docs/spec/wire-protocol.md 6.8, docs/spec/core-stack.md 3.1.
"""

from __future__ import annotations

from sluice.wire.messages import (
    DOMAIN_FIELD,
    IDENT_SIZE,
    TRIGGER_SERVICE,
    TRIGGER_SERVICE3,
    TRIGGER_SERVICE4,
    c_string,
)

SAFE = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."
SERVICE_CHARACTERS = SAFE + b"+"
TARGET_CHARACTERS = SAFE + b"@:"

NIL_UUID = "00000000-0000-0000-0000-000000000000"
DOM0_NAMES = ("dom0", "@adminvm", "uuid:" + NIL_UUID)


def _table(allowed: bytes) -> bytes:
    return bytes(byte if byte in allowed else ord("_") for byte in range(256))


_SERVICE_TABLE = _table(SERVICE_CHARACTERS)
_TARGET_TABLE = _table(TARGET_CHARACTERS)
# What a terminal may be sent of another domain's output (section 10.9).
TERMINAL_TABLE = _table(bytes(range(0x20, 0x7F)) + b"\x07\x08\x09\x0a\x0d")


def sanitise_service(untrusted_name: bytes) -> str:
    """Replace every byte that a service name may not have by ``_`` (section 6.8 step 7)."""
    return untrusted_name.translate(_SERVICE_TABLE).decode("ascii")


def sanitise_domain(untrusted_field: bytes) -> str:
    """Cut a domain field at its first NUL or last byte and replace bad bytes (steps 1 and 2)."""
    return c_string(untrusted_field[:-1]).translate(_TARGET_TABLE).decode("ascii")


def is_valid_ident(untrusted_ident: bytes) -> bool:
    """Tell whether 32 bytes are a legal request identifier (section 6.8 step 3)."""
    text = c_string(untrusted_ident)
    if len(untrusted_ident) != IDENT_SIZE or len(text) == IDENT_SIZE:
        return False
    return not text.translate(None, SAFE + b" ") and not untrusted_ident.rstrip(b"\0")[len(text) :]


def is_valid_domain_name(name: str) -> bool:
    """Tell whether ``name`` can name a domain: a letter, then letters, digits, ``_-.``; 31 at most.

    docs/spec/core-stack.md 3.1. The reserved names are the registry's business.
    """
    raw = name.encode("utf-8", "surrogateescape")
    return 0 < len(raw) <= 31 and not raw.translate(None, SAFE) and raw[:1].isalpha()


class Trigger:
    """A call that a domain asked for, validated and sanitised (section 6.8).

    ``source`` is None where the message has no such field. ``ident`` is the field as received.
    """

    __slots__ = ("ident", "service", "source", "target")

    def __init__(self, source: str | None, target: str, ident: bytes, service: str) -> None:
        """Keep the four fields; all but ``ident`` are text."""
        self.source = source
        self.target = target
        self.ident = ident
        self.service = service


class BadTrigger(Exception):
    """A trigger that must be answered with SERVICE_REFUSED for ``ident``, exactly as received."""

    def __init__(self, reason: str, ident: bytes) -> None:
        """Take a reason that is safe to log and the 32 raw bytes of the identifier."""
        super().__init__(reason)
        self.ident = ident


def parse_trigger(kind: int, untrusted_body: bytes) -> Trigger:
    """Validate and sanitise the body of a trigger whose length was already checked.

    Implements section 6.8. Raises BadTrigger where the call must be refused without asking policy.
    """
    source: str | None = None
    if kind == TRIGGER_SERVICE:
        untrusted_service = c_string(untrusted_body[0:63])
        target = sanitise_domain(untrusted_body[64:96])
        ident = untrusted_body[96:128]
    elif kind in (TRIGGER_SERVICE3, TRIGGER_SERVICE4):
        at = 0
        if kind == TRIGGER_SERVICE4:
            source = sanitise_domain(untrusted_body[:DOMAIN_FIELD])
            at = DOMAIN_FIELD
        target = sanitise_domain(untrusted_body[at : at + DOMAIN_FIELD])
        ident = untrusted_body[at + DOMAIN_FIELD : at + DOMAIN_FIELD + IDENT_SIZE]
        field = untrusted_body[at + DOMAIN_FIELD + IDENT_SIZE :]
        if field[-1:] != b"\0":
            raise BadTrigger("service name without final NUL", ident)
        untrusted_service = field[:-1]
        if b"\0" in untrusted_service:
            raise BadTrigger("service name with an inner NUL", ident)
    else:
        raise ValueError(f"not a trigger: {kind:#x}")
    if not is_valid_ident(ident):
        raise BadTrigger("illegal request identifier", ident)
    if not untrusted_service or untrusted_service[:1] == b"+":
        raise BadTrigger("empty service name", ident)
    return Trigger(source, target, ident, sanitise_service(untrusted_service))


def escape(untrusted: bytes | str, limit: int = 200) -> str:
    """Make anything fit for a log or a terminal: printable ASCII, at most ``limit`` characters.

    Control characters, escapes and bytes that are not ASCII become ``\\xNN`` or ``\\uNNNN``.
    """
    if isinstance(untrusted, bytes):
        text = untrusted[: limit + 1].decode("ascii", "backslashreplace")
    else:
        text = untrusted[: limit + 1].encode("ascii", "backslashreplace").decode("ascii")
    shown = "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
