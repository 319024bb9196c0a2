"""How qrexec-daemon carries out a call: policy, then dom0, a domain or a disposable.

One coroutine a call. What it raises refuses the call, unless the source was told to connect before.
docs/spec/wire-protocol.md 6.9.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable

from sluice.adminvm.ask import NotRunning
from sluice.adminvm.channels import PortTable
from sluice.adminvm.daemon_options import Options
from sluice.adminvm.decision import Decision, Refused, command_for_dom0, command_for_vm
from sluice.adminvm.dom0 import Dom0Call
from sluice.adminvm.endpoint import Endpoint
from sluice.adminvm.link import Request, Verdict
from sluice.adminvm.peer import (
    PeerSession,
    ask_policy_daemon,
    ask_policy_program,
    call_qubesd,
    request_execution,
)
from sluice.adminvm.qubesd import NOT_HALTED, QubesdError, is_uuid_name
from sluice.adminvm.served import Served
from sluice.errors import LocalError, RemoteError, ResourceError, SluiceError
from sluice.vchan.socketdir import Client
from sluice.wire.names import escape

DISPOSABLE = "@dispvm:"
DOM0_PATIENCE = 5.0  # seconds for the data channel of a call that dom0 answers (15)
ROOM_PATIENCE = 10.0  # seconds that a refusal waits for an agent to read
# Services that dom0 runs for the domain at once: as many as there are ports. Its disposables too.
MAX_SERVED = 256


async def refuse(endpoint: Endpoint, request: Request) -> None:
    """Refuse a request, unless it was connected: by us, or by a local client just now.

    A SERVICE_CONNECT that a local client has written already counts (6.3), so what local clients
    wrote is served first: when there is room for it, if that comes soon.
    """
    if request.verdict is not Verdict.PENDING:
        return
    try:
        await endpoint.room(ROOM_PATIENCE)
    finally:
        if endpoint.local is not None:
            endpoint.local.drain()
        endpoint.refuse(request)


def _check_wanted(request: Request) -> None:
    """Start nothing for a call that nobody waits for any more. Raises Refused."""
    if request.verdict is Verdict.DROPPED:
        raise Refused("the agent is gone")


def _name_of(reply: bytes) -> str:
    """Read the name of a disposable that was made. Raises RemoteError where there is none."""
    if not reply:
        raise RemoteError("qubesd made a disposable without a name")
    return reply.decode("ascii", "replace")


class CallHandler:
    """Handles the calls of one domain."""

    def __init__(self, options: Options, ports: PortTable, log: Callable[[str], None]) -> None:
        """``ports`` are those of the daemon."""
        self._options = options
        self._ports = ports
        self._log = log
        self._served = Served()
        self._asking: set[asyncio.Task[None]] = set()
        self._disposables = 0

    def describe(self, request: Request) -> str:
        """Name a call in a log line."""
        trigger = request.trigger
        text = f"{trigger.service}: {self._options.name} -> {trigger.target or '@default'}"
        return escape(text, 300)

    def stop(self) -> None:
        """End the services that dom0 runs for calls."""
        self._served.close()

    def forget(self) -> None:
        """Give up asking policy: the agent that wanted the calls is gone (6.12).

        What is further on is left alone, so that no disposable is left behind; but nothing more is
        started for a call that is forgotten.
        """
        for task in self._asking:
            task.cancel()

    async def handle(self, endpoint: Endpoint, request: Request) -> None:
        """Carry out one call, to the end of what this daemon has to do for it.

        Raises a SluiceError or an OSError where the call is refused or fails.
        """
        decision = await self._ask(request)
        for key in decision.unknown_keys:
            self._log(f"policy reply: unknown key {escape(key, 60)} ignored")
        if not decision.allowed:
            raise Refused("denied by policy")
        _check_wanted(request)
        service = decision.service if decision.service is not None else request.trigger.service
        source = decision.policy_source or self._options.name
        if decision.is_dom0:
            text = command_for_dom0(service, source, decision.requested_target)
            await self._call_dom0(endpoint, request, text)
        else:
            text = command_for_vm(decision.user, service, source)
            await self._call_domain(endpoint, request, decision, text)

    # --- policy ---------------------------------------------------------------------------

    async def _ask(self, request: Request) -> Decision:
        """Let policy decide; ``forget`` cancels this."""
        task = asyncio.current_task()
        assert task is not None
        self._asking.add(task)
        try:
            return await self._decide(request)
        finally:
            self._asking.discard(task)

    async def _decide(self, request: Request) -> Decision:
        options, trigger = self._options, request.trigger
        try:
            return await ask_policy_daemon(options.policy_socket, options.name, trigger)
        except (SluiceError, OSError) as error:
            self._log(f"the policy daemon gave no answer ({error}); asking the policy program")
        return await ask_policy_program(options.policy_program, options.name, trigger)

    # --- dom0 -----------------------------------------------------------------------------

    async def _call_dom0(self, endpoint: Endpoint, request: Request, text: bytes) -> None:
        """Answer a call with a service of our own (6.9.5)."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[int] = loop.create_future()

        def finish(status: int) -> None:
            if not done.done():
                done.set_result(status)

        def failed(reason: str) -> None:
            if not done.done():
                done.set_exception(LocalError(f"data channel: {reason}"))

        self._served.check(self._options.name, MAX_SERVED)
        channel = self._ports.allocate(0)
        try:
            endpoint.connect(request, 0, channel.number)
        except BaseException:
            self._ports.release(channel)
            raise
        service = Dom0Call(
            loop,
            text,
            environment=dict(os.environb),
            on_done=finish,
            on_gone=lambda: self._served.discard(service),
            log=lambda line: self._log(f"{self.describe(request)}: {line}"),
        )
        self._served.add(service, self._options.name)
        client = None
        try:
            service.start()
            client = Client(
                loop,
                self._options.domid,
                channel.number,
                lambda fd: service.connect(fd, fd),
                DOM0_PATIENCE,
                failed,
            )
            await done
        except BaseException:
            service.close()
            raise
        finally:
            if client is not None:
                client.close()

    # --- domains --------------------------------------------------------------------------

    async def _call_domain(
        self, endpoint: Endpoint, request: Request, decision: Decision, text: bytes
    ) -> None:
        """Have a call answered by another domain (6.9.6)."""
        name = decision.selected
        if name.startswith(DISPOSABLE):
            await self._call_disposable(endpoint, request, decision, text)
            return
        try:
            session = await self._execute(name, text)
        except NotRunning:
            if not decision.autostart:
                raise
            await self._start(name)
            session = await self._execute(name, text)
        try:
            endpoint.connect(request, session.reply.domain, session.reply.port)
        finally:
            session.close()

    async def _call_disposable(
        self, endpoint: Endpoint, request: Request, decision: Decision, text: bytes
    ) -> None:
        """Have a call answered by a new disposable, and kill it when the call has ended."""
        if not decision.autostart:
            raise Refused("a disposable may not be started")
        if self._disposables >= MAX_SERVED:
            raise ResourceError(f"{MAX_SERVED} disposables answer calls of the domain already")
        self._disposables += 1
        try:
            await self._use_disposable(endpoint, request, decision, text)
        finally:
            self._disposables -= 1

    async def _use_disposable(
        self, endpoint: Endpoint, request: Request, decision: Decision, text: bytes
    ) -> None:
        """Make it, call it, wait for the end, kill it, whatever happens in between."""
        base = decision.selected[len(DISPOSABLE) :]
        by_uuid = decision.target_uuid is not None
        name = await self._create(base, "uuid" if by_uuid else "")
        if by_uuid and not is_uuid_name(name):
            raise RemoteError("qubesd did not answer with the UUID of a disposable")
        try:
            _check_wanted(request)
            await self._start(name)
            session = await self._execute(name, text)
            try:
                endpoint.connect(request, session.reply.domain, session.reply.port)
                await session.wait_for_end()
            finally:
                session.close()
        finally:
            try:
                # The source need not wait for the end of a disposable that it never got.
                await refuse(endpoint, request)
            finally:
                await asyncio.shield(self._kill(name))

    async def _execute(self, name: str, text: bytes) -> PeerSession:
        if "/" in name or not name:
            raise LocalError("policy named an impossible target")
        return await request_execution(f"qrexec.{name}", self._options.domid, text)

    async def _create(self, base: str, payload: str) -> str:
        """Make a disposable. Where we end meanwhile, what is made all the same is killed."""
        making = asyncio.ensure_future(self._qubesd("admin.vm.CreateDisposable", base, payload))
        try:
            name = _name_of(await asyncio.shield(making))
        except asyncio.CancelledError:
            with contextlib.suppress(SluiceError):
                await self._kill(_name_of(await making))
            raise
        return name

    async def _start(self, name: str) -> None:
        try:
            await self._qubesd("admin.vm.Start", name)
        except QubesdError as error:
            if error.exception != NOT_HALTED:
                raise

    async def _kill(self, name: str) -> None:
        with contextlib.suppress(SluiceError):
            await self._qubesd("admin.vm.Kill", name)

    async def _qubesd(self, method: str, destination: str, payload: str = "") -> bytes:
        return await call_qubesd(self._options.qubesd_socket, method, destination, payload)
