"""From a connection to a call: the launcher's socket and the raw one (docs/spec/proxy.md 2).

A connection that does not say in time what it wants is closed. On the raw socket the service
descriptor is read to its NUL and not a byte further: what follows is the call's data.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from sluice.errors import ConfigError, LocalError, RemoteError
from sluice.proxy.handover import TAKEN, decode_request, encode_end, receive_request
from sluice.proxy.log import WARNING
from sluice.proxy.model import RefusedError
from sluice.proxy.names import MAX_ARGUMENT, PROXY_SERVICE
from sluice.proxy.session import TROUBLE, named_call
from sluice.proxy.stage import Cause

if TYPE_CHECKING:
    import asyncio

    from sluice.proxy.link import Call
    from sluice.proxy.session import Session
    from sluice.proxy.underway import Calls, UnderWay

# How long a connection may take to say what it wants.
PATIENCE = 5.0
# ``qrexec-proxy+`` ARGUMENT, a source, and in dom0 a target of a kind and a name.
MAX_DESCRIPTOR = len(PROXY_SERVICE) + 1 + MAX_ARGUMENT + 3 * 64


class Intake:
    """Connections that have not said yet what they want; at most ``most`` of them."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        calls: Calls,
        session: Callable[[], Session],
        *,
        patience: float = PATIENCE,
        most: int = 512,
        objection: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Take the table of calls and what returns the session now in force.

        ``objection`` says why a raw connection cannot be served now, if it cannot.
        """
        self.loop = loop
        self.calls = calls
        self.session = session
        self.patience = patience
        self.objection = objection
        self._most = most
        self._waiting: set[_Connection] = set()

    def launcher(self, sock: socket.socket) -> None:
        """Serve a connection to the launcher's socket."""
        self._take(sock, _LauncherCall)

    def raw(self, sock: socket.socket) -> None:
        """Serve a connection to the raw socket."""
        self._take(sock, _RawCall)

    def _take(self, sock: socket.socket, kind: type[_Connection]) -> None:
        if len(self._waiting) >= self._most:
            self.session().log.write("a connection is closed: too many say nothing", WARNING)
            sock.close()
            return
        self._waiting.add(kind(self, sock))

    def done(self, connection: _Connection) -> None:
        """Forget a connection that has said what it wants, or is closed."""
        self._waiting.discard(connection)

    def close(self) -> None:
        """Close all connections that have not said what they want."""
        for connection in list(self._waiting):
            connection.give_up("the server ends")


class _Connection:
    """What both kinds have in common: waiting for the first message, with a deadline."""

    form = ""

    def __init__(self, intake: Intake, sock: socket.socket) -> None:
        self._intake = intake
        self._loop = intake.loop
        self._sock = sock
        self._timer = self._loop.call_later(
            intake.patience, self.give_up, "it did not say in time what it wants"
        )
        self._loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        raise NotImplementedError

    def _heard(self) -> None:
        """Stop waiting."""
        self._timer.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._intake.done(self)

    def give_up(self, reason: str) -> None:
        """Close the connection before there was a call."""
        self._heard()
        text = f"{self.form} socket: a connection is closed: {reason}"
        self._intake.session().log.write(text, WARNING)
        self._sock.close()


