"""qrexec-fork-server: runs commands inside a user's session that is already open.

Theory. The agent passes a request over a connection and never hears anything on it but its end,
which comes when the call is over. The commands run as we are: no user is switched, no
configuration is read (the agent did both by choosing us). One process serves all requests.
docs/spec/wire-protocol.md 8.
"""

from __future__ import annotations

import errno
import os
import sys

from sluice.agent.calls import ServiceCall, Surroundings
from sluice.agent.local import ACCEPT_PAUSE, REQUEST_TIMEOUT, listen_on
from sluice.agent.log import Log, has_system_log
from sluice.agent.options import die_of_interrupt
from sluice.agent.planning import plan
from sluice.agent.processes import ProcessTable
from sluice.agent.startup import keep_descriptors_private
from sluice.errors import LocalError
from sluice.flow.reactor import Reactor
from sluice.service.descriptors import own_limit
from sluice.vchan.passed import close_all, recv_with_fds
from sluice.wire.messages import FORK_REQUEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.flow.reactor import Loop
    from sluice.service.start import Start

USAGE = "usage: qrexec-fork-server [SOCKET_PATH]\n"
MAX_TEXT = 1 << 20
MAX_READING = 256
# What passes when others have ended.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class CurrentUser:
    """Everything runs directly in our session; shell commands by ``$SHELL -c``."""

    def program(self, _user: bytes, argv: list[bytes], environment: dict[bytes, bytes]) -> Start:
        """Return what to execute for a service: itself."""
        return argv, environment, None

    def shell(self, _user: bytes, text: bytes, environment: dict[bytes, bytes]) -> Start:
        """Return what to execute for a shell command."""
        return [environment.get(b"SHELL") or b"/bin/sh", b"-c", text], environment, None


class Request:
    """One connection from the agent: a request being read, then a call under way."""

    def __init__(self, server: ForkServer, fd: int) -> None:
        """Begin to read the request."""
        self._server = server
        self._fd = fd
        self._data = b""
        self._fds: list[int] = []
        self._deadline = server.loop.call_later(REQUEST_TIMEOUT, self._refuse, "no request came")
        server.loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        try:
            data, fds = recv_with_fds(self._fd, self._missing())
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        self._fds += fds
        self._data += data
        head = len(self._data) >= FORK_REQUEST.size
        if not data:
            self._refuse("the request ended early")
        elif head and not 0 < self._text_size() <= MAX_TEXT:
            self._refuse(f"a command line of {self._text_size()} bytes")
        elif head and not self._missing():
            self._take()

    def _text_size(self) -> int:
        size: int = FORK_REQUEST.unpack_from(self._data)[3]
        return size

    def _missing(self) -> int:
        """Return how many bytes the header, or the whole request, still lacks."""
        if len(self._data) < FORK_REQUEST.size:
            return FORK_REQUEST.size - len(self._data)
        return FORK_REQUEST.size + self._text_size() - len(self._data)

    def _take(self) -> None:
        """Check the request and serve it."""
        kind, domain, port, _ = FORK_REQUEST.unpack_from(self._data)
        text = self._data[FORK_REQUEST.size :]
        if text[-1] != 0 or b"\0" in text[:-1]:
            self._refuse("NULs in the wrong places of a command line")
            return
        if len(self._fds) not in (0, 2):
            self._refuse("a wrong number of descriptors")
            return
        planned = plan(text[:-1], self._server.log, with_user=False, configured=False)
        if planned.error is not None:
            self._refuse(str(planned.error))
            return
        self._stop_reading()
        pair = (self._fds[0], self._fds[1]) if self._fds else None
        self._fds = []
        call = ServiceCall(
            self._server.around,
            kind,
            domain & 0xFFFFFFFF,
            port & 0xFFFFFFFF,
            planned,
            pair,
            lambda _call: self._close(),
        )
        call.begin()

    def _refuse(self, reason: str) -> None:
        self._server.log(f"request refused: {reason}")
        self._stop_reading()
        self._close()

    def _stop_reading(self) -> None:
        self._deadline.cancel()
        self._server.loop.remove_reader(self._fd)
        self._server.reading.discard(self)

    def _close(self) -> None:
        """Close the connection: the agent takes that as the end of the call."""
        close_all(self._fds)
        self._fds = []
        os.close(self._fd)
        self._server.requests.discard(self)


class ForkServer:
    """The listening socket and its requests."""

    def __init__(self, loop: Loop, listener_fd: int, accept: object, stop: object) -> None:
        """Serve connections that ``accept()`` returns; ``stop()`` is called when it fails."""
        self.loop = loop
        self.log = Log("qrexec-fork-server")
        self.requests: set[Request] = set()
        self.reading: set[Request] = set()
        self._accept = accept
        self._stop = stop
        processes = ProcessTable(loop)
        self.around = Surroundings(
            loop,
            processes,
            CurrentUser(),
            self.log,
            system_log=has_system_log(),
            environment=os.environb,
        )
        self._listener_fd = listener_fd
        self._listen()

    def _listen(self) -> None:
        self.loop.add_reader(self._listener_fd, self._ready)

    def _ready(self) -> None:
        assert callable(self._accept)
        assert callable(self._stop)
        try:
            fd = self._accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            self.log(f"cannot accept: {error.strerror}")
            if error.errno in EXHAUSTED:
                # The calls under way must not end with it: hear nobody for a moment.
                self.loop.remove_reader(self._listener_fd)
                self.loop.call_later(ACCEPT_PAUSE, self._listen)
            else:
                self._stop()
            return
        if len(self.reading) >= MAX_READING:
            os.close(fd)
            return
        request = Request(self, fd)
        self.requests.add(request)
        self.reading.add(request)


def main(arguments: list[str]) -> int:
    """Listen, go into the background, serve; returns the exit status of whoever returns."""
    die_of_interrupt()
    if len(arguments) > 1:
        sys.stderr.write(USAGE)
        return 1
    user = os.environ.get("USER", "")
    path = arguments[0] if arguments else f"/var/run/qubes/qrexec-server.{user}.sock"
    keep_descriptors_private()
    try:
        listener = listen_on(path, None)
    except LocalError as error:
        sys.stderr.write(f"qrexec-fork-server: {error}\n")
        return 1
    # Before any thread or loop: the parent's exit tells that the socket is ready.
    if os.fork():
        return 0
    os.setsid()
    own_limit.raise_it()
    loop = Reactor()
    ForkServer(loop, listener.fileno(), listener._accept, loop.stop)  # type: ignore[attr-defined]
    loop.run()
    return 0
