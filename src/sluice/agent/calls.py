"""One call on the service side: its data channel, what it starts, and its end.

Theory. A call goes through: *planned* (the command is parsed and its configuration read; an error
there is kept, because the caller must hear of it over the data channel), *connected*, *open* (the
handshake is done), *running*, *over*. The command starts only when the channel is open. Whatever
goes wrong before it runs is answered with the failed start (13.6). When the call is over, for
whatever reason, ``on_end`` is called exactly once; for a lost channel that is after the process
has ended (10.8). The agent and the fork server share all of this.

docs/spec/wire-protocol.md 7.4.1, 7.4.5, 9, 10.
"""

from __future__ import annotations

import os

from sluice.agent.log import LineSink, LoggerSink
from sluice.agent.sessions import hang_up
from sluice.errors import LocalError
from sluice.flow.channel import DataChannel
from sluice.service.command import Command, ServiceError
from sluice.service.lookup import EXECUTABLE, Found, find_service
from sluice.service.start import (
    Started,
    launch,
    service_argv,
    service_environment,
    socket_descriptor,
    spawn,
    spawn_connected,
)
from sluice.vchan import socketdir
from sluice.wire.messages import EXEC_CMDLINE, EXIT_FAILURE, JUST_EXEC
from sluice.wire.names import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    from sluice.agent.planning import Plan
    from sluice.agent.processes import ProcessTable
    from sluice.flow.reactor import Loop
    from sluice.service.start import Start

    class Users(Protocol):
        """How things are run as somebody; see agent.users."""

        def program(self, user: bytes, argv: list[bytes], environment: dict[bytes, bytes]) -> Start:
            """Return what to execute for a service."""

        def shell(self, user: bytes, text: bytes, environment: dict[bytes, bytes]) -> Start:
            """Return what to execute for a shell command."""


CONNECT_TIMEOUT = 120.0
HANDSHAKE_TIMEOUT = 10.0


class Surroundings:
    """What the calls of one agent have in common."""

    def __init__(
        self,
        loop: Loop,
        processes: ProcessTable,
        users: Users,
        log: Callable[[str], None],
        *,
        system_log: bool,
        environment: Mapping[bytes, bytes],
    ) -> None:
        """Take the loop, the processes, the way to run things, and the base environment.

        ``system_log`` says whether stderr of services goes to ``logger``.
        """
        self.loop = loop
        self.processes = processes
        self.users = users
        self.log = log
        self._system_log = system_log
        self.environment = dict(environment)
        self.environment[b"QREXEC_AGENT_PID"] = b"%d" % os.getpid()

    def sink(self, command: Command) -> LineSink | LoggerSink:
        """Make the log of one service's stderr (9.6)."""
        tag = command.descriptor + b"-" + command.source
        if self._system_log:
            try:
                return LoggerSink(self.loop, tag, lambda pid: self.processes.watch(pid, None))
            except OSError as error:
                self.log(f"no log for {escape(tag)}: {error.strerror}")
        return LineSink(self.loop, tag)