class _LauncherCall(_Connection):
    """A call that a launcher hands over; the connection stays open as long as it lasts."""

    form = "launcher"

    def _readable(self) -> None:
        try:
            untrusted_message, fds = receive_request(self._sock)
        except BlockingIOError:
            return
        except (RemoteError, OSError) as error:
            self.give_up(str(error))
            return
        if not untrusted_message:
            self.give_up("it ended before it said anything")
            return
        self._heard()
        try:
            untrusted_source, untrusted_name = decode_request(untrusted_message)
        except RemoteError as error:
            for fd in fds:
                os.close(fd)
            self.give_up(str(error))
            return
        self._send(TAKEN)
        self._begin(untrusted_source, untrusted_name, fds)

    def _begin(self, untrusted_source: str, untrusted_name: str, fds: list[int]) -> None:
        session = self._intake.session()
        try:
            call = named_call(untrusted_name, untrusted_source, self.form)
        except LocalError as error:
            session.refuse_malformed(untrusted_source, self.form, error)
            for fd in fds:
                os.close(fd)
            self._ended(TROUBLE)
            return
        self._entry = self._intake.calls.begin(session, call, fds[0], fds[1], self._ended)
        if self._entry is not None:
            # It says nothing more: what can be read is its end.
            self._loop.add_reader(self._sock.fileno(), self._gone)

    _entry: UnderWay | None = None

    def _gone(self) -> None:
        try:
            if self._sock.recv(16):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._loop.remove_reader(self._sock.fileno())
        if self._entry is not None and self._entry.flow is not None:
            self._entry.flow.abort(Cause("source-gone", "the launcher is gone"))

    def _ended(self, code: int) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._send(encode_end(code))
        self._sock.close()

    def _send(self, message: bytes) -> None:
        # A launcher that is gone: that is seen where the call is.
        with contextlib.suppress(OSError):
            self._sock.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


class _RawCall(_Connection):
    """A call whose connection begins with the service descriptor."""

    form = "raw"

    def __init__(self, intake: Intake, sock: socket.socket) -> None:
        self._read = b""
        super().__init__(intake, sock)

    def _readable(self) -> None:
        try:
            seen = self._sock.recv(65536, socket.MSG_PEEK)
            end = seen.find(b"\0")
            untrusted_part = self._sock.recv(end + 1 if end >= 0 else len(seen)) if seen else b""
        except BlockingIOError:
            return
        except OSError as error:
            self.give_up(error.strerror or "broken")
            return
        if not untrusted_part:
            self.give_up("it ended before the descriptor did")
            return
        self._read += untrusted_part
        if len(self._read) > MAX_DESCRIPTOR + 1:
            self.give_up("the service descriptor is too long")
        elif end >= 0:
            self._heard()
            self._begin(self._read[:-1])

    def _begin(self, untrusted_descriptor: bytes) -> None:
        session = self._intake.session()
        untrusted_source: str | None = None
        try:
            untrusted_name, untrusted_source = split_descriptor(untrusted_descriptor)
            call = named_call(untrusted_name, untrusted_source, self.form)
        except LocalError as error:
            session.refuse_malformed(untrusted_source, self.form, error)
            self._sock.close()
            return
        objection = self._intake.objection() or _needs_exit_code(session, call)
        if objection is not None:
            session.refuse(call, Cause("refused", objection, exit_code=126))
            self._sock.close()
            return
        in_fd = self._sock.detach()
        self._intake.calls.begin(session, call, in_fd, os.dup(in_fd), lambda _code: None)


def _needs_exit_code(session: Session, call: Call) -> str | None:
    """Return why a chain cannot be used without exit code, if it cannot."""
    try:
        chain = session.configuration.chain(call.chain)
    except ConfigError:
        # It is refused, with a better reason, when the call begins.
        return None
    if not chain.require_exit_code:
        return None
    refusal = RefusedError(
        f"chain '{chain.name}' requires an exit code, which a socket cannot carry",
        file=chain.file,
        line=chain.line,
    )
    return str(refusal)


def split_descriptor(untrusted_descriptor: bytes) -> tuple[str, str]:
    """Return the call's name and source of ``qrexec-proxy+NAME SOURCE[ KIND TARGET]``.

    Both are untrusted still. Raises LocalError for what is no such descriptor.
    """
    try:
        words = untrusted_descriptor.decode("ascii").split(" ")
    except UnicodeDecodeError:
        raise LocalError("the service descriptor is not ASCII") from None
    service, plus, name = words[0].partition("+")
    if service != PROXY_SERVICE or not plus or len(words) not in (2, 4):
        raise LocalError("no service descriptor of a call of qrexec-proxy")
    return name, words[1]
