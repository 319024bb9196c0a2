"""qrexec-client: runs a command in a domain from dom0, or completes a call that a domain made.

Four modes by what the target is and whether a call is completed (docs/spec/wire-protocol.md 12.2):

====  ==========  ====  ==================================================================
mode  target      -c    what happens
====  ==========  ====  ==================================================================
A     a domain    no    the command runs there, joined to our streams or to ``-l``
B     a domain    yes   the command runs there, joined to the domain that asked
C     dom0        yes   a service runs here, joined to the domain that asked
D     dom0        no    a service runs here, in our place
====  ==========  ====  ==================================================================

A small program: it loads what only some modes need where it is needed.
"""

from __future__ import annotations

import os

from sluice.adminvm.ask import DaemonConnection
from sluice.adminvm.client_options import Settings, parse_arguments
from sluice.agent.options import (
    Exit,
    die_of_broken_pipe,
    die_of_interrupt,
    explain_silence,
    has_standard_descriptors,
    write_error,
)
from sluice.errors import LocalError, SluiceError
from sluice.flow.channel import DataChannel
from sluice.flow.reactor import Reactor
from sluice.service.command import MARKER, ServiceError
from sluice.wire import messages as wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.adminvm.ask import Reply
    from sluice.service.start import Started


def main(arguments: list[str]) -> int:
    """Run the program with its arguments (without its name); returns the exit status (12)."""
    die_of_interrupt()
    if not has_standard_descriptors("qrexec-client"):
        return wire.EXIT_FAILURE
    try:
        settings = parse_arguments(arguments)
        if settings.completes:
            return _serve(settings) if settings.is_dom0 else _connect(settings)
        return _replace(settings) if settings.is_dom0 else _run(settings)
    except Exit as exit_:
        if str(exit_):
            write_error(f"{exit_}\n")
        return exit_.status


def say(text: str) -> None:
    """Tell the operator."""
    write_error(f"qrexec-client: {text}\n")


# --- mode A -----------------------------------------------------------------------------------


def _run(settings: Settings) -> int:
    """Run the command in a domain and kill the domain afterwards where that is wanted (12.3)."""
    call = _Call(settings)
    status = call.run()
    if settings.kill and not call.violated:
        from sluice.adminvm.qubesd import call_blocking

        try:
            call_blocking("admin.vm.Kill", settings.target)
        except SluiceError as error:
            say(f"killing {settings.target}: {error}")
    return status


class _Call:
    """One command in a domain, joined to our streams or to a local program."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._reactor = Reactor()
        self._status = wire.EXIT_FAILURE
        self._channel: DataChannel | None = None
        self._local: Started | None = None
        self._local_status: int | None = None
        self._server: object = None
        self.violated = False

    def run(self) -> int:
        """Make the call; returns the exit status (12.2 A)."""
        settings = self._settings
        try:
            daemon = DaemonConnection(settings.socket_dir, settings.target)
            kind = wire.JUST_EXEC if settings.just_execute else wire.EXEC_CMDLINE
            daemon.send(kind, 0, 0, settings.command + b"\0")
            reply = daemon.reply(kind)
            self._start_local()
        except ServiceError as error:
            say(str(error))
            return error.code
        except SluiceError as error:
            say(str(error))
            return wire.EXIT_FAILURE
        try:
            self._wait_for_peer(reply)
        except SluiceError as error:
            say(str(error))
            return wire.EXIT_FAILURE
        self._reactor.run()
        daemon.close()
        if settings.no_exit_code and self._channel is not None and self._channel.opened:
            return 1 if self.violated else 0
        return self._status & 0xFF

    def _start_local(self) -> None:
        """Start ``-l``: a service of dom0's, or a command for bash. Raises ServiceError."""
        command = self._settings.local
        if command is None:
            return
        from sluice.adminvm.dom0 import watch_exit
        from sluice.service.command import parse_command
        from sluice.service.lookup import find_service
        from sluice.service.start import start_service, start_shell

        os.environb[b"QREXEC_REMOTE_DOMAIN"] = os.fsencode(self._settings.target)
        parsed = parse_command(command, with_user=False)
        if parsed.is_service:
            found = find_service(parsed)
            self._local = start_service(found, parsed, environment=os.environb, dom0=True)
        else:
            self._local = start_shell(  # noqa: S604  the operator's own command
                parsed, environment=os.environb, shell=b"/bin/bash", stderr="inherit"
            )
        if self._local.pid > 0:
            watch_exit(self._reactor, self._local.pid, self._local_ended)

    def _local_ended(self, status: int) -> None:
        self._local_status = status
        if self._channel is not None:
            self._channel.process_exited(status)

    def _wait_for_peer(self, reply: Reply) -> None:
        """Have a channel: the descriptors of the reply, or a vchan server of our own."""
        timeout = float(self._settings.timeout)
        if reply.fds:
            self._join(reply.fds[0], reply.fds[1], timeout)
            return
        from sluice.vchan.socketdir import Server

        try:
            self._server = Server(
                self._reactor,
                reply.domain,
                reply.port,
                lambda fd: self._join(fd, fd, 10.0),
                timeout or None,
                self._late,
            )
        except OSError as error:
            raise LocalError(f"{error.filename}: {error.strerror}") from error

    def _late(self) -> None:
        say("the domain did not connect in time")
        self._reactor.stop()

    def _join(self, read_fd: int, write_fd: int, timeout: float) -> None:
        """Run the engine as the caller."""
        settings, local = self._settings, self._local
        in_fd, out_fd = (0, 0) if settings.stdin_socket else (1, 0)
        if local is not None:
            in_fd, out_fd = local.in_fd, local.out_fd
        self._channel = DataChannel(
            self._reactor,
            read_fd,
            write_fd,
            caller=True,
            in_fd=in_fd,
            out_fd=out_fd,
            on_done=self._done,
            on_fatal=self._fatal,
            has_process=local is not None and local.pid > 0,
            prefix=settings.prefix,
            service_descriptor=local.descriptor if local is not None else b"",
            filter_stdout=settings.filter_stdout,
            filter_stderr=settings.filter_stderr,
            handshake_timeout=timeout,
            on_unwanted=die_of_broken_pipe if settings.hangup and local is None else None,
        )
        self._channel.start()
        if self._local_status is not None:
            self._channel.process_exited(self._local_status)

    def _done(self, status: int) -> None:
        settings, channel = self._settings, self._channel
        assert channel is not None
        service = _service_of(settings.command)
        if channel.lost or (service and not settings.no_exit_code):
            why = explain_silence(channel, service or b"the command", settings.target)
            if why:
                say(why)
        self._status = status
        self._reactor.stop()

    def _fatal(self, reason: str) -> None:
        say(f"data channel: {reason}")
        if self._channel is not None and self._channel.opened:
            self._status = wire.EXIT_LOCAL_FAILURE
            self.violated = True
        self._reactor.stop()


