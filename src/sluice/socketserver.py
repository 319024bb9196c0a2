"""A server for socket services: one process that answers many calls, of one or several services.

Theory. A socket service is reached by a link in a service directory that leads to the server's
Unix socket. Each call is one connection; its first bytes are the service descriptor (what was
called, by whom) up to a NUL, the rest is the caller's data; what is written back is the output, and
closing ends the call with status 0: there is no stderr and no other status. The server is trusted
by nobody but its own domain's agent, and trusts nobody: the descriptor must come in time, the
number of calls at once is bounded, and each has its deadline.

``listen_fds`` takes sockets from systemd, so that the server starts when it is first called.
docs/spec/wire-protocol.md 9.3.2, docs/writing-a-service.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
from collections.abc import Awaitable, Callable

from sluice.errors import LocalError, RemoteError, ResourceError
from sluice.service.command import MAX_DESCRIPTOR
from sluice.wire.names import escape

log = logging.getLogger("sluice.socketserver")

DESCRIPTOR_TIMEOUT = 10.0
DRAIN_TIMEOUT = 2.0
FIRST_LISTEN_FD = 3

Handler = Callable[["ServiceRequest"], Awaitable[bytes | None]]


class ServiceRequest:
    """One call: who calls what, and its two directions.

    ``service`` and ``argument`` (None without ``+``), ``source``, and in dom0 ``target_type``
    (``name`` or ``keyword``) with ``target``; both empty in a domain. All are validated text.
    """

    def __init__(
        self, descriptor: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Parse the descriptor. Raises RemoteError where it is none."""
        words = [word for word in descriptor.split(" ") if word]
        if len(words) not in (2, 4) or not descriptor.isascii() or not descriptor.isprintable():
            raise RemoteError(f"not a service descriptor: {escape(descriptor)}")
        self.full_name = words[0]
        self.service, plus, argument = words[0].partition("+")
        self.argument = argument if plus else None
        self.source = words[1]
        self.target_type, self.target = words[2:] if len(words) == 4 else ("", "")
        self.reader = reader
        self.writer = writer

    async def read(self, limit: int = 1 << 20) -> bytes:
        """Return all input to its end. Raises ResourceError over ``limit`` bytes."""
        pieces = []
        size = 0
        while piece := await self.reader.read(65536):
            size += len(piece)
            if size > limit:
                raise ResourceError(f"more than {limit} bytes of input")
            pieces.append(piece)
        return b"".join(pieces)

    async def write(self, data: bytes) -> None:
        """Send output, waiting while the caller does not take it."""
        self.writer.write(data)
        await self.writer.drain()


