"""Messages of qrexec: their header, their bodies, and putting them together again.

Theory. Every channel but the sockets without HELLO carries the same records: a header of two
little-endian u32 (type, length of the body) and the body. Streams keep no record boundaries, so a
receiver feeds what arrives into a ``MessageReader`` and takes whole messages out. What types and
lengths a channel allows differs, and must be checked *before* a body is collected, or a peer could
make us hold 4 GiB: each channel gives the reader its table of allowed lengths.

Nothing here does I/O and nothing here trusts its input. The module imports ``struct`` only,
because the one-shot clients load it. docs/spec/wire-protocol.md 2 to 4.
"""

from __future__ import annotations

import struct

from sluice.errors import LocalError, RemoteError

# Message types (section 3.2).
DATA_STDIN = 0x190
DATA_STDOUT = 0x191
DATA_STDERR = 0x192
DATA_EXIT_CODE = 0x193
EXEC_CMDLINE = 0x200
JUST_EXEC = 0x201
SERVICE_CONNECT = 0x202
SERVICE_REFUSED = 0x203
TRIGGER_SERVICE = 0x210
CONNECTION_TERMINATED = 0x211
TRIGGER_SERVICE3 = 0x212
TRIGGER_SERVICE4 = 0x213
HELLO = 0x300

# Versions (sections 2.1 and 4).
PROTOCOL_VERSION = 4
PROTOCOL_MINIMUM = 2
LOCAL_VERSION = 3
LOCAL_MINIMUM = 3

# Ports (section 2.1).
CONTROL_PORT = 512
FIRST_DATA_PORT = 513
DATA_PORTS = 256
LAST_DATA_PORT = FIRST_DATA_PORT + DATA_PORTS - 1

# Sizes, in bytes (sections 2.1 and 3.3).
MAX_DATA_V2 = 4096
MAX_DATA = 65536
MAX_SERVICE_FIELD = 65000
MAX_LOCAL_BODY = 65535
MAX_COMMAND = 65535
IDENT_SIZE = 32
MAX_IDENT = 31
DOMAIN_FIELD = 64
NAME_MAX = 255

# Exit statuses with a meaning of their own (section 2.2).
EXIT_LOCAL_FAILURE = 1
EXIT_USAGE = 2
EXIT_FAILURE = 125
EXIT_REFUSED = 126
EXIT_NOT_FOUND = 127
EXIT_CONNECT_FAILED = 137
EXIT_LOST = 255

HEADER = struct.Struct("<II")
U32 = struct.Struct("<I")
I32 = struct.Struct("<i")
EXEC_PARAMS = struct.Struct("<II")
FORK_REQUEST = struct.Struct("<iiiI")

TYPE_NAMES = {
    DATA_STDIN: "DATA_STDIN",
    DATA_STDOUT: "DATA_STDOUT",
    DATA_STDERR: "DATA_STDERR",
    DATA_EXIT_CODE: "DATA_EXIT_CODE",
    EXEC_CMDLINE: "EXEC_CMDLINE",
    JUST_EXEC: "JUST_EXEC",
    SERVICE_CONNECT: "SERVICE_CONNECT",
    SERVICE_REFUSED: "SERVICE_REFUSED",
    TRIGGER_SERVICE: "TRIGGER_SERVICE",
    CONNECTION_TERMINATED: "CONNECTION_TERMINATED",
    TRIGGER_SERVICE3: "TRIGGER_SERVICE3",
    TRIGGER_SERVICE4: "TRIGGER_SERVICE4",
    HELLO: "HELLO",
}


def type_name(kind: int) -> str:
    """Name a message type for a log line; unknown ones as hexadecimal."""
    return TYPE_NAMES.get(kind) or f"{kind:#x}"


# --- encoding ---------------------------------------------------------------------------------


def encode(kind: int, body: bytes = b"") -> bytes:
    """Return header and body as one string of bytes (section 3.1)."""
    return HEADER.pack(kind, len(body)) + body


