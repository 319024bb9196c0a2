"""qrexec-daemon: the AdminVM's end of one domain's control channel, as a program of its own.

It joins the same link, endpoint and local server as ``sluice up`` with the stand-alone parts: vchan
sockets in a directory, data ports shared with the daemons of other domains, policy from a policy
daemon or program, the life of other domains by way of qubesd.

Its life::

    connect to the agent -> handshake -> sockets -> serve --agent gone--> sockets away, connect ...
                                                   |--SIGTERM--> flush, sockets away, exit 0
                                                   |--SIGINT--> likewise, then die of it
                                                   \\--agent breaks the protocol--> exit 1

A call is handled by a coroutine, not by a child process; what the specification says of the exit of
a handler holds for its end. docs/spec/wire-protocol.md 6.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from typing import Any

from sluice.adminvm.bucket import TokenBucket
from sluice.adminvm.channels import Channel, PortTable
from sluice.adminvm.daemon_calls import CallHandler, refuse
from sluice.adminvm.daemon_options import USAGE, Options, parse_arguments
from sluice.adminvm.endpoint import Endpoint
from sluice.adminvm.link import Link, Rejected, Request
from sluice.adminvm.local import LocalServer, LocalSession
from sluice.adminvm.logs import FoldedLog
from sluice.adminvm.session import LocalRequest
from sluice.adminvm.supervisor import Supervisor
from sluice.agent.options import UsageError, has_standard_descriptors
from sluice.errors import RemoteError, SluiceError
from sluice.flow.selector import run
from sluice.vchan.socketdir import Client
from sluice.wire import messages as wire
from sluice.wire.names import escape

HANDSHAKE_PATIENCE = 10.0
STOP_WITHIN = 1.0
RESTARTS = 0.5  # of the agent a second, in the long run: each costs log lines and work
RESTARTS_BURST = 10.0
EXIT_STARTUP_TIMEOUT = 3


class Ended(Exception):
    """The daemon ends with this status."""

    def __init__(self, status: int) -> None:
        """Take the exit status."""
        super().__init__(f"exit {status}")
        self.status = status


class Daemon:
    """The daemon of one domain. ``run`` is its whole life."""

    def __init__(self, options: Options) -> None:
        """Take the options; the working directory must be the socket directory already."""
        self.options = options
        self.ports = PortTable(options.domid)
        self._tasks = Supervisor(self.log)
        self._handler: CallHandler
        self._endpoint: Endpoint | None = None
        self._folded: FoldedLog
        self._terminate = asyncio.Event()
        self._signal = signal.SIGTERM
        self._greeted = asyncio.Event()
        self._lost = asyncio.Event()
        self._broken = False

    def log(self, text: str) -> None:
        """Write a line for the operator."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        program = f"qrexec-daemon[{os.getpid()}]"
        sys.stderr.write(f"{stamp}.{int(now * 1000) % 1000:03d} {program}: {text}\n")
        sys.stderr.flush()

    # --- life -----------------------------------------------------------------------------

    async def run(self, started: object = None) -> int:
        """Serve until the end; returns the exit status. ``started()`` is called once, when ready.

        The status is that of a signal, negative, where the program must die of it: of SIGINT, and
        of SIGTERM while there was no agent.
        """
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop, signal.SIGTERM)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGINT, self._stop, signal.SIGINT)
        restarts = TokenBucket(RESTARTS, RESTARTS_BURST, loop.time)
        self._folded = FoldedLog(loop, self.log)
        self._handler = CallHandler(self.options, self.ports, self._folded)
        timeout = self.options.startup_timeout
        try:
            while True:
                sock = await self._connect(timeout)
                await self._handshake(sock)
                self._open_sockets()
                if callable(started):
                    started()
                    started = None
                await self._serve()
                timeout = None
                await self._pause(restarts.spend(1))
        except Ended as end:
            return end.status
        except (SluiceError, OSError) as error:
            self.log(str(error))
            return 1
        finally:
            await self._shut()

    def _stop(self, number: signal.Signals) -> None:
        self._signal = number
        self._terminate.set()

    async def _pause(self, seconds: float) -> None:
        """Let an agent wait that comes and goes all the time. Raises Ended where we are to end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._terminate.wait(), seconds)
            raise Ended(-self._signal)

    async def _connect(self, timeout: float | None) -> socket.socket:
        """Connect to the agent.

        Raises Ended: 3 after ``timeout`` seconds, 1 where it can never work, -15 for SIGTERM.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        connected: asyncio.Future[int] = loop.create_future()

        def failed(reason: str) -> None:
            if not connected.done():
                connected.set_exception(RemoteError(reason))

        def succeeded(fd: int) -> None:
            if connected.done():
                os.close(fd)
            else:
                connected.set_result(fd)

        client = Client(loop, self.options.domid, wire.CONTROL_PORT, succeeded, timeout, failed)
        stop = asyncio.ensure_future(self._terminate.wait())
        waits: list[asyncio.Future[Any]] = [connected, stop]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not connected.done():
                raise Ended(-self._signal)
            return socket.socket(fileno=connected.result())
        except RemoteError as error:
            self.log(f"no agent: {error}")
            late = timeout is not None and loop.time() - began >= timeout * 0.99
            raise Ended(EXIT_STARTUP_TIMEOUT if late else 1) from None
        finally:
            stop.cancel()
            client.close()

    async def _handshake(self, sock: socket.socket) -> None:
        """Shake hands with the agent (4.3). Raises Ended (1) where that fails."""
        loop = asyncio.get_running_loop()
        self._greeted.clear()
        self._lost.clear()
        link = Link(self.ports, default_user=self.options.default_user)
        name, domid = self.options.name, self.options.domid
        self._endpoint = Endpoint(loop, name, domid, sock, link, self)
        self._endpoint.start()
        waits = [
            asyncio.ensure_future(event.wait())
            for event in (self._greeted, self._lost, self._terminate)
        ]
        await asyncio.wait(waits, timeout=HANDSHAKE_PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._terminate.is_set():
            raise Ended(-self._signal)
        if not self._greeted.is_set() or self._broken:
            self.log("the agent made no proper handshake")
            raise Ended(1)

    async def _serve(self) -> None:
        """Serve until the agent is gone; raises Ended where the daemon ends."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._lost, self._terminate)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._close_sockets()
        if self._terminate.is_set():
            assert self._endpoint is not None
            self._handler.stop()
            await self._tasks.close(STOP_WITHIN)
            await self._endpoint.flush(0.5)
            raise Ended(0 if self._signal == signal.SIGTERM else -self._signal)
        if self._broken:
            raise Ended(1)
        self.log("the agent is gone; waiting for another")

    async def _shut(self) -> None:
        self._close_sockets()
        self._handler.stop()
        await self._tasks.close(STOP_WITHIN)
        if self._endpoint is not None:
            self._endpoint.close()
        self._folded.flush()

    # --- sockets --------------------------------------------------------------------------

    def _open_sockets(self) -> None:
        """Make the socket and the two links to it (6.2 step 9). Raises LocalError."""
        options = self.options
        assert self._endpoint is not None
        self._endpoint.local = LocalServer(
            asyncio.get_running_loop(),
            f"qrexec.{options.domid}",
            self._local,
            self._folded,
            links=(f"qrexec.uuid:{options.uuid}", f"qrexec.{options.name}"),
            umask=0,
        )
        os.umask(0o077)

    def _close_sockets(self) -> None:
        if self._endpoint is not None and self._endpoint.local is not None:
            self._endpoint.local.close()
            self._endpoint.local = None

    # --- local clients --------------------------------------------------------------------

    def _local(self, session: LocalSession, request: LocalRequest) -> None:
        """Serve a local client (6.5). What is raised closes its session."""
        endpoint = self._endpoint
        assert endpoint is not None
        link = endpoint.link
        if request.kind == wire.SERVICE_CONNECT:
            pending = link.find(request.text)
            if pending is None:
                raise RemoteError("no pending request has this identifier")
            link.allow(pending)
        elif request.port:
            self._folded(f"a local client chose port {request.port} itself")
        request.check_port()
        port = request.port
        if not port:
            channel = self.ports.allocate(request.domain, session)
            port = channel.number
            reply = wire.encode_exec(request.kind, self.options.domid, port)
            if not session.reply(reply):
                self.ports.release(channel)
                raise RemoteError("a local client did not take its reply")
        if request.kind == wire.SERVICE_CONNECT:
            endpoint.forward(wire.encode_exec(request.kind, request.domain, port, request.text))
        else:
            endpoint.forward(link.execute(request.kind, request.domain, port, request.text))

    # --- what the endpoint tells ----------------------------------------------------------

    def greeted(self, endpoint: Endpoint) -> None:
        """Note the handshake."""
        self.log(f"connected to the agent, version {endpoint.link.version}")
        self._greeted.set()

    def requested(self, endpoint: Endpoint, request: Request) -> None:
        """Handle a call of the domain."""
        handled = self._tasks.spawn(self._handle(endpoint, request), "call")
        if handled is None:
            endpoint.refuse(request)

    async def _handle(self, endpoint: Endpoint, request: Request) -> None:
        try:
            await self._handler.handle(endpoint, request)
        except (SluiceError, OSError, TimeoutError) as error:
            text = f"{self._handler.describe(request)}: refused: {escape(str(error), 300)}"
            self._folded(text)
        finally:
            await refuse(endpoint, request)

    def rejected(self, endpoint: Endpoint, event: Rejected) -> None:
        """Log a request that was refused unseen."""
        self._folded(f"a request was refused: {event.reason}")

    def ended_side(self, endpoint: Endpoint, channel: Channel) -> None:
        """Tell the client that waits for it that its connection has ended (6.11)."""
        if isinstance(channel.owner, LocalSession):
            channel.owner.close()

    def lost(self, endpoint: Endpoint, reason: str, broken: bool) -> None:
        """Note the end of the control channel."""
        self.log(f"the agent broke the protocol: {reason}" if broken else reason)
        self._broken = broken
        self._handler.forget()
        self._lost.set()


# --- the program ------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Run the program with its arguments (without its name); returns the exit status."""
    if not has_standard_descriptors("qrexec-daemon", first=1):
        return wire.EXIT_FAILURE
    null = os.open(os.devnull, os.O_RDWR)
    if null != 0:
        os.dup2(null, 0)
        os.close(null)
    try:
        options = parse_arguments(arguments, os.environ)
    except UsageError as error:
        sys.stderr.write(f"qrexec-daemon: {error}\n{USAGE}" if str(error) else USAGE)
        return 1
    try:
        os.chdir(options.socket_dir)
    except OSError as error:
        sys.stderr.write(f"qrexec-daemon: {options.socket_dir}: {error.strerror}\n")
        return 1
    if options.direct:
        return _run(options, None)
    return _daemonise(options)


def _run(options: Options, report: int | None) -> int:
    """Run the daemon in this process; tell ``report`` what becomes of the start."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.setegid(os.getgid())
    os.seteuid(os.getuid())

    def tell(byte: int) -> None:
        # Without a parent that waits there is nobody to tell (QREXEC_STARTUP_NOWAIT).
        if report is not None:
            with contextlib.suppress(OSError):
                os.write(report, bytes([byte]))
            os.close(report)

    async def life() -> int:
        return await Daemon(options).run(lambda: tell(0))

    status = run(life())
    if status == EXIT_STARTUP_TIMEOUT:
        tell(EXIT_STARTUP_TIMEOUT)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _daemonise(options: Options) -> int:
    """Go into the background; the parent tells how the start went (6.2 step 3).

    Forking here is cheap and safe: nothing runs yet, no thread and no loop.
    """
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_fd)
        try:
            _into_background(options)
        except OSError as error:
            sys.stderr.write(f"qrexec-daemon: log file: {error}\n")
            return 1
        return _run(options, write_fd)
    os.close(write_fd)
    return 0 if options.nowait else _await_start(read_fd, options.quiet)


def _into_background(options: Options) -> None:
    os.umask(0o007)
    path = f"{options.log_dir}/qrexec.{options.name}.log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o660)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.setsid()


def _await_start(read_fd: int, quiet: bool) -> int:
    import select

    poll = select.poll()
    poll.register(read_fd, select.POLLIN)
    while not poll.poll(1000):
        if not quiet:
            sys.stderr.write(".")
            sys.stderr.flush()
    told = os.read(read_fd, 1)
    return told[0] if told else 1
