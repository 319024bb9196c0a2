"""Calls to qubesd, the administration daemon: what is sent and what an answer means.

Only bytes; who carries them is the caller's business (asyncio in the daemon, a blocking socket in
``qrexec-client``). docs/spec/wire-protocol.md 6.9.7.
"""

from __future__ import annotations

import _socket
import os

from sluice.errors import LocalError, RemoteError
from sluice.wire.names import escape

DEFAULT_SOCKET = "/run/qubesd.sock"
SOCKET_VARIABLE = "SLUICE_QUBESD_SOCKET"
MAX_REPLY = 65534
NOT_HALTED = "QubesVMNotHaltedError"


class QubesdError(RemoteError):
    """qubesd answered with an exception; ``exception`` is its name."""

    def __init__(self, exception: str) -> None:
        """Take the name of the exception, escaped."""
        super().__init__(f"qubesd answered {exception}")
        self.exception = exception


def encode_request(method: str, destination: str, argument: str = "", payload: str = "") -> bytes:
    """Return what is sent to call ``method`` on ``destination`` on behalf of dom0."""
    kind = "name"
    if destination.startswith("@"):
        kind, destination = "keyword", destination[1:]
    return f"{method}+{argument} dom0 {kind} {destination}\0{payload}".encode(
        "utf-8", "surrogateescape"
    )


def decode_reply(reply: bytes) -> bytes:
    """Return the content of a successful reply.

    Raises QubesdError for an exception, RemoteError for anything that is no answer.
    """
    if len(reply) < 2 or len(reply) > MAX_REPLY or b"\0" not in reply:
        raise RemoteError(f"a reply of {len(reply)} bytes from qubesd")
    if reply.startswith(b"0\0"):
        return reply[2:]
    if reply.startswith(b"2\0"):
        raise QubesdError(escape(reply[2:].partition(b"\0")[0], 80))
    raise RemoteError("an unintelligible reply from qubesd")


def is_uuid_name(name: str) -> bool:
    """Tell whether ``name`` is ``uuid:`` and 36 characters."""
    return name.startswith("uuid:") and len(name) == 41


def call_blocking(method: str, destination: str, timeout: float = 30.0) -> bytes:
    """Call qubesd and wait for its answer, for the small programs.

    Raises LocalError where it cannot be reached, RemoteError as ``decode_reply`` does.
    """
    from sluice.adminvm.ask import connect_blocking

    sock = connect_blocking(os.environ.get(SOCKET_VARIABLE, DEFAULT_SOCKET), timeout)
    sock.settimeout(timeout)
    reply = b""
    try:
        sock.sendall(encode_request(method, destination))
        sock.shutdown(_socket.SHUT_WR)
        while piece := sock.recv(65536):
            reply += piece
            if len(reply) > MAX_REPLY:
                break
    except OSError as error:
        raise LocalError(f"qubesd cannot be asked: {error}") from error
    finally:
        sock.close()
    return decode_reply(reply)