def encode_hello(version: int = PROTOCOL_VERSION) -> bytes:
    """Return a HELLO message offering ``version`` (section 3.3)."""
    return HEADER.pack(HELLO, 4) + U32.pack(version)


def encode_exec(kind: int, domain: int, port: int, text: bytes = b"") -> bytes:
    """Return a message with exec_params; ``text`` must carry its final NUL already."""
    return HEADER.pack(kind, 8 + len(text)) + EXEC_PARAMS.pack(domain, port) + text


def pad(value: bytes, size: int) -> bytes:
    """Fill ``value`` with NULs to ``size`` bytes. Raises LocalError where it does not fit."""
    if len(value) > size:
        raise LocalError(f"a field of {size} bytes cannot hold {len(value)}")
    return value.ljust(size, b"\0")


def encode_refused(ident: bytes) -> bytes:
    """Return SERVICE_REFUSED for the 32-byte (or shorter, then padded) ``ident``."""
    return encode(SERVICE_REFUSED, pad(ident, IDENT_SIZE))


def encode_terminated(domain: int, port: int) -> bytes:
    """Return CONNECTION_TERMINATED for a data channel (section 7.6)."""
    return encode_exec(CONNECTION_TERMINATED, domain, port)


def encode_exit_code(status: int) -> bytes:
    """Return DATA_EXIT_CODE with the i32 ``status`` (section 10.7)."""
    return HEADER.pack(DATA_EXIT_CODE, 4) + I32.pack(status)


def encode_trigger4(source: bytes, target: bytes, ident: bytes, service: bytes) -> bytes:
    """Return TRIGGER_SERVICE4; ``service`` without its NUL. Domain fields are cut to 63 bytes."""
    if len(service) + 1 > MAX_SERVICE_FIELD:
        raise LocalError(f"the service name is longer than {MAX_SERVICE_FIELD - 1} bytes")
    body = (
        pad(source[: DOMAIN_FIELD - 1], DOMAIN_FIELD)
        + pad(target[: DOMAIN_FIELD - 1], DOMAIN_FIELD)
        + pad(ident, IDENT_SIZE)
        + service
        + b"\0"
    )
    return encode(TRIGGER_SERVICE4, body)


def downgrade_trigger4(body: bytes, version: int) -> bytes | None:
    """Turn a TRIGGER_SERVICE4 body into the message that ``version`` knows (section 7.5.3).

    Returns the whole message, or None where version 2 cannot express the call.
    """
    if version >= 4:
        return encode(TRIGGER_SERVICE4, body)
    if version == 3:
        return encode(TRIGGER_SERVICE3, body[DOMAIN_FIELD:])
    target = c_string(body[64:128])
    service = c_string(body[160:])
    if len(service) > 63 or len(target) > 31:
        return None
    return encode(TRIGGER_SERVICE, pad(service, 64) + pad(target, 32) + body[128:160])


# --- decoding ---------------------------------------------------------------------------------


def c_string(field: bytes) -> bytes:
    """Return the bytes before the first NUL, or all of them."""
    end = field.find(b"\0")
    return field if end < 0 else field[:end]


def decode_exec(body: bytes) -> tuple[int, int, bytes]:
    """Split exec_params into domain, port and the raw text. Raises RemoteError when too short."""
    if len(body) < 8:
        raise RemoteError(f"exec_params of {len(body)} bytes")
    domain, port = EXEC_PARAMS.unpack_from(body)
    return domain, port, body[8:]


def decode_exit_code(body: bytes) -> int:
    """Return the i32 status; fewer than four bytes mean 255 (section 10.7)."""
    if len(body) < 4:
        return EXIT_LOST
    status: int = I32.unpack_from(body)[0]
    return status


def negotiate(
    received: int, *, own: int = PROTOCOL_VERSION, minimum: int = PROTOCOL_MINIMUM
) -> int:
    """Return the effective version (section 4.2). Raises RemoteError below ``minimum``."""
    effective = min(own, received & 0xFFFFFFFF)
    if effective < minimum:
        raise RemoteError(f"version {received} of the peer is older than {minimum}")
    return effective


