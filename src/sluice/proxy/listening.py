"""The server's listening sockets: bound by us or handed over by systemd (docs/spec/proxy.md 2).

A socket of ours has mode 0600 from its first moment, is removed at the end, and replaces one that
a server which died left behind, but never one on which a living server listens. Who connects is
asked for by SO_PEERCRED.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

from sluice.errors import LocalError
from sluice.proxy.sockets import MAX_PATH, is_trusted_peer, peer_user

if TYPE_CHECKING:
    import asyncio

BACKLOG = 512
# How long to take no connection where the process has no descriptor left.
_BREATH = 0.2
_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener:
    """One listening socket; hands each connection of a trusted user to ``on_connection``."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        on_connection: Callable[[socket.socket], None],
        report: Callable[[str], None],
        *,
        path: str = "",
    ) -> None:
        """Take a socket that listens. ``path`` is the file that is ours to remove, if any.

        ``report`` is told of users who were refused.
        """
        self._loop = loop
        self._sock = sock
        self._on_connection = on_connection
        self._report = report
        self._path = path
        self._wait: asyncio.TimerHandle | None = None
        # Only the metrics can be on a port, where the kernel does not know who it is.
        self._local = sock.family == socket.AF_UNIX
        sock.setblocking(False)
        self._inode = os.stat(path).st_ino if path else 0
        self.resume()

    def resume(self) -> None:
        """Take connections."""
        self._wait = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def close(self) -> None:
        """Take no more connections; a socket of ours is removed, if it is still the same."""
        if self._sock.fileno() < 0:
            return
        if self._wait is not None:
            self._wait.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        if self._path:
            with contextlib.suppress(OSError):
                if os.lstat(self._path).st_ino == self._inode:
                    os.unlink(self._path)

    def _accept(self) -> None:
        for _ in range(16):
            try:
                connection, _ = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _SHORTAGE:
                    # The connection stays in the queue and would wake us again at once.
                    self._loop.remove_reader(self._sock.fileno())
                    self._wait = self._loop.call_later(_BREATH, self.resume)
                    self._report(f"cannot take a connection: {error.strerror}")
                return
            connection.setblocking(False)
            if self._local and not is_trusted_peer(connection):
                self._report(f"refused a connection of user {peer_user(connection)}")
                connection.close()
                continue
            self._on_connection(connection)


def bind(path: str, kind: socket.SocketKind) -> socket.socket:
    """Return a listening socket at ``path`` with mode 0600.

    Raises LocalError where a server listens there already, or it cannot be.
    """
    if len(os.fsencode(path)) > MAX_PATH:
        raise LocalError(f"{path}: longer than the {MAX_PATH} bytes of a socket's address")
    _remove_stale(path, kind)
    sock = socket.socket(socket.AF_UNIX, kind)
    previous = os.umask(0o177)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise LocalError(f"cannot listen on {path}: {error.strerror}") from None
    finally:
        os.umask(previous)
    return sock


def _remove_stale(path: str, kind: socket.SocketKind) -> None:
    """Remove a socket on which nobody listens."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise LocalError(f"{path} is there already and is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            if error.errno != errno.EAGAIN:
                raise LocalError(f"{path}: {error.strerror}") from None
    raise LocalError(f"a server listens on {path} already")


def inherited(fd: int) -> socket.socket:
    """Return a socket that systemd handed over. Raises LocalError where it is none of ours."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise LocalError(f"descriptor {fd} is no socket: {error.strerror}") from None
    kinds = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
    if sock.family != socket.AF_UNIX or sock.type not in kinds:
        raise LocalError(f"descriptor {fd} is no Unix socket of a kind that serves here")
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise LocalError(f"descriptor {fd} does not listen")
    return sock