def _service_of(command: bytes) -> bytes:
    """Return the descriptor of the service that a command line calls; empty for a shell command."""
    words = command.partition(b":")[2].split(b" ")
    return words[1] if words[0] == MARKER and len(words) > 1 else b""


# --- mode B -----------------------------------------------------------------------------------


def _connect(settings: Settings) -> int:
    """Let a domain's call be answered by another domain (12.2 B)."""
    try:
        if settings.target.startswith("@"):
            raise ServiceError("a disposable cannot be made here")
        daemon = DaemonConnection(settings.socket_dir, settings.target)
        daemon.send(wire.EXEC_CMDLINE, settings.source_number, 0, settings.command + b"\0")
        reply = daemon.reply(wire.EXEC_CMDLINE)
        for fd in reply.fds:
            os.close(fd)
        if not settings.wait:
            daemon.close()
        source = DaemonConnection(settings.socket_dir, str(settings.source_number))
        ident = wire.pad(settings.request_id, wire.IDENT_SIZE)
        source.send(wire.SERVICE_CONNECT, reply.domain, reply.port, ident)
        source.close()
    except SluiceError as error:
        say(str(error))
        return wire.EXIT_CONNECT_FAILED
    if settings.wait:
        daemon.wait_for_end()
    return 0


# --- mode C -----------------------------------------------------------------------------------


def _serve(settings: Settings) -> int:
    """Answer a domain's call with a service of dom0's (12.2 C)."""
    from sluice.adminvm.dom0 import Dom0Call

    reactor = Reactor()
    result = [wire.EXIT_FAILURE, False]

    def finish(status: int) -> None:
        result[:] = [status, True]
        reactor.stop()

    def failed(reason: str) -> None:
        say(reason)
        service.close()
        reactor.stop()

    service = Dom0Call(reactor, settings.command, environment=os.environb, on_done=finish, log=say)
    try:
        daemon = DaemonConnection(settings.socket_dir, str(settings.source_number))
        ident = wire.pad(settings.request_id, wire.IDENT_SIZE)
        daemon.send(wire.SERVICE_CONNECT, 0, 0, ident)
        reply = daemon.reply(wire.SERVICE_CONNECT)
        os.environb[b"QREXEC_REMOTE_DOMAIN"] = settings.source_name
        service.start()
        client = _reach(reactor, reply, settings.timeout, service.connect, failed)
    except SluiceError as error:
        say(str(error))
        service.close()
        return wire.EXIT_FAILURE
    reactor.run()
    del client
    daemon.close()
    status, done = int(result[0]), bool(result[1])
    if not done or service.failed or service.broken:
        return status
    return 0 if settings.no_exit_code else status & 0xFF


def _reach(
    reactor: Reactor,
    reply: Reply,
    timeout: int,
    on_connected: Callable[[int, int], None],
    on_failed: Callable[[str], None],
) -> object:
    """Connect to the channel of a reply, as its service side."""
    if reply.fds:
        on_connected(reply.fds[0], reply.fds[1])
        return None
    from sluice.vchan.socketdir import Client

    return Client(
        reactor,
        reply.domain,
        reply.port,
        lambda fd: on_connected(fd, fd),
        float(timeout) or None,
        on_failed,
    )


# --- mode D -----------------------------------------------------------------------------------


def _replace(settings: Settings) -> int:
    """Become a service of dom0's (12.2 D)."""
    if settings.local is not None or not settings.command.startswith(b"DEFAULT:"):
        say("in dom0 only DEFAULT:QUBESRPC ... can be run, without a local command")
        return wire.EXIT_FAILURE
    from sluice.adminvm.become import become_service

    try:
        return become_service(settings.command[len(b"DEFAULT:") :])
    except ServiceError as error:
        say(str(error))
        return error.code