class ServiceCall:
    """Serves one EXEC_CMDLINE or JUST_EXEC; see the module's theory."""

    def __init__(
        self,
        around: Surroundings,
        kind: int,
        domain: int,
        port: int,
        planned: Plan,
        fds: tuple[int, int] | None,
        on_end: Callable[[ServiceCall], None],
    ) -> None:
        """Take the request and, over `passed`, the (read end, write end), which are ours now."""
        self.domain = domain
        self.port = port
        self._around = around
        self._kind = kind
        self._plan = planned
        self._fds = fds
        self._on_end: Callable[[ServiceCall], None] | None = on_end
        self._found: Found | None = None
        self._channel: DataChannel | None = None
        self._connecting: Any = None
        self._starting: Any = None
        self._sink: LineSink | LoggerSink | None = None
        self._pid = -1
        # What is to end when the caller is gone, unless it has been told already.
        self._session = -1

    # --- connecting ----------------------------------------------------------------------------

    def begin(self) -> None:
        """Connect the data channel, at once over `passed`, else as vchan client (7.4.1 step 5)."""
        if self._plan.error is not None:
            self._complain(self._plan.error)
        if self._fds is not None:
            self._open(*self._fds)
            return
        try:
            self._connecting = socketdir.Client(
                self._around.loop,
                self.domain,
                self.port,
                lambda fd: self._open(fd, fd),
                CONNECT_TIMEOUT,
                self._lost,
            )
        except (LocalError, OSError) as error:
            self._around.loop.call_soon(self._lost, str(error))

    def _open(self, read_fd: int, write_fd: int) -> None:
        self._connecting = None
        plan = self._plan
        command = plan.command
        first = b""
        if plan.error is None and command is not None and command.is_service:
            self._find(command)
            if self._found is not None and self._found.kind != EXECUTABLE:
                skip = plan.configuration.skip_service_descriptor
                first = socket_descriptor(command, skip)
        self._channel = DataChannel(
            self._around.loop,
            read_fd,
            write_fd,
            caller=False,
            in_fd=-1,
            out_fd=-1,
            err_fd=-1,
            on_done=self._done,
            on_fatal=self._lost,
            hello="send-first",
            service_descriptor=first,
            exit_on_client_eof=plan.configuration.exit_on_client_eof and bool(self._is_socket),
            exit_on_service_eof=plan.configuration.exit_on_service_eof and bool(self._is_socket),
            handshake_timeout=HANDSHAKE_TIMEOUT,
            on_stderr=self._stderr if command is not None and command.is_service else None,
            on_open=self._opened,
            on_out_end=self._around.processes.hear_switches,
        )
        self._channel.start()

    def _find(self, command: Command) -> None:
        try:
            self._found = find_service(command)
        except ServiceError as error:
            self._plan.error = error
            self._complain(error)
            return
        ignored = self._plan.configuration.socket_only()
        if ignored and not self._is_socket:
            self._around.log(
                f"{self._plan.configuration.file}: {', '.join(ignored)} ignored:"
                f" {escape(self._found.path)} is a program"
            )

    @property
    def _is_socket(self) -> bool:
        return self._found is not None and self._found.kind != EXECUTABLE

    # --- starting ------------------------------------------------------------------------------

    def _opened(self) -> None:
        """Start the command now that the peer is there."""
        command = self._plan.command
        try:
            if self._kind not in (EXEC_CMDLINE, JUST_EXEC):
                self._abort()
            elif self._plan.error is not None or command is None:
                self._fail(self._plan.error or ServiceError("no command"))
            elif self._kind == JUST_EXEC:
                self._start_detached(command)
            else:
                self._start(command)
        except OSError as error:
            # Descriptors or processes have run out: this call fails, the agent goes on.
            self._fail(ServiceError(f"cannot start: {error.strerror}"))

    def _start(self, command: Command) -> None:
        around = self._around
        around.processes.listen_for_switches()
        if self._found is not None:
            self._starting = launch(
                around.loop,
                self._found,
                command,
                environment=around.environment,
                on_started=self._started,
                on_failed=self._fail,
                skip_descriptor=True,
                wrap=self._wrap,
            )
            return
        try:
            argv, environment, directory = around.users.shell(
                self._plan.user, command.shell, dict(around.environment)
            )
            started = spawn_connected(argv, environment, directory=directory)
        except ServiceError as error:
            self._fail(error)
            return
        self._started(started)

    def _wrap(self, argv: list[bytes], environment: dict[bytes, bytes]) -> Start:
        return self._around.users.program(self._plan.user, argv, environment)

    def _started(self, started: Started) -> None:
        self._starting = None
        assert self._channel is not None
        if started.pid >= 0:
            self._pid = started.pid
            self._around.processes.watch(started.pid, self._exited, self._channel.use_single_socket)
        self._channel.attach(
            started.in_fd, started.out_fd, started.err_fd, has_process=started.pid >= 0
        )
        if self._plan.command is not None and self._plan.command.hangup:
            self._session = started.pid
            self._channel.watch_peer(self._hang_up)

    def _start_detached(self, command: Command) -> None:
        """Start without streams and report at once (7.4.5)."""
        assert self._channel is not None
        if self._is_socket:
            assert self._found is not None
            self._starting = launch(
                self._around.loop,
                self._found,
                command,
                environment={},
                on_started=self._notify,
                on_failed=self._fail,
                skip_descriptor=self._plan.configuration.skip_service_descriptor,
            )
            return
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        stderr = null
        try:
            environment = dict(self._around.environment)
            if self._found is not None:
                argv, environment, directory = self._wrap(
                    service_argv(self._found, command), service_environment(command, environment)
                )
                stderr = self._around.sink(command).take_stderr()
            else:
                argv, environment, directory = self._around.users.shell(
                    self._plan.user, command.shell, environment
                )
            pid = spawn(argv, environment, null, null, stderr, directory=directory)
        except ServiceError as error:
            self._fail(error)
            return
        finally:
            if stderr != null:
                os.close(stderr)
            os.close(null)
        self._around.processes.watch(pid, None)
        self._channel.send_exit_only(0)

    def _notify(self, started: Started) -> None:
        """Give a socket service its descriptor and leave: JUST_EXEC for sockets (7.4.5)."""
        self._starting = None
        assert self._channel is not None
        code = 0
        try:
            os.set_blocking(started.in_fd, False)
            if os.write(started.in_fd, started.descriptor) < len(started.descriptor):
                code = EXIT_FAILURE
        except OSError:
            code = EXIT_FAILURE
        os.close(started.in_fd)
        self._channel.send_exit_only(code)

    # --- ending --------------------------------------------------------------------------------

    def _stderr(self, untrusted_data: memoryview) -> None:
        if self._sink is None:
            assert self._plan.command is not None
            self._sink = self._around.sink(self._plan.command)
        self._sink.feed(untrusted_data)

    def _exited(self, status: int) -> None:
        self._pid = -1
        if self._channel is not None:
            self._channel.process_exited(status)

    def _complain(self, error: ServiceError) -> None:
        command = self._plan.command
        is_service = command is not None and command.is_service
        name = escape(command.descriptor) if command and is_service else "a command"
        self._around.log(f"{name}: {error}")

    def _fail(self, error: ServiceError) -> None:
        """Report the failed start (13.6)."""
        self._starting = None
        if self._channel is None:
            return
        if self._plan.error is not error:
            self._complain(error)
        if self._kind == JUST_EXEC:
            self._channel.send_exit_only(error.code)
        else:
            self._channel.fail(error.code)

    def _abort(self) -> None:
        """Close the channel without a word: a type that only the fork server can get (8)."""
        assert self._channel is not None
        self._channel.close()
        self._end()

    def _done(self, _status: int) -> None:
        if self._channel is not None and self._channel.cut:
            # The first process may have ended by the loss before we heard of the hang-up.
            self._hang_up()
        self._end()

    def _hang_up(self) -> None:
        """Nobody waits for the command any more: end what it began (9.1.1)."""
        if self._session >= 0:
            session, self._session = self._session, -1
            hang_up(self._around.loop, session)

    def _lost(self, reason: str) -> None:
        self._hang_up()
        self._around.log(
            f"data channel with domain {self.domain}, port {self.port}: {escape(reason)}"
        )
        self._end()

    def _end(self) -> None:
        if self._on_end is None:
            return
        on_end, self._on_end = self._on_end, None
        if self._starting is not None:
            self._starting.close()
            self._starting = None
        if self._pid >= 0:
            self._around.processes.forget(self._pid)
        if self._sink is not None:
            self._sink.close()
        self._channel = None
        on_end(self)

    def close(self) -> None:
        """End the call at once; for an agent that ends."""
        if self._connecting is not None:
            self._connecting.close()
            self._connecting = None
        if self._channel is not None:
            self._channel.close()
        self._end()
