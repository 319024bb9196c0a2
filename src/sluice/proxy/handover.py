"""What launcher and server say to each other (docs/spec/proxy.md 2).

One connection of the kind SOCK_SEQPACKET a call, so that a message is there whole or not at all::

    launcher                                          server
    "sluice1" SOURCE NUL ARGUMENT + stdin, stdout  -->
                                                   <--  "T"         taken, or refused soon
                                                   <--  "E" CODE    the call is over

Either one's end of the connection closing earlier means that it is gone: the server then ends the
call, the launcher exits with 125.
"""

from __future__ import annotations

import _socket
import os
import struct

from sluice.errors import RemoteError

MAGIC = b"sluice1"
TAKEN = b"T"
# A source's name, an argument at its bound, and a byte more to see that one is over it.
MAX_REQUEST = len(MAGIC) + 256 + 1 + 65536 + 1
_FDS = "2i"


def encode_request(source: str, argument: str) -> bytes:
    """Return the launcher's message. The server judges both parts."""
    return (
        MAGIC
        + source.encode("utf-8", "surrogateescape")[:256]
        + b"\0"
        + argument.encode("utf-8", "surrogateescape")[:65537]
    )


def decode_request(untrusted_message: bytes) -> tuple[str, str]:
    """Return source and argument, both untrusted. Raises RemoteError for anything else."""
    if not untrusted_message.startswith(MAGIC):
        raise RemoteError("a launcher of another version")
    source, nul, argument = untrusted_message[len(MAGIC) :].partition(b"\0")
    if not nul:
        raise RemoteError("a launcher's message without source")
    return source.decode("utf-8", "surrogateescape"), argument.decode("utf-8", "surrogateescape")


def send_request(sock: _socket.socket, message: bytes, in_fd: int, out_fd: int) -> None:
    """Send the message with the call's two descriptors. Raises OSError."""
    rights = struct.pack(_FDS, in_fd, out_fd)
    sock.sendmsg([message], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])


def receive_request(sock: _socket.socket) -> tuple[bytes, list[int]]:
    """Return a message and the descriptors that came with it, close-on-exec, never waiting.

    Raises BlockingIOError where there is none yet, RemoteError where it is not as it must be:
    cut off, or without exactly two descriptors. Whatever came is closed then.
    """
    space = _socket.CMSG_SPACE(4 * struct.calcsize("i"))
    flags = _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
    data, ancillary, got, _ = sock.recvmsg(MAX_REQUEST, space, flags)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            count = len(payload) // struct.calcsize("i")
            fds += struct.unpack_from(f"{count}i", payload)
    wrong = got & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC) or (data and len(fds) != 2)
    if wrong:
        for fd in fds:
            os.close(fd)
        raise RemoteError("a launcher's message that is cut off or has no two descriptors")
    return data, fds


def encode_end(code: int) -> bytes:
    """Return the server's last message."""
    return b"E" + bytes([code & 255])


def decode_end(message: bytes) -> int | None:
    """Return the exit code of the server's last message; None for anything else."""
    return message[1] if len(message) == 2 and message[:1] == b"E" else None
