"""Asking for a call from inside a domain, up to the data channel's two descriptors.

Theory. A request goes through: *connecting* to the trigger socket, *asking* (the request is sent,
a person may have to confirm: no time limit but the caller's own), *joining* (allowed; over
`socketdir` we are the vchan server and wait for the other side, over `passed` the descriptors came
with the answer), *open*. The connection to the agent stays open until ``close``: its end is what
tells the agent that the call is over. docs/spec/wire-protocol.md 11.2, 11.4, 20.
"""

from __future__ import annotations

import _socket
import errno

from sluice.errors import LocalError
from sluice.vchan.passed import close_all, recv_with_fds
from sluice.wire.messages import EXEC_PARAMS, encode_trigger4

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sluice.flow.reactor import Loop

AGENT_SOCKET = "/var/run/qubes/qrexec-agent"
IDENT = b"SOCKET"
PEER_TIMEOUT = 120.0
RETRY_DELAY = 0.02
# More than the two that are right are taken, only to tell them from none.
MAX_FDS = 16


class CallRequest:
    """One request for a call. Exactly one of its callbacks is called, never by the constructor.

    ``on_open(read_fd, write_fd)``: the data channel's descriptors, now the receiver's; equal over
    `socketdir`. ``on_refused()``: the agent closed the connection. ``on_error(text)``: anything
    else. ``on_allowed()``, where given, comes before the data channel is made.
    """

    def __init__(
        self,
        loop: Loop,
        target: bytes,
        service: bytes,
        *,
        source: bytes = b"",
        agent_socket: str | None = None,
        on_open: Callable[[int, int], None],
        on_refused: Callable[[], None],
        on_error: Callable[[str], None],
        on_allowed: Callable[[], None] | None = None,
        timeout: float | None = None,
    ) -> None:
        """Begin to ask for ``service`` (with its ``+argument``) from ``target``.

        ``source`` is the requested source, empty for none; ``timeout`` bounds, in seconds, the
        time until ``on_open``. Raises LocalError for a service name that no message can hold.
        """
        self._loop = loop
        self._path = agent_socket or AGENT_SOCKET
        self._on_open = on_open
        self._on_refused = on_refused
        self._on_error = on_error
        self._on_allowed = on_allowed
        self._outgoing = encode_trigger4(source, target.replace(b"$", b"@"), IDENT, service)
        self._answer = b""
        self._fds: list[int] = []
        self._server: Any = None
        self._socket: _socket.socket | None = None
        self._reading = self._writing = False
        self._over = False
        self._retry: Any = loop.call_later(0, self._connect)
        self._deadline: Any = None
        if timeout is not None:
            self._deadline = loop.call_later(timeout, self._fail, "no answer in time")

    # --- connecting and asking -------------------------------------------------------------------

    def _connect(self) -> None:
        self._retry = None
        if self._socket is None:
            flags = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
            try:
                self._socket = _socket.socket(_socket.AF_UNIX, flags)
            except OSError as error:
                self._fail(f"no socket: {error.strerror}")
                return
        try:
            self._socket.connect(self._path)
        except BlockingIOError:
            # Its queue is full: there is nothing to wait on but time.
            self._retry = self._loop.call_later(RETRY_DELAY, self._connect)
            return
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            self._fail(f"cannot connect to the agent at {self._path}: {reason}")
            return
        self._send()

    def _send(self) -> None:
        assert self._socket is not None
        try:
            while self._outgoing:
                sent = self._socket.send(self._outgoing, _socket.MSG_NOSIGNAL)
                self._outgoing = self._outgoing[sent:]
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._socket.fileno(), self._send)
            return
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                self._fail(f"cannot ask the agent: {error.strerror}")
                return
            # The agent closed already; the answer (or its absence) is still to be read.
            self._outgoing = b""
        self._stop_watching()
        self._reading = True
        self._loop.add_reader(self._socket.fileno(), self._readable)

    def _readable(self) -> None:
        assert self._socket is not None
        try:
            missing = EXEC_PARAMS.size - len(self._answer)
            data, fds = recv_with_fds(self._socket.fileno(), missing, MAX_FDS)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ECONNRESET:
                self._fail(f"cannot hear the agent: {error.strerror}")
                return
            data, fds = b"", []
        self._fds += fds
        self._answer += data
        if len(self._answer) == EXEC_PARAMS.size:
            self._allowed()
        elif not data and self._answer:
            self._fail(f"the agent sent {len(self._answer)} bytes instead of 8")
        elif not data:
            self._finish()
            self._on_refused()

    # --- joining ---------------------------------------------------------------------------------

    def _allowed(self) -> None:
        """Take the connection details: make or wait for the data channel (11.4)."""
        self._stop_watching()
        if self._on_allowed is not None:
            self._on_allowed()
            if self._over:
                return
        if len(self._fds) == 2:
            read_fd, write_fd = self._fds
            self._fds = []
            self._opened(read_fd, write_fd)
            return
        if self._fds:
            self._fail("the agent sent a wrong number of descriptors")
            return
        # Only a stand-alone agent needs this; do not make everybody load it.
        from sluice.vchan import socketdir

        domain, port = EXEC_PARAMS.unpack(self._answer)
        try:
            self._server = socketdir.Server(
                self._loop,
                domain,
                port,
                lambda fd: self._opened(fd, fd),
                PEER_TIMEOUT,
                lambda: self._fail("the other side of the call does not connect"),
            )
        except (LocalError, OSError) as error:
            self._fail(str(error))

    def _opened(self, read_fd: int, write_fd: int) -> None:
        self._server = None
        self._settle()
        self._on_open(read_fd, write_fd)

    # --- ending ----------------------------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        if self._over:
            return
        self._finish()
        self._on_error(reason)

    def _settle(self) -> None:
        """Let go of what only an unanswered request needs."""
        self._over = True
        self._stop_watching()
        for handle in (self._retry, self._deadline):
            if handle is not None:
                handle.cancel()
        self._retry = self._deadline = None
        if self._server is not None:
            self._server.close()
            self._server = None
        close_all(self._fds)
        self._fds = []

    def _finish(self) -> None:
        self._settle()
        self.close()

    def _stop_watching(self) -> None:
        if self._socket is None:
            return
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._socket.fileno())
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._socket.fileno())

    def cancel(self) -> None:
        """Give up: no callback is called any more, and the agent hears that nobody waits."""
        self._finish()

    def close(self) -> None:
        """End the connection to the agent: the call is over. Harmless when called again."""
        self._settle()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