class SocketServer:
    """Serves one or several services on one socket.

    Register handlers with ``service``, then ``await run()`` (or ``start`` and ``stop``). A handler
    gets a ServiceRequest; what it returns, if anything, is written as the output. A handler that
    raises ends its call; the caller sees the end of the output, the operator the log.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        mode: int = 0o600,
        max_calls: int = 64,
        call_timeout: float | None = 300.0,
        idle_timeout: float | None = None,
    ) -> None:
        """Take where to listen; None: only on what systemd passes.

        ``mode`` is the socket file's: the agent, which connects as the user of the domain, must
        be able to write it. ``max_calls`` bounds the calls at once (more wait in the kernel's
        queue), ``call_timeout`` the seconds of each. ``idle_timeout`` ends ``run`` after so many
        seconds without a call, for servers that systemd starts again on demand.
        """
        self._path = path
        self._mode = mode
        self._call_timeout = call_timeout
        self._idle_timeout = idle_timeout
        self._handlers: dict[str, Handler] = {}
        self._listeners: list[socket.socket] = []
        self._own_path: str | None = None
        self._max_calls = max_calls
        self._hears = False
        self._pause: asyncio.TimerHandle | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._last = 0.0

    def service(self, name: str) -> Callable[[Handler], Handler]:
        """Register a handler as a decorator: ``@server.service("test.Upper")``; ``"*"``: any."""

        def register(handler: Handler) -> Handler:
            self._handlers[name] = handler
            return handler

        return register

    async def start(self) -> None:
        """Begin to listen: on systemd's sockets where it passed any, else on the path.

        Raises LocalError.
        """
        self._listeners = listen_fds()
        if not self._listeners:
            if self._path is None:
                raise LocalError("there is no path to listen on, and systemd passed no socket")
            self._listeners = [listen_at(self._path, self._mode)]
            self._own_path = self._path
        self._last = asyncio.get_running_loop().time()
        self._listen()
        notify("READY=1")

    def _listen(self) -> None:
        """Hear of connections, but where as many calls are served as may be: more wait then."""
        if not self._hears and len(self._calls) < self._max_calls:
            for listener in self._listeners:
                asyncio.get_running_loop().add_reader(listener, self._accept, listener)
            self._hears = bool(self._listeners)

    def _deafen(self) -> None:
        if self._hears:
            self._hears = False
            for listener in self._listeners:
                asyncio.get_running_loop().remove_reader(listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("cannot accept: %s", error.strerror)
            self._deafen()
            self._pause = asyncio.get_running_loop().call_later(0.1, self._listen)
            return
        connection.setblocking(False)
        # A call from now on: an idle server that ends does not take it along.
        task = asyncio.ensure_future(self._serve(connection))
        self._calls.add(task)
        task.add_done_callback(self._served)
        if len(self._calls) >= self._max_calls:
            self._deafen()

    def _served(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        self._last = asyncio.get_running_loop().time()
        self._listen()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a call failed", exc_info=error)

    async def _serve(self, connection: socket.socket) -> None:
        """Serve one call and close its connection."""
        reader, writer = await asyncio.open_unix_connection(
            sock=connection, limit=MAX_DESCRIPTOR + 1024
        )
        try:
            async with asyncio.timeout(self._call_timeout):
                async with asyncio.timeout(DESCRIPTOR_TIMEOUT):
                    descriptor = (await reader.readuntil(b"\0"))[:-1]
                request = ServiceRequest(descriptor.decode("ascii", "replace"), reader, writer)
                await self._answer(request)
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            log.warning("a call was given up: its descriptor or its end did not come in time")
        except (RemoteError, ResourceError, ConnectionError) as error:
            log.warning("a call was given up: %s", error)
        finally:
            writer.transport.abort()

    async def _answer(self, request: ServiceRequest) -> None:
        handler = self._handlers.get(request.service) or self._handlers.get("*")
        if handler is None:
            raise RemoteError(f"no handler for {escape(request.full_name)}")
        output = await handler(request)
        if output is not None:
            await request.write(output)

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or the idle time-out; running calls get two seconds then."""
        loop = asyncio.get_running_loop()
        await self.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        try:
            while not self._stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._idle_left()):
                        await self._stopping.wait()
                if self._is_over():
                    break
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            await self.stop()

    def _is_over(self) -> bool:
        """Tell whether the server has been idle for long enough, and nobody waits to be served."""
        if self._idle_timeout is None or self._calls or self._idle_left():
            return False
        # A connection of which the loop has not heard yet is in the queue.
        poll = select.poll()
        for listener in self._listeners:
            poll.register(listener, select.POLLIN)
        return not poll.poll(0)

    def _idle_left(self) -> float | None:
        """Return the seconds until the server has been idle for long enough; None: for ever."""
        if self._idle_timeout is None:
            return None
        if self._calls:
            return self._idle_timeout
        now = asyncio.get_running_loop().time()
        return max(self._last + self._idle_timeout - now, 0.0)

    async def stop(self) -> None:
        """Stop listening, give running calls two seconds, end the others."""
        self._deafen()
        if self._pause is not None:
            self._pause.cancel()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        if self._own_path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._own_path)
            self._own_path = None
        if self._calls:
            await asyncio.wait(self._calls, timeout=DRAIN_TIMEOUT)
        for call in list(self._calls):
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)


def listen_at(path: str, mode: int) -> socket.socket:
    """Remove a stale socket at ``path``, bind and listen with the file's ``mode``.

    Raises LocalError, also where something answers there already.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    probe = socket.socket(socket.AF_UNIX)
    before = os.umask(0o777 & ~mode)
    try:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            probe.connect(path)
            raise LocalError(f"another server listens at {path} already")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        listener.listen(64)
    except (OSError, LocalError) as error:
        listener.close()
        if isinstance(error, LocalError):
            raise
        raise LocalError(f"cannot listen at {path}: {error.strerror or error}") from error
    finally:
        os.umask(before)
        probe.close()
    return listener


def listen_fds() -> list[socket.socket]:
    """Return the sockets that systemd passed to this process, none where it passed none.

    Takes LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES out of the environment, so that no child
    believes them. Raises LocalError for a descriptor that is no listening stream socket.
    """
    mine = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    count = os.environ.pop("LISTEN_FDS", "0")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not mine or not count.isdigit():
        return []
    sockets = []
    for fd in range(FIRST_LISTEN_FD, FIRST_LISTEN_FD + int(count)):
        os.set_inheritable(fd, False)
        try:
            passed = socket.socket(fileno=fd)
            listening = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise LocalError(f"descriptor {fd} from systemd: {error.strerror}") from error
        if passed.type != socket.SOCK_STREAM or not listening:
            raise LocalError(f"descriptor {fd} from systemd is no listening stream socket")
        passed.setblocking(False)
        sockets.append(passed)
    return sockets


def notify(state: str) -> None:
    """Tell systemd of our state, where NOTIFY_SOCKET asks for it."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier,
    ):
        notifier.sendto(state.encode(), address)
