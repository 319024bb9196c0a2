"""The transport `socketdir`: a vchan is one connected Unix socket, found by a file name.

For the stand-alone programs and for interoperability with other implementations. The bytes on the
socket are the payload and nothing else. Everything here waits on a loop with a deadline; nothing
blocks. docs/spec/wire-protocol.md 5.
"""

from __future__ import annotations

import _socket
import errno
import os

from sluice.errors import LocalError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.flow.reactor import Handle, Loop

DEFAULT_DIRECTORY = "/var/run/vchan"

# A longer path would be cut silently by the kernel's address structure.
_LONGEST_PATH = 107

# Seconds between two attempts to reach a server that is not there yet.
RETRY = 0.01

_MISSING = (errno.ENOENT, errno.ECONNREFUSED)


def atoi(text: str) -> int:
    """Read a number as C's atoi does: what is no number is 0, what does not fit an int wraps."""
    text = text.lstrip(" \t\n\v\f\r")
    sign = -1 if text.startswith("-") else 1
    digits = text[1:] if text[:1] in ("+", "-") else text
    number = 0
    for character in digits:
        if not "0" <= character <= "9":
            break
        number = (number * 10 + ord(character) - 48) & 0xFFFFFFFF
    return (sign * number + (1 << 31)) % (1 << 32) - (1 << 31)


def own_domain() -> int:
    """Return our domain number: VCHAN_DOMAIN as C's atoi reads it, 0 when unset (section 2.4)."""
    return atoi(os.environ.get("VCHAN_DOMAIN", ""))


def socket_path(server: int, client: int, port: int, directory: str | None = None) -> str:
    """Return the file name of a vchan (section 5.2), in VCHAN_SOCKET_DIR unless ``directory``.

    Domain numbers are printed as signed 32-bit numbers. Raises LocalError over 107 bytes.
    """
    if directory is None:
        directory = os.environ.get("VCHAN_SOCKET_DIR", DEFAULT_DIRECTORY)
    numbers = ((n + (1 << 31)) % (1 << 32) - (1 << 31) for n in (server, client, port))
    path = "{}/vchan.{}.{}.{}.sock".format(directory, *numbers)
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise LocalError(f"the vchan's path has more than {_LONGEST_PATH} bytes: {path}")
    return path


class Server:
    """Waits for the one peer of a vchan. The listener is closed when the peer has come.

    The socket file stays behind (5.3); a later server of the same name replaces it.
    """

    def __init__(
        self,
        loop: Loop,
        client_domain: int,
        port: int,
        on_connected: Callable[[int], None],
        timeout: float | None = None,
        on_timeout: Callable[[], None] | None = None,
        *,
        server_domain: int | None = None,
        directory: str | None = None,
    ) -> None:
        """Listen at once. ``on_connected(fd)`` gives a non-blocking socket, the owner's to close.

        timeout: seconds, None or 0 for none; ``on_timeout()`` then, with everything closed. Raises
        OSError where the name cannot be bound, LocalError where it is too long.
        """
        self._loop = loop
        self._on_connected = on_connected
        self._on_timeout = on_timeout
        own = own_domain() if server_domain is None else server_domain
        self.path = socket_path(own, client_domain, port, directory)
        try:  # noqa: SIM105
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        self._socket: _socket.socket | None = _socket.socket(
            _socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC
        )
        self._timer: Handle | None = None
        try:
            self._socket.bind(self.path)
            self._socket.listen(1)
        except OSError as error:
            self._socket.close()
            error.filename = self.path
            raise
        self._retry: Handle | None = None
        self._listen()
        if timeout:
            self._timer = loop.call_later(timeout, self._expire)

    def fileno(self) -> int:
        """Return the listener's descriptor, -1 once it is closed."""
        return -1 if self._socket is None else self._socket.fileno()

    def _listen(self) -> None:
        self._retry = None
        self._loop.add_reader(self.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._socket is not None
        try:
            fd, _ = self._socket._accept()  # type: ignore[attr-defined]
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                # The peer keeps knocking; look again when descriptors may be free.
                self._loop.remove_reader(self._socket.fileno())
                self._retry = self._loop.call_later(RETRY * 10, self._listen)
            return
        self.close()
        os.set_blocking(fd, False)
        self._on_connected(fd)

    def _expire(self) -> None:
        self._timer = None
        self.close()
        if self._on_timeout is not None:
            self._on_timeout()

    def close(self) -> None:
        """Stop waiting. May be repeated."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None


class Client:
    """Connects to the server of a vchan, which may appear later (section 5.4)."""

    def __init__(
        self,
        loop: Loop,
        server_domain: int,
        port: int,
        on_connected: Callable[[int], None],
        timeout: float | None,
        on_failed: Callable[[str], None],
        *,
        client_domain: int | None = None,
        directory: str | None = None,
    ) -> None:
        """Begin; one of the callbacks is called later, never from here.

        ``on_connected(fd)`` gives a non-blocking socket, the owner's to close. timeout: seconds,
        None or 0 for none. Raises LocalError where the name is too long.
        """
        self._loop = loop
        self._on_connected = on_connected
        self._on_failed = on_failed
        own = own_domain() if client_domain is None else client_domain
        self.path = socket_path(server_domain, own, port, directory)
        self._until = loop.time() + timeout if timeout else None
        self._timer: Handle | None = loop.call_later(0, self._try)

    def _try(self) -> None:
        self._timer = None
        kind = _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC
        try:
            sock = _socket.socket(_socket.AF_UNIX, kind)
        except OSError as error:
            self._on_failed(f"{self.path}: {os.strerror(error.errno or 0)}")
            return
        try:
            sock.connect(self.path)
        except OSError as error:
            sock.close()
            # EAGAIN: its queue is full, somebody else is being accepted.
            if error.errno in _MISSING or error.errno == errno.EAGAIN:
                self._again()
            else:
                self._on_failed(f"{self.path}: {os.strerror(error.errno or 0)}")
            return
        self._on_connected(sock.detach())

    def _again(self) -> None:
        """Try once more in a moment, unless the deadline comes first."""
        now = self._loop.time()
        if self._until is not None and now >= self._until:
            self._on_failed(f"{self.path}: no server in time")
            return
        self._timer = self._loop.call_later(RETRY, self._try)

    def close(self) -> None:
        """Give up. No callback comes any more. May be repeated."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
