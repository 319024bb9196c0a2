"""Asking a daemon over its local socket, blocking, for the small programs (6.4, 6.5).

Every wait has a deadline. The reply may bring the client's two ends of the data channel with it
(transport ``passed``, docs/spec/wire-protocol.md 20); without them the client makes a vchan server.
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import time

from sluice.errors import LocalError, RemoteError
from sluice.flow.connecting import connect_within
from sluice.vchan.passed import recv_with_fds
from sluice.wire import messages as wire

PATIENCE = 10.0  # seconds for the handshake and for the reply
MAX_PATH = 107


class NotRunning(LocalError):
    """Nobody listens on the socket: the domain does not run."""


class Reply:
    """What a daemon answered: where to connect, or the two descriptors themselves."""

    __slots__ = ("domain", "fds", "port")

    def __init__(self, domain: int, port: int, fds: list[int]) -> None:
        """Keep them; ``fds`` is empty or (read end, write end)."""
        self.domain = domain
        self.port = port
        self.fds = fds


def connect_blocking(path: str, seconds: float) -> _socket.socket:
    """Connect to the Unix socket ``path``, waiting ``seconds`` at most to be queued there.

    Raises NotRunning where nobody listens, else LocalError; the texts begin with the path.
    """
    if len(os.fsencode(path)) > MAX_PATH:
        raise LocalError(f"the path of a socket is longer than {MAX_PATH} bytes: {path}")
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connect_within(sock, os.fsencode(path), seconds)
    except OSError as error:
        sock.close()
        if error.errno == errno.EAGAIN:
            raise LocalError(f"{path}: accepts no connection") from error
        kind = NotRunning if error.errno in (errno.ENOENT, errno.ECONNREFUSED) else LocalError
        raise kind(f"{path}: {error.strerror}") from error
    return sock


class DaemonConnection:
    """A local client's session with a daemon; it carries one request."""

    def __init__(self, directory: str, name: str) -> None:
        """Connect to ``qrexec.NAME`` and shake hands.

        Raises NotRunning, LocalError, or RemoteError where the daemon breaks the protocol.
        """
        self._name = name
        try:
            self._sock = connect_blocking(f"{directory}/qrexec.{name}", PATIENCE)
        except NotRunning as error:
            text = f"{name}: does not run, or not with a daemon here: {error}"
            raise NotRunning(text) from error
        hello, _ = self._read(12)
        version = wire.decode_hello(wire.HEADER.unpack(hello[:8])[0], hello[8:])
        if wire.HEADER.unpack(hello[:8])[1] != 4:
            raise RemoteError(f"{name}: its daemon's HELLO has a wrong length")
        wire.negotiate(version, own=wire.LOCAL_VERSION, minimum=wire.LOCAL_MINIMUM)
        self._send(wire.encode_hello(wire.LOCAL_VERSION))

    def send(self, kind: int, domain: int, port: int, text: bytes) -> None:
        """Send the request; ``text`` with its NUL."""
        if 8 + len(text) > wire.MAX_LOCAL_BODY:
            raise LocalError(f"a request of {len(text)} bytes is too long")
        self._send(wire.encode_exec(kind, domain, port, text))

    def reply(self, kind: int) -> Reply:
        """Read the reply to a request of type ``kind`` without a port. Raises RemoteError."""
        data, fds = self._read(16)
        got, size = wire.HEADER.unpack(data[:8])
        if (got, size) != (kind, 8) or len(fds) not in (0, 2):
            for fd in fds:
                os.close(fd)
            what = f"{wire.type_name(got)} of {size} bytes"
            raise RemoteError(f"{self._name}: its daemon replied {what}")
        domain, port, _ = wire.decode_exec(data[8:])
        return Reply(domain, port, fds)

    def wait_for_end(self) -> None:
        """Wait until the daemon closes the session: the connection has ended."""
        while True:
            try:
                if not self._sock.recv(4096):
                    return
            except OSError as error:
                if error.errno == errno.EINTR:
                    continue
                return

    def close(self) -> None:
        """End the session."""
        self._sock.close()

    def _send(self, data: bytes) -> None:
        self._sock.settimeout(PATIENCE)
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise self._closed() from error
        finally:
            self._sock.settimeout(None)

    def _closed(self) -> RemoteError:
        return RemoteError(f"{self._name}: its daemon closed the connection; its log says why")

    def _read(self, size: int) -> tuple[bytes, list[int]]:
        """Read exactly ``size`` bytes, and what descriptors come with them."""
        data, fds = b"", []
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        end = time.monotonic() + PATIENCE
        while len(data) < size:
            if not poll.poll(max(0, (end - time.monotonic()) * 1000)):
                raise RemoteError(f"{self._name}: its daemon does not answer")
            try:
                piece, more = recv_with_fds(self._sock.fileno(), size - len(data))
            except BlockingIOError:
                continue
            except OSError:
                piece, more = b"", []
            fds += more
            if not piece:
                for fd in fds:
                    os.close(fd)
                raise self._closed()
            data += piece
        return data, fds
