"""One service of the AdminVM's own, run for a call and joined to its data channel.

Used by the AdminVM and ``qrexec-daemon`` (asyncio) and by ``qrexec-client -c`` (the small reactor),
so it needs only what both loops have, and imports what a small program may.

The service is started first and the channel joined to it afterwards (docs/spec/wire-protocol.md
6.9.5), each whenever it is ready; a service that cannot be started still gets its channel, for the
failed-start sequence of 13.6. Its stderr goes to us or our log, never to the caller.
"""

from __future__ import annotations

import os

from sluice.flow.channel import DataChannel
from sluice.service.command import Command, ServiceError, parse_command
from sluice.service.configuration import ServiceConfiguration, load_configuration
from sluice.service.lookup import find_program, find_service
from sluice.service.start import Started, launch, spawn
from sluice.wire.messages import EXIT_FAILURE, EXIT_LOCAL_FAILURE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sluice.flow.reactor import Loop
    from sluice.service.address import Connecting

WAITER = b"qubes.WaitForSession"


def watch_exit(loop: Loop, pid: int, on_exit: Callable[[int], None]) -> int:
    """Reap ``pid`` when it ends and pass its status on (0..255, or 128 + signal).

    Returns the pidfd that is watched; it is closed when the process has ended.
    """
    pidfd = os.pidfd_open(pid)

    def ready() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except ChildProcessError:  # somebody else reaped it
            status = EXIT_FAILURE
        on_exit(status if status >= 0 else 128 - status)

    loop.add_reader(pidfd, ready)
    return pidfd


