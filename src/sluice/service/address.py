"""Addresses that services are reached at: Unix sockets and ``/dev/tcp`` links.

Theory. A link to ``/dev/tcp`` names host and port in its own text, or leaves one or both to the
argument of the call. The argument comes from another domain, so nothing is ever resolved: numeric
addresses only, and a port is decimal digits. docs/spec/wire-protocol.md 9.3.2 and 9.3.3.
"""

from __future__ import annotations

import _socket
import errno
import os

from sluice.service.command import Command, ServiceError
from sluice.service.lookup import SOCKET, TCP_TARGET, Found
from sluice.wire.names import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sluice.flow.reactor import Loop

_DIGITS = b"0123456789"
MAX_UNIX_PATH = 107
# How long a connection to a service may take. The protocol sets no limit (section 15); a target
# that swallows our packets must not hold the call for ever.
CONNECT_TIMEOUT = 60.0
RETRY_DELAY = 0.02


def parse_port(text: bytes) -> int:
    """Read a TCP port: 1 to 5 digits, no leading zero, at most 65535. Raises ServiceError."""
    if 1 <= len(text) <= 5 and not text.strip(_DIGITS) and text[:1] != b"0":
        port = int(text)
        if port <= 65535:
            return port
    raise ServiceError(f"bad TCP port '{escape(text)}'")


def tcp_address(target: bytes, argument: bytes | None) -> tuple[bytes, int]:
    """Work out (numeric host, port) from a link's text and the call's argument (9.3.3).

    Raises ServiceError with code 125 for everything that is not exactly right.
    """
    host, slash, port = target[len(TCP_TARGET) + 1 :].partition(b"/")
    if slash:
        if argument:
            raise ServiceError(f"{escape(target)} takes no argument")
        return host, parse_port(port)
    if not argument:
        raise ServiceError(f"{escape(target)} needs an argument")
    if host:
        return host, parse_port(argument)
    host, plus, port = argument.rpartition(b"+")
    if not plus:
        raise ServiceError("the argument names no port")
    if b"_" in host:
        raise ServiceError("the host in the argument has an underscore")
    return host.replace(b"+", b":"), parse_port(port)


def resolve(found: Found, command: Command) -> tuple[int, Any]:
    """Turn a found socket or TCP service into (address family, address) for connect.

    For a Unix socket the address is its path. Raises ServiceError with code 125.
    """
    if found.kind == SOCKET:
        return _socket.AF_UNIX, found.path
    host, port = tcp_address(found.address, command.argument)
    family = _socket.AF_INET6 if b":" in host or b"%" in host else 0
    flags = _socket.AI_NUMERICHOST | _socket.AI_NUMERICSERV
    if not host:
        raise ServiceError("the address of a TCP service has no host")
    try:
        answers = _socket.getaddrinfo(host, port, family, _socket.SOCK_STREAM, 0, flags)
    except (OSError, UnicodeError) as error:
        raise ServiceError(f"{escape(host)} is no numeric address") from error
    return answers[0][0], answers[0][4]


class Connecting:
    """A connection to a service on its way, without blocking anybody.

    Calls ``on_connected(fd)`` with a blocking, close-on-exec descriptor that belongs to the
    receiver, or ``on_failed(ServiceError)``; never before the constructor has returned.
    """

    def __init__(
        self,
        loop: Loop,
        family: int,
        address: Any,
        on_connected: Callable[[int], None],
        on_failed: Callable[[ServiceError], None],
        timeout: float = CONNECT_TIMEOUT,
    ) -> None:
        """Begin to connect to ``address``; ``timeout`` in seconds bounds the whole attempt."""
        self._loop = loop
        self._address = address
        self._on_connected = on_connected
        self._on_failed = on_failed
        self._socket: _socket.socket | None = None
        self._path_fd = -1
        self._writing = False
        self._retry: Any = loop.call_later(0, self._begin, family)
        self._deadline: Any = loop.call_later(timeout, self._fail, "the service does not answer")

    def _begin(self, family: int) -> None:
        self._retry = None
        try:
            self._socket = _socket.socket(family, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
            if family == _socket.AF_UNIX and len(self._address) > MAX_UNIX_PATH:
                # A path that no socket address can hold is reached through its descriptor.
                self._path_fd = os.open(self._address, os.O_PATH | os.O_CLOEXEC)
                self._address = b"/proc/self/fd/%d" % self._path_fd
        except OSError as error:
            self._fail(error.strerror or "no socket")
            return
        self._attempt()

    def _attempt(self) -> None:
        self._retry = None
        assert self._socket is not None
        code = self._socket.connect_ex(self._address)
        if code == 0:
            self._succeed()
        elif code == errno.EINPROGRESS:
            self._writing = True
            self._loop.add_writer(self._socket.fileno(), self._writable)
        elif code == errno.EAGAIN:
            # The queue of a Unix socket is full: there is nothing to wait on but time.
            self._retry = self._loop.call_later(RETRY_DELAY, self._attempt)
        else:
            self._fail(os.strerror(code))

    def _writable(self) -> None:
        assert self._socket is not None
        code = self._socket.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
        if code:
            self._fail(os.strerror(code))
        else:
            self._succeed()

    def _succeed(self) -> None:
        assert self._socket is not None
        self._quiet()
        self._socket.setblocking(True)
        descriptor = self._socket.detach()
        self._socket = None
        self.close()
        self._on_connected(descriptor)

    def _fail(self, reason: str) -> None:
        self.close()
        self._on_failed(ServiceError(f"cannot connect to the service: {reason}"))

    def _quiet(self) -> None:
        if self._writing and self._socket is not None:
            self._writing = False
            self._loop.remove_writer(self._socket.fileno())

    def close(self) -> None:
        """Give up without calling anybody."""
        self._quiet()
        for handle in (self._retry, self._deadline):
            if handle is not None:
                handle.cancel()
        self._retry = self._deadline = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._path_fd >= 0:
            os.close(self._path_fd)
            self._path_fd = -1


def connect_blocking(family: int, address: Any, timeout: float = CONNECT_TIMEOUT) -> int:
    """Connect and wait; for one-shot programs. Returns a blocking descriptor of the caller's.

    Raises ServiceError with code 125.
    """
    connection = _socket.socket(family, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    path_fd = -1
    try:
        connection.settimeout(timeout)
        if family == _socket.AF_UNIX and len(address) > MAX_UNIX_PATH:
            path_fd = os.open(address, os.O_PATH | os.O_CLOEXEC)
            address = b"/proc/self/fd/%d" % path_fd
        connection.connect(address)
        connection.setblocking(True)
        return connection.detach()
    except OSError as error:
        reason = error.strerror or "the service does not answer"
        raise ServiceError(f"cannot connect to the service: {reason}") from error
    finally:
        connection.close()
        if path_fd >= 0:
            os.close(path_fd)
