"""Handing a call to the fork server of a user who is logged in.

A fork server runs commands inside a session that is already open. What the agent keeps of such a
call is a connection whose end is the call's end. docs/spec/wire-protocol.md 7.4.1 step 4, 8.
"""

from __future__ import annotations

import _socket
import errno
import os

from sluice.agent.local import MAX_UNIX_PATH
from sluice.vchan.passed import close_all, send_with_fds
from sluice.wire.messages import FORK_REQUEST, MAX_COMMAND
from sluice.wire.names import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.agent.calls import ServiceCall
    from sluice.agent.link import Execute
    from sluice.agent.planning import Plan
    from sluice.flow.reactor import Loop


def fork_server_path(planned: Plan, pattern: str) -> bytes | None:
    """Return the socket of the fork server that may serve a call, or None (7.4.1 step 4).

    ``pattern`` has ``%s`` for the user's name; empty means that none is used.
    """
    command, configuration = planned.command, planned.configuration
    if not pattern or command is None or planned.error is not None or command.nogui:
        return None
    if configuration.socket_only() or len(command.text) + 1 > MAX_COMMAND:
        return None
    if not planned.user or b"/" in planned.user:
        return None
    path = os.fsencode(pattern).replace(b"%s", planned.user)
    return path if len(path) <= MAX_UNIX_PATH else None


class ForkServerCall:
    """A call that a fork server serves."""

    def __init__(
        self,
        loop: Loop,
        path: bytes,
        request: Execute,
        text: bytes,
        fds: tuple[int, int] | None,
        on_end: Callable[[ServiceCall | ForkServerCall], None],
        log: Callable[[str], None],
    ) -> None:
        """Take the request, the text behind its user part, and the descriptors over `passed`."""
        self.domain = request.domain
        self.port = request.port
        self._kind = request.kind
        self._loop = loop
        self._path = path
        self._text = text
        self._fds = fds
        self._on_end = on_end
        self._log = log
        self._fd = -1

    def begin(self) -> bool:
        """Pass the request on. False: there is no such server, the call is still ours."""
        flags = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        try:
            connection = _socket.socket(_socket.AF_UNIX, flags)
        except OSError as error:
            self._log(f"fork server: {error.strerror}")
            return False
        try:
            connection.connect(self._path)
            text = self._text + b"\0"
            request = FORK_REQUEST.pack(
                self._kind, _signed(self.domain), _signed(self.port), len(text)
            )
            sent = send_with_fds(connection.fileno(), request + text, self._fds or ())
            if sent < len(request) + len(text):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as error:
            connection.close()
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                self._log(f"fork server {escape(self._path)}: {error.strerror}")
            return False
        if self._fds is not None:
            close_all(self._fds)
        self._fd = connection.detach()
        self._loop.add_reader(self._fd, self._ended)
        return True

    def _ended(self) -> None:
        """Take end-of-file, an error, or anything unexpected as the end (7.6)."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._on_end(self)


def _signed(number: int) -> int:
    """Turn a u32 into the i32 with the same bits, as the fork server's request has it."""
    return number - (1 << 32) if number >= 1 << 31 else number
