"""The trigger socket: where programs of the domain ask for calls.

Theory. A client's connection is *reading* (its request is being received, within a deadline),
*waiting* (the request is with the AdminVM; the socket is not polled), *connected* (it has the
details of its data channel; the end of this connection is the end of the call) or *closed*. A
client is trusted as much as the domain is: it can harm nobody but the domain's own agent, and that
only within the bounds here. docs/spec/wire-protocol.md 7.5, 7.6.
"""

from __future__ import annotations

import _socket
import errno
import os

from sluice.errors import LocalError, RemoteError
from sluice.vchan.passed import close_all, send_with_fds
from sluice.wire.messages import EXEC_PARAMS, FROM_CLIENT_VM, MessageReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sluice.flow.reactor import Loop

REQUEST_TIMEOUT = 10.0
MAX_READING = 256
ACCEPT_PAUSE = 0.1
BACKLOG = 128
MAX_UNIX_PATH = 107


def listen_on(path: str, mode: int | None) -> _socket.socket:
    """Remove what is at ``path``, bind and listen there; ``mode`` None leaves it to the umask.

    Raises LocalError.
    """
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise LocalError(f"the socket path {path} is longer than {MAX_UNIX_PATH} bytes")
    listener = _socket.socket(
        _socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
    )
    before = os.umask(0o777 & ~mode) if mode is not None else -1
    try:
        try:  # noqa: SIM105
            os.unlink(path)
        except FileNotFoundError:
            pass
        listener.bind(path)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise LocalError(f"cannot listen on {path}: {error.strerror}") from error
    finally:
        if mode is not None:
            os.umask(before)
    return listener


class LocalClient:
    """One connection on the trigger socket."""

    def __init__(self, socket_: TriggerSocket, fd: int) -> None:
        """Begin to read the request."""
        self._owner = socket_
        self._fd = fd
        self._reader = MessageReader(FROM_CLIENT_VM)
        self._on_gone: Callable[[], None] | None = None
        loop = socket_.loop
        self._deadline = loop.call_later(REQUEST_TIMEOUT, self._drop, "sent no request in time")
        loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if self._on_gone is not None:
            # Connected: the end, or anything else that comes, is the end of the call (7.6).
            self.close()
            return
        if not data:
            self._drop("left within its request" if self._reader.pending else "")
            return
        try:
            self._reader.feed(data)
            message = self._reader.next()
        except RemoteError as error:
            self._drop(str(error))
            return
        if message is not None:
            self._stop_reading()
            self._owner.on_request(self, message[1])

    def _stop_reading(self) -> None:
        self._owner.reading.discard(self)
        self._deadline.cancel()
        self._owner.loop.remove_reader(self._fd)

    def _drop(self, reason: str) -> None:
        if reason:
            self._owner.log(f"a local client {reason}")
        self.close()

    def answer(
        self, domain: int, port: int, fds: Sequence[int], on_gone: Callable[[], None]
    ) -> None:
        """Write the connection details, with descriptors over `passed`; closes ``fds``.

        ``on_gone`` is called once when the connection ends, maybe at once (7.4.2).
        """
        self._on_gone = on_gone
        try:
            send_with_fds(self._fd, EXEC_PARAMS.pack(domain, port), fds)
        except OSError as error:
            if error.errno != errno.EPIPE:
                self._owner.log(f"cannot answer a local client: {error.strerror}")
            # Without the details nothing can come of the call.
            self._owner.loop.call_soon(self.close)
            return
        finally:
            close_all(fds)
        self._owner.loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Close the connection; a client that waits takes that as refusal."""
        if self._fd < 0:
            return
        self._stop_reading()
        os.close(self._fd)
        self._fd = -1
        self._owner.clients.discard(self)
        on_gone, self._on_gone = self._on_gone, None
        if on_gone is not None:
            on_gone()


class TriggerSocket:
    """The listening socket and its clients."""

    def __init__(
        self,
        loop: Loop,
        path: str,
        on_request: Callable[[LocalClient, bytes], None],
        log: Callable[[str], None],
    ) -> None:
        """Listen at ``path``, for everybody in the domain (mode 0777). Raises LocalError.

        ``on_request(client, untrusted_body)`` gets the body of each TRIGGER_SERVICE4.
        """
        self.loop = loop
        self.on_request = on_request
        self.log = log
        self.clients: set[LocalClient] = set()
        self.reading: set[LocalClient] = set()
        self._path = path
        self._listener = listen_on(path, 0o777)
        self._paused = False
        self._closed = False
        loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            fd = self._listener._accept()[0]  # type: ignore[attr-defined]
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # No descriptors left: hear nobody for a moment instead of spinning.
            self.log(f"cannot accept local clients: {error.strerror}")
            self.pause()
            self.loop.call_later(ACCEPT_PAUSE, self.resume)
            return
        os.set_blocking(fd, False)
        if len(self.reading) >= MAX_READING:
            os.close(fd)
            return
        client = LocalClient(self, fd)
        self.clients.add(client)
        self.reading.add(client)

    def pause(self) -> None:
        """Accept nobody for the time being."""
        if not self._paused and not self._closed:
            self._paused = True
            self.loop.remove_reader(self._listener.fileno())

    def resume(self) -> None:
        """Accept again."""
        if self._paused and not self._closed:
            self._paused = False
            self.loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Remove the socket and close the clients whose request has not been passed on."""
        if self._closed:
            return
        self.pause()
        self._closed = True
        self._listener.close()
        try:  # noqa: SIM105
            os.unlink(self._path)
        except OSError:
            pass
        for client in list(self.reading):
            client.close()
