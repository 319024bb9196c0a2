"""An open call in Python: its two directions, its errors, and the two ways to make it.

Inside a domain the call is made in this very process, by the agent's trigger socket and the data
engine; in dom0 the program ``qrexec-client`` makes it. ``sluice.api`` is the door to both.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable

from sluice import runtime
from sluice.agent.caller import CallRequest
from sluice.errors import LocalError, RemoteError, SluiceError
from sluice.flow.channel import DataChannel
from sluice.service.command import ServiceError
from sluice.service.start import spawn
from sluice.wire.messages import EXIT_REFUSED

# How much of a service's stderr is kept, and how much is read at once.
MAX_ERRORS = 64 << 10
CHUNK = 65536


class CallError(SluiceError):
    """A call did not succeed; ``status`` is what a client program would exit with."""

    def __init__(self, message: str, status: int) -> None:
        """Take a message for the operator and the status."""
        super().__init__(message)
        self.status = status


class CallRefused(CallError):
    """The call was not allowed, or could not be made at all: nothing ran."""


class CallFailed(CallError):
    """The service ran and ended with a status other than 0, or could not be started (125, 127)."""

    def __init__(self, message: str, result: CallResult) -> None:
        """Take the whole result besides."""
        super().__init__(message, result.status)
        self.result = result


class CallLost(CallError):
    """The other side went away before the call was over."""


class CallResult:
    """What a whole call brought: ``output``, ``errors`` (the last of its stderr), ``status``."""

    __slots__ = ("errors", "output", "status")

    def __init__(self, output: bytes, errors: bytes, status: int) -> None:
        """Keep the three."""
        self.output = output
        self.errors = errors
        self.status = status

    def __bytes__(self) -> bytes:
        """Return the output."""
        return self.output

    def __repr__(self) -> str:
        """Show the sizes and the status, not the content."""
        return f"CallResult({len(self.output)} bytes, {len(self.errors)} of stderr, {self.status})"


class Call:
    """An open call, from ``open_call``. One task may send while another receives."""

    def __init__(self, name: str) -> None:
        """Take the name for messages; ``open_call`` makes it."""
        self._name = name
        self._loop = asyncio.get_running_loop()
        # Our ends of the two pipes that the engine, or the client program, holds the others of.
        self._to_service = -1
        self._from_service = -1
        self._errors = bytearray()
        self._over: asyncio.Future[int] = self._loop.create_future()
        # Who waits for which pipe now; sends under way, and whether the end is to follow them;
        # whether output was left behind.
        self._waiting: dict[asyncio.Future[None], int] = {}
        self._sending = 0
        self._eof_due = False
        self._left = False
        self._close: Callable[[], None] = lambda: None

    @property
    def errors(self) -> bytes:
        """What came of the service's stderr so far; the last 64 KiB of it."""
        return bytes(self._errors)

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of ``data``, waiting while the service does not take it.

        Raises CallLost where the service takes nothing any more, or the call was left meanwhile.
        """
        rest = memoryview(data)
        self._sending += 1
        try:
            while rest:
                if self._left:
                    raise CallLost(f"{self._name}: given up", 255)
                if self._to_service < 0:
                    raise LocalError("send after send_eof")
                try:
                    rest = rest[os.write(self._to_service, rest) :]
                except BlockingIOError:
                    await self._ready(self._to_service, writing=True)
                except BrokenPipeError:
                    raise CallLost(f"{self._name}: the service takes no more input", 255) from None
        finally:
            self._sending -= 1
            if self._eof_due and not self._sending:
                self._close_input()

    async def send_eof(self) -> None:
        """Tell the service that nothing more comes; harmless when repeated.

        A ``send`` of another task that is under way is cut off.
        """
        self._close_input()

    async def receive(self, size: int = CHUNK) -> bytes:
        """Return some of the service's output, at most ``size`` bytes; nothing at its end.

        Raises CallLost where the call was left before that end.
        """
        while self._from_service >= 0:
            try:
                data = os.read(self._from_service, size)
            except BlockingIOError:
                await self._ready(self._from_service, writing=False)
                continue
            if not data:
                self._close_output()
            return data
        if self._left:
            raise CallLost(f"{self._name}: given up", 255)
        return b""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over the output in pieces as they come."""
        return self._pieces()

    async def _pieces(self) -> AsyncIterator[bytes]:
        while data := await self.receive():
            yield data

    async def wait(self) -> int:
        """Return the exit status once the call is over; all output should be received before.

        The input ends with it: at once, or behind what another task is sending. Raises CallLost
        where the channel ended before the status came.
        """
        self._eof_due = True
        if not self._sending:
            self._close_input()
        return await asyncio.shield(self._over)

    async def _ready(self, fd: int, *, writing: bool) -> None:
        """Wait until ``fd`` can be read or written; several tasks may."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        if writing:
            self._loop.add_writer(fd, self._wake, fd)
        else:
            self._loop.add_reader(fd, self._wake, fd)
        self._waiting[waiter] = fd
        try:
            await waiter
        finally:
            del self._waiting[waiter]
            # Not where it was closed meanwhile: the number may be somebody else's.
            if fd not in self._waiting.values():
                if writing and fd == self._to_service:
                    self._loop.remove_writer(fd)
                elif not writing and fd == self._from_service:
                    self._loop.remove_reader(fd)

    def _wake(self, fd: int) -> None:
        """Have whoever waits for a pipe look at it again."""
        for waiter, waits_for in self._waiting.items():
            if waits_for == fd and not waiter.done():
                waiter.set_result(None)

    def _close_input(self) -> None:
        if self._to_service >= 0:
            self._loop.remove_writer(self._to_service)
            os.close(self._to_service)
            self._wake(self._to_service)
            self._to_service = -1

    def _close_output(self) -> None:
        if self._from_service >= 0:
            self._loop.remove_reader(self._from_service)
            os.close(self._from_service)
            self._wake(self._from_service)
            self._from_service = -1

    def _finish(self, status: int | None, error: Exception | None = None) -> None:
        if self._over.done():
            return
        if error is not None:
            self._over.set_exception(error)
            # Whoever does not ask need not hear of it.
            self._over.exception()
        else:
            assert status is not None
            self._over.set_result(status)

    def close(self) -> None:
        """End the call at once, whatever its state. Harmless when repeated."""
        self._close()
        self._left = self._left or self._to_service >= 0 or self._from_service >= 0
        self._close_input()
        self._close_output()
        self._finish(None, CallLost(f"{self._name}: given up", 255))

    def _take_pipes(self) -> tuple[int, int]:
        """Make the two pipes; return the ends for the engine: (its input, its output)."""
        for_engine_read, self._to_service = os.pipe()
        try:
            self._from_service, for_engine_write = os.pipe()
        except OSError:
            os.close(for_engine_read)
            raise
        os.set_blocking(self._to_service, False)
        os.set_blocking(self._from_service, False)
        return for_engine_read, for_engine_write

    def _note_errors(self, data: memoryview) -> None:
        self._errors += data
        if len(self._errors) > MAX_ERRORS:
            del self._errors[: len(self._errors) - MAX_ERRORS]


class DomainCall(Call):
    """A call made inside a domain: the agent is asked, the engine runs in this process."""

    def __init__(
        self, name: str, service: str, target: str, source: str, agent_socket: str
    ) -> None:
        """Take what to ask for, and where."""
        super().__init__(name)
        self._service = service
        self._target = target
        self._source = source
        self._agent_socket = agent_socket

    async def open(self) -> None:
        """Ask and join. Raises CallRefused."""
        opened: asyncio.Future[tuple[int, int]] = self._loop.create_future()

        def fail(error: Exception) -> None:
            if not opened.done():
                opened.set_exception(error)

        def join(read_fd: int, write_fd: int) -> None:
            if opened.done():
                os.close(read_fd)
                if write_fd != read_fd:
                    os.close(write_fd)
            else:
                opened.set_result((read_fd, write_fd))

        request = CallRequest(
            self._loop,
            os.fsencode(self._target),
            os.fsencode(self._service),
            source=os.fsencode(self._source),
            agent_socket=self._agent_socket,
            on_open=join,
            on_refused=lambda: fail(CallRefused(f"{self._name}: refused", EXIT_REFUSED)),
            on_error=lambda text: fail(CallRefused(f"{self._name}: {text}", 1)),
        )
        self._close = request.close
        try:
            read_fd, write_fd = await opened
        except BaseException:
            request.cancel()
            raise
        engine_out, engine_in = self._take_pipes()
        channel = DataChannel(
            self._loop,
            read_fd,
            write_fd,
            caller=True,
            in_fd=engine_in,
            out_fd=engine_out,
            on_done=lambda status: self._done(channel, request, status),
            on_fatal=lambda text: self._broken(request, text),
            on_stderr=self._note_errors,
        )

        def give_up() -> None:
            channel.close()
            request.close()

        self._close = give_up
        channel.start()

    def _done(self, channel: DataChannel, request: CallRequest, status: int) -> None:
        request.close()
        if channel.lost and status == 255:
            self._finish(None, CallLost(f"{self._name}: the other side went away", 255))
        else:
            self._finish(status)

    def _broken(self, request: CallRequest, reason: str) -> None:
        request.close()
        self._finish(None, RemoteError(f"{self._name}: {reason}"))


class Dom0Call(Call):
    """A call made in dom0, by the program qrexec-client."""

    def __init__(self, name: str, service: str, target: str, directory: str | None) -> None:
        """Take what to call, and where the daemons' sockets are if not in the usual place."""
        super().__init__(name)
        self._service = service
        self._target = target
        self._directory = directory

    async def open(self) -> None:
        """Start the program. Raises CallRefused."""
        words = [runtime.launcher("qrexec-client"), "-d", self._target]
        if self._directory is not None:
            words.append(f"--socket-dir={self._directory}")
        words.append(f"DEFAULT:QUBESRPC {self._service} dom0")
        engine_out, engine_in = self._take_pipes()
        error_read, error_write = os.pipe()
        argv = [os.fsencode(word) for word in words]
        try:
            pid = spawn(argv, os.environb, engine_out, engine_in, error_write)
        except ServiceError as error:
            os.close(error_read)
            raise CallRefused(f"{self._name}: {error}", error.code) from error
        finally:
            for fd in (engine_out, engine_in, error_write):
                os.close(fd)
        os.set_blocking(error_read, False)
        pidfd = os.pidfd_open(pid)
        self._loop.add_reader(error_read, self._errors_readable, error_read)
        self._loop.add_reader(pidfd, self._ended, pid, pidfd, error_read)
        self._close = lambda: self._kill(pid, pidfd, error_read)

    def _errors_readable(self, fd: int) -> None:
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return
        self._note_errors(memoryview(data))
        if not data:
            self._loop.remove_reader(fd)

    def _kill(self, pid: int, pidfd: int, error_read: int) -> None:
        if not self._over.done():
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            # It ends at once, and nobody may come this way again to reap it.
            self._ended(pid, pidfd, error_read)

    def _ended(self, pid: int, pidfd: int, error_read: int) -> None:
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._errors_readable(error_read)
        self._loop.remove_reader(error_read)
        os.close(error_read)
        if status < 0:
            self._finish(None, CallLost(f"{self._name}: qrexec-client was killed", 255))
        else:
            self._finish(status)