class Dom0Call:
    """One call that dom0 answers: the service, and later its channel."""

    def __init__(
        self,
        loop: Loop,
        text: bytes,
        *,
        environment: Mapping[bytes, bytes],
        on_done: Callable[[int], None],
        log: Callable[[str], None],
        on_gone: Callable[[], None] | None = None,
        service_path: str | None = None,
        config_path: str | None = None,
        on_stderr: Callable[[int], None] | None = None,
    ) -> None:
        """Take the command without user part (6.9.5).

        ``on_done`` is called once, with the service's status, or 1 after a breach of the protocol
        on the channel (125 where the handshake failed); ``broken`` is set then. ``on_gone`` is
        called once when, besides, no process of the call is left: after a breach the service goes
        on with its streams closed. The paths replace the search
        lists of the environment. ``on_stderr`` gets the descriptor from which the service's stderr
        is to be read, to keep; without it the service has ours.
        """
        self._loop = loop
        self._text = text
        self._environment = environment
        self._on_done = on_done
        self._log = log
        self._on_gone = on_gone
        self._service_path = service_path
        self._config_path = config_path
        self._on_stderr = on_stderr
        self._settings = ServiceConfiguration()
        self._started: Started | None = None
        self._failed: int | None = None
        self._attempt: Connecting | None = None
        self._ends: tuple[int, int] | None = None
        self._channel: DataChannel | None = None
        self._exited: int | None = None
        self._pid = -1
        self._over = False
        self.broken = False

    @property
    def failed(self) -> bool:
        """Whether the service could not be started."""
        return self._failed is not None

    # --- the service ----------------------------------------------------------------------

    def start(self) -> None:
        """Find, configure and start the service; failures are kept for the channel."""
        try:
            command = parse_command(self._text, with_user=False)
            if not command.is_service:
                raise ServiceError("dom0 runs services only")
            self._settings = load_configuration(command, self._config_path)
            if self._settings.wait_for_session and not command.nogui:
                self._wait_for_session(command)
            else:
                self._launch(command)
        except ServiceError as error:
            self._fail(error)

    def _wait_for_session(self, command: Command) -> None:
        """Run the waiter first; its failure does not matter (9.5)."""
        try:
            waiter = find_program(WAITER, self._service_path)
            if waiter is None:
                raise ServiceError("there is no qubes.WaitForSession")
            environment = dict(self._environment)
            environment[b"QREXEC_REMOTE_DOMAIN"] = command.source
            null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._pid = spawn([waiter], environment, null, 2, 2)
            finally:
                os.close(null)
        except ServiceError as error:
            self._log(f"waiting for the session: {error}")
            self._launch(command)
            return
        watch_exit(self._loop, self._pid, lambda status: self._waited(command))

    def _waited(self, command: Command) -> None:
        self._pid = -1
        if self._over:
            self._note_gone()
            return
        try:
            self._launch(command)
        except ServiceError as error:
            self._fail(error)

    def _launch(self, command: Command) -> None:
        self._attempt = launch(
            self._loop,
            find_service(command, self._service_path),
            command,
            environment=self._environment,
            on_started=self._running,
            on_failed=self._fail,
            dom0=self._on_stderr is None,
            skip_descriptor=self._settings.skip_service_descriptor,
        )

    def _running(self, started: Started) -> None:
        self._attempt = None
        self._started = started
        if started.err_fd >= 0 and self._on_stderr is not None:
            self._on_stderr(started.err_fd)
        if started.pid > 0:
            self._pid = started.pid
            watch_exit(self._loop, started.pid, self._process_exited)
        self._join()

    def _fail(self, error: ServiceError) -> None:
        self._attempt = None
        self._log(str(error))
        self._failed = error.code
        self._join()

    def _process_exited(self, status: int) -> None:
        self._pid = -1
        self._exited = status
        if self._channel is not None:
            self._channel.process_exited(status)
        self._note_gone()

    # --- the channel ----------------------------------------------------------------------

    def connect(self, read_fd: int, write_fd: int) -> None:
        """Take our ends of the data channel; they are the call's to close."""
        self._ends = (read_fd, write_fd)
        self._join()

    def _join(self) -> None:
        if self._over or self._ends is None or (self._started is None and self._failed is None):
            return
        (read_fd, write_fd), self._ends = self._ends, None
        started = self._started
        self._channel = channel = DataChannel(
            self._loop,
            read_fd,
            write_fd,
            caller=False,
            in_fd=started.in_fd if started else -1,
            out_fd=started.out_fd if started else -1,
            err_fd=-1,
            on_done=self._done,
            on_fatal=self._fatal,
            hello="read-first",
            has_process=started is not None and started.pid > 0,
            service_descriptor=started.descriptor if started else b"",
            exit_on_client_eof=self._settings.exit_on_client_eof,
            exit_on_service_eof=self._settings.exit_on_service_eof,
            on_open=None if started else self._report_failure,
        )
        channel.start()
        if self._exited is not None:
            channel.process_exited(self._exited)

    def _report_failure(self) -> None:
        assert self._channel is not None and self._failed is not None
        self._channel.fail(self._failed, dom0=True)

    def _fatal(self, reason: str) -> None:
        assert self._channel is not None
        self._log(f"data channel: {reason}")
        self.broken = True
        self._done(EXIT_LOCAL_FAILURE if self._channel.opened else EXIT_FAILURE)

    def _done(self, status: int) -> None:
        if not self._over:
            self._over = True
            self._on_done(self._failed if self._failed is not None else status)
            self._note_gone()

    def _note_gone(self) -> None:
        if self._over and self._pid < 0 and self._on_gone is not None:
            told, self._on_gone = self._on_gone, None
            told()

    # --- the end --------------------------------------------------------------------------

    def close(self, signal: int = 9) -> None:
        """Give the call up: close the channel, end the service and its whole session.

        ``on_done`` is not called any more. The process is still reaped by the loop. May be
        repeated.
        """
        self._over = True
        if self._attempt is not None:
            self._attempt.close()
        started, self._started = self._started, None
        if self._channel is not None:
            self._channel.close()
        elif started is not None:
            for fd in {started.in_fd, started.out_fd}:
                os.close(fd)
        ends, self._ends = self._ends, None
        for fd in set(ends or ()):
            os.close(fd)
        if self._pid > 0:
            try:  # noqa: SIM105  contextlib is too dear for the small programs
                os.killpg(self._pid, signal)
            except ProcessLookupError:
                pass
        self._note_gone()