def decode_hello(kind: int, body: bytes) -> int:
    """Return the version that a HELLO offers. Raises RemoteError for any other message."""
    if kind != HELLO or len(body) != 4:
        raise RemoteError(f"{type_name(kind)} of {len(body)} bytes instead of HELLO")
    version: int = U32.unpack(body)[0]
    return version


# --- allowed lengths, by channel ---------------------------------------------------------------

# Each table: type -> (least, most) bytes of the body. A type that is absent is never accepted.
Lengths = dict[int, tuple[int, int]]

HELLO_ONLY: Lengths = {HELLO: (4, 4)}

FROM_CLIENT_VM: Lengths = {TRIGGER_SERVICE4: (161, 160 + MAX_SERVICE_FIELD)}

FROM_LOCAL_CLIENT: Lengths = {
    EXEC_CMDLINE: (9, MAX_LOCAL_BODY),
    JUST_EXEC: (9, MAX_LOCAL_BODY),
    SERVICE_CONNECT: (9, MAX_LOCAL_BODY),
}

# What a daemon may send: the text is a command (65535 at most), grown by a user substitution.
FROM_DAEMON: Lengths = {
    EXEC_CMDLINE: (9, 1 << 20),
    JUST_EXEC: (9, 1 << 20),
    SERVICE_CONNECT: (9, 1 << 20),
    SERVICE_REFUSED: (IDENT_SIZE, IDENT_SIZE),
}


def from_agent(version: int) -> Lengths:
    """Return what an agent may send under the effective ``version`` (section 6.7)."""
    table: Lengths = {CONNECTION_TERMINATED: (8, 8)}
    if version == 2:
        table[TRIGGER_SERVICE] = (128, 128)
    if version >= 3:
        table[TRIGGER_SERVICE3] = (97, 96 + MAX_SERVICE_FIELD)
    if version >= 4:
        table[TRIGGER_SERVICE4] = (161, 160 + MAX_SERVICE_FIELD)
    return table


class MessageReader:
    """Puts messages together from arbitrary fragments (section 3.1).

    ``lengths`` says what may come next and can be replaced between messages (after a HELLO, say).
    A header that it does not allow raises RemoteError at once; the reader is of no use afterwards.
    """

    __slots__ = ("_buffer", "_start", "lengths")

    def __init__(self, lengths: Lengths) -> None:
        """Begin empty, allowing what ``lengths`` lists."""
        self.lengths = lengths
        self._buffer = bytearray()
        self._start = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes as they arrived."""
        if self._start:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def next(self) -> tuple[int, bytes] | None:
        """Return the next whole message as (type, body), or None until more is fed."""
        buffer, start = self._buffer, self._start
        if len(buffer) - start < 8:
            return None
        kind, size = HEADER.unpack_from(buffer, start)
        bounds = self.lengths.get(kind)
        if bounds is None:
            raise RemoteError(f"message of type {type_name(kind)} is not allowed here")
        if not bounds[0] <= size <= bounds[1]:
            raise RemoteError(f"{type_name(kind)} with a body of {size} bytes")
        end = start + 8 + size
        if len(buffer) < end:
            return None
        self._start = end
        return kind, bytes(buffer[start + 8 : end])

    @property
    def pending(self) -> int:
        """Bytes fed but not yet taken as a message; non-zero at the end means truncated."""
        return len(self._buffer) - self._start

    @property
    def wanted(self) -> int:
        """Bytes that the message under way lacks: of its header first, then of its body.

        For a receiver that must not read past the end of a message. Call ``next`` before, which
        refuses a header that is not allowed.
        """
        have = len(self._buffer) - self._start
        if have < 8:
            return 8 - have
        size: int = HEADER.unpack_from(self._buffer, self._start)[1]
        return 8 + size - have
