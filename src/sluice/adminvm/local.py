"""The socket on which local clients ask a domain's daemon for something.

The driver of ``session.Session``: it listens, buffers for each client, closes those who break the
rules or say nothing for ten seconds, and hands whole requests on. One slow client delays nobody.
docs/spec/wire-protocol.md 6.3 to 6.5.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Sequence

from sluice.adminvm.session import LocalRequest, Session
from sluice.errors import LocalError, RemoteError, SluiceError

BACKLOG = 128
MAX_SESSIONS = 1024
PATIENCE = 10.0  # seconds for HELLO and request
MAX_PATH = 107

Serve = Callable[["LocalSession", LocalRequest], None]


class LocalSession:
    """One connected local client."""

    def __init__(self, server: LocalServer, sock: socket.socket) -> None:
        """Greet the client and begin to read."""
        self._server = server
        self._loop = server.loop
        self._sock = sock
        self._core = Session()
        self._reading = False
        self.closed = False
        sock.setblocking(False)
        self._deadline: asyncio.TimerHandle | None = self._loop.call_later(PATIENCE, self._late)
        if not self.reply(Session.greeting):
            self.close()
        elif not server.paused:
            self.listen()

    def reply(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send a short answer, with descriptors where the transport has them; tell if it went.

        The client has at most 24 bytes to take, so that a full buffer means that it is gone. The
        descriptors stay the caller's.
        """
        try:
            if fds:
                return socket.send_fds(self._sock, [data], list(fds)) == len(data)
            return self._sock.send(data) == len(data)
        except OSError:
            return False

    def listen(self) -> None:
        """Read from the client (again)."""
        if not self._reading and not self.closed:
            self._reading = True
            self._loop.add_reader(self._sock.fileno(), self.readable)

    def deafen(self) -> None:
        """Stop reading for a while: the control channel has no room."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock.fileno())

    def readable(self) -> bool:
        """Read once; tell whether there may be more."""
        if self.closed:
            return False
        try:
            data = self._sock.recv(65536)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EINTR):
                return False
            data = b""
        if not data:
            self.close()
            return False
        try:
            request = self._core.receive(data)
            if request is not None:
                self._stop_waiting()
                self._server.serve(self, request)
                if self._core.excess:
                    raise RemoteError("a local client sent more than one request")
        except (SluiceError, OSError) as error:
            self._server.log(f"local client: {error}")
            self.close()
            return False
        return True

    def _late(self) -> None:
        """Drop a client that says nothing; but not one that we did not listen to."""
        if self._server.paused:
            self._deadline = self._loop.call_later(PATIENCE, self._late)
        else:
            self.close()

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def close(self) -> None:
        """End the session; to a waiting client this means that its connection has ended."""
        if self.closed:
            return
        self._stop_waiting()
        self.deafen()
        self.closed = True
        self._server.sessions.discard(self)
        self._sock.close()


class LocalServer:
    """The listening socket ``path``, links to it, and its sessions."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        path: str,
        serve: Serve,
        log: Callable[[str], None],
        *,
        links: Sequence[str] = (),
        umask: int = 0o177,
        max_sessions: int = MAX_SESSIONS,
    ) -> None:
        """Replace, bind and listen. ``serve`` takes each request; what it raises ends the session.

        ``links`` become symbolic links to the socket, in its directory (6.2 step 9); what had
        their names is replaced. The socket has its mode (0777 less ``umask``) from its first
        moment. Raises LocalError where the path is too long or one of the names cannot be made;
        nothing is left of the others then.
        """
        self.loop = loop
        self.path = path
        self.serve = serve
        self.log = log
        self.sessions: set[LocalSession] = set()
        self.paused = False
        self._max_sessions = max_sessions
        self._closed = False
        self._links = [link for link in links if link != path]
        try:
            for link in self._links:
                _link(path, link)
            self._listener = _listen(path, umask)
        except LocalError:
            self._remove_links()
            raise
        self._accepting = False
        self._set_accepting(True)

    def pause(self) -> None:
        """Take nothing from local clients until ``resume`` (section 6.3)."""
        self.paused = True
        self._set_accepting(False)
        for session in self.sessions:
            session.deafen()

    def resume(self) -> None:
        """Listen to local clients again."""
        self.paused = False
        self._set_accepting(True)
        for session in self.sessions:
            session.listen()

    def drain(self) -> None:
        """Serve everything that clients have already written (the ordering rule of 6.3).

        Also while paused: there are no more ports for it than fit in the memory that this takes.
        """
        if self._closed:
            return
        self._accept()
        for session in list(self.sessions):
            while session.readable():
                pass

    def close(self) -> None:
        """Remove the socket and the links to it, and close all sessions."""
        if self._closed:
            return
        self._closed = True
        self._set_accepting(False)
        self._remove_links()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        self._listener.close()
        for session in list(self.sessions):
            session.close()

    def _remove_links(self) -> None:
        """Remove the links, unless they are another's by now."""
        for link in self._links:
            with contextlib.suppress(OSError):
                if os.readlink(link) == os.path.basename(self.path):
                    os.unlink(link)

    def _set_accepting(self, wanted: bool) -> None:
        if wanted and not self._accepting and not self._closed:
            self.loop.add_reader(self._listener.fileno(), self._accept)
            self._accepting = True
        elif not wanted and self._accepting:
            self.loop.remove_reader(self._listener.fileno())
            self._accepting = False

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            try:
                sock, _address = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    self.log("no descriptor is left for another local client")
                    self._set_accepting(False)
                    self.loop.call_later(0.1, self._accept_again)
                return
            if len(self.sessions) >= self._max_sessions:
                self.log("too many local clients")
                sock.close()
                continue
            session = LocalSession(self, sock)
            if not session.closed:
                self.sessions.add(session)

    def _accept_again(self) -> None:
        if not self.paused:
            self._set_accepting(True)


def _link(path: str, link: str) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(link)
        os.symlink(os.path.basename(path), link)
    except OSError as error:
        raise LocalError(f"cannot make the link {link}: {error.strerror}") from error


def _listen(path: str, umask: int) -> socket.socket:
    if len(os.fsencode(path)) > MAX_PATH:
        raise LocalError(f"the path of a socket is longer than {MAX_PATH} bytes: {path}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    previous = os.umask(umask)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise LocalError(f"cannot listen on {path}: {error.strerror}") from error
    finally:
        os.umask(previous)
    return listener
