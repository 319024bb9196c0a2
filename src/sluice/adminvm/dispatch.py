"""Calls carried out over the transport ``passed``: decision, pipes, hand-over, end, audit record.

Each call is one coroutine from its request to its end, and writes its audit record in the one
``finally`` that every ending passes. The bytes of a call between domains never come here: two pipes
are made, their ends are sent to the two agents, our copies are closed
(docs/spec/wire-protocol.md 6.9, 20).

The target is told first and the source second, with nothing awaited in between: either both get
their ends or the request is refused and the one that got its ends sees them closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, Protocol

from sluice.adminvm.audit import AuditLog, CallRecord
from sluice.adminvm.calls import CallNumbers, Ends
from sluice.adminvm.channels import Channel
from sluice.adminvm.control import close_all
from sluice.adminvm.decision import Decision, Refused, command_for_dom0, command_for_vm
from sluice.adminvm.dom0 import Dom0Call
from sluice.adminvm.judge import Judge
from sluice.adminvm.link import Request, Verdict
from sluice.adminvm.local import LocalSession
from sluice.adminvm.run import DomainRun
from sluice.adminvm.served import Served
from sluice.adminvm.session import LocalRequest
from sluice.errors import RemoteError, SluiceError
from sluice.service.command import HANGUP
from sluice.vchan.passed import make_pair
from sluice.wire import messages as wire
from sluice.wire.names import escape

ROOM_PATIENCE = 10.0  # seconds that a call waits for an agent to read


class Domains(Protocol):
    """Where the dispatcher finds domains."""

    async def reach(self, name_or_uuid: str, autostart: bool) -> DomainRun:
        """Return the running domain, started if need be. Raises Refused or another SluiceError."""

    def running(self) -> frozenset[str]:
        """Return the names of the domains that run."""


class OpenCall:
    """A call that dom0 made from within this process: its ends of the two pipes.

    The receiver speaks the data protocol on them as the caller (section 10) and closes them.
    ``ended`` is done when the domain has reported the end of the call.
    """

    def __init__(self, number: int, read_fd: int, write_fd: int, ended: asyncio.Future[None]):
        """Made by ``Dispatcher.open``."""
        self.number = number
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.ended = ended


class Dispatcher:
    """Carries out the calls of one AdminVM."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        domains: Domains,
        judge: Judge,
        audit: AuditLog,
        service_path: str,
        config_path: str,
        environment: Mapping[bytes, bytes],
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[Any] | None],
    ) -> None:
        """``service_path`` and ``config_path`` are the search lists of dom0's own services.

        ``spawn(coroutine, name)`` runs a coroutine under supervision.
        """
        self._loop = loop
        self._domains = domains
        self._judge = judge
        self._audit = audit
        self._service_path = service_path
        self._config_path = config_path
        self._environment = environment
        self._spawn = spawn
        self.numbers = CallNumbers()
        self._served = Served()

    # --- calls of domains -----------------------------------------------------------------

    async def call(self, source: DomainRun, request: Request) -> None:
        """Carry out one call that ``source`` asked for, to its end."""
        trigger = request.trigger
        number = self.numbers.take()
        record = CallRecord(number, source.name, trigger.service, trigger.target)
        self._audit.begin(record)
        try:
            decision = await self._decide(source, request, record)
            if decision.is_dom0:
                await self._to_dom0(source, request, decision, record)
            else:
                await self._to_domain(source, request, decision, record)
        except asyncio.CancelledError:
            record.cause = "the AdminVM stops"
            raise
        except (SluiceError, OSError) as error:
            self._refused(source, record, error)
        except Exception:
            record.cause = "internal error"
            raise
        finally:
            source.endpoint.refuse(request)
            self.numbers.free(number)
            self._audit.write(record)

    def _refused(self, source: DomainRun, record: CallRecord, error: Exception) -> None:
        record.cause = str(error)
        if record.decision == "allow" and "connected" not in record.stages:
            # Policy allowed it, but the source saw a refusal.
            record.stage("failed")
        name = f"{record.service} on {record.target or record.requested_target or '@default'}"
        source.note(f"{escape(name, 200)}: refused: {escape(str(error), 300)}")

    async def _decide(self, source: DomainRun, request: Request, record: CallRecord) -> Decision:
        verdict = await self._judge.decide(source.name, request.trigger, self._domains.running())
        record.stage("decided")
        record.rule = verdict.rule
        record.reason = verdict.reason
        record.target = verdict.decision.target
        if not verdict.decision.allowed:
            raise Refused(verdict.cause)
        record.decision = "allow"
        record.service = verdict.decision.service or record.service
        if request.verdict is not Verdict.PENDING:
            raise Refused("the source is gone")
        return verdict.decision

    async def _to_dom0(
        self, source: DomainRun, request: Request, decision: Decision, record: CallRecord
    ) -> None:
        text = command_for_dom0(
            record.service, decision.policy_source or source.name, decision.requested_target
        )
        await _make_room(source)
        if request.verdict is not Verdict.PENDING:
            raise Refused("the source is gone")
        # The bound is not only that of ``calls``: a service may go on after its caller said that
        # the call has ended, and after a breach.
        self._served.check(source.name, source.calls.limit)
        ends = Ends(self._loop, record)
        channel = source.calls.open(0, record.number, outgoing=True, owner=ends.expect("source"))
        try:
            ours, theirs = make_pair()
            with _closing(ours), _closing(theirs):
                source.endpoint.connect(request, 0, record.number, b"", theirs)
        except BaseException:
            source.calls.release(channel)
            raise
        record.stage("connected")
        self._audit.begin(record)
        await self._serve(source, text, ours, ends, record)

    async def _serve(
        self, source: DomainRun, text: bytes, fds: tuple[int, ...], ends: Ends, record: CallRecord
    ) -> None:
        """Run a service of dom0 on our ends of a call's pipes, until both sides have ended."""
        target = ends.expect("target")

        def done(status: int) -> None:
            record.exit_code = status
            target.end()

        service = Dom0Call(
            self._loop,
            text,
            environment=self._environment,
            on_done=done,
            on_gone=lambda: self._served.discard(service),
            log=lambda line: source.note(f"call {record.number}: {line}"),
            service_path=self._service_path,
            config_path=self._config_path,
            on_stderr=source.read_stderr,
        )
        self._served.add(service, source.name)
        try:
            service.connect(*fds)
            service.start()
            record.cause = await ends.wait()
        except BaseException:
            service.close()
            raise

    async def _to_domain(
        self, source: DomainRun, request: Request, decision: Decision, record: CallRecord
    ) -> None:
        target = await self._domains.reach(decision.selected, decision.autostart)
        record.target = target.name
        await _make_room(source, target)
        record.stage("target_ready")
        if request.verdict is not Verdict.PENDING:
            raise Refused("the source is gone")
        if target is source:
            raise Refused("a domain cannot call itself")
        text = command_for_vm(
            decision.user or "DEFAULT", record.service, decision.policy_source or source.name
        )
        ends = Ends(self._loop, record)
        opened: list[tuple[DomainRun, Channel]] = []
        number = record.number
        try:
            for run, peer, outgoing, side in (
                (source, target, True, "source"),
                (target, source, False, "target"),
            ):
                owner = ends.expect(side)
                channel = run.calls.open(peer.domid, number, outgoing=outgoing, owner=owner)
                opened.append((run, channel))
            _join(source, target, request, number, text)
        except BaseException:
            for run, channel in opened:
                run.calls.release(channel)
            raise
        record.stage("connected")
        self._audit.begin(record)
        record.cause = await ends.wait()

    # --- calls of dom0 --------------------------------------------------------------------

    def local_request(self, run: DomainRun, session: LocalSession, request: LocalRequest) -> None:
        """Serve ``qrexec-client``: its ends of the pipes travel with the reply (6.5, 20).

        Raises RemoteError for what cannot be asked over this transport, which ends the session.
        """
        if request.kind == wire.SERVICE_CONNECT or request.domain or request.port:
            raise RemoteError("calls of domains are completed by the AdminVM only")
        call, ends, record = self._open(run, request.kind, request.text)
        reply = wire.encode_exec(request.kind, run.domid, call.number)
        sent = session.reply(reply, (call.read_fd, call.write_fd))
        close_all((call.read_fd, call.write_fd))
        self._follow(call, ends, record, session)
        if not sent:
            raise RemoteError("a local client did not take its reply")

    def open(self, run: DomainRun, text: bytes, kind: int = wire.EXEC_CMDLINE) -> OpenCall:
        """Make a call from dom0, from within this process. ``text``: ``USER:COMMAND``, no NUL.

        Raises LocalError where the domain's link is not open, ResourceError over a bound.
        """
        call, ends, record = self._open(run, kind, text + b"\0")
        self._follow(call, ends, record, None)
        return call

    def _open(self, run: DomainRun, kind: int, text: bytes) -> tuple[OpenCall, Ends, CallRecord]:
        number = self.numbers.take()
        record = _record_of_dom0(number, run.name, text)
        ends = Ends(self._loop, record)
        channel = None
        try:
            channel = run.calls.open(0, number, outgoing=False, owner=ends.expect("target"))
            ours, theirs = make_pair()
            with _closing(ours), _closing(theirs):
                run.endpoint.execute(kind, 0, number, text, theirs)
        except BaseException as error:
            if channel is not None:
                run.calls.release(channel)
            self.numbers.free(number)
            record.cause = str(error)
            self._audit.write(record)
            raise
        record.stage("connected")
        self._audit.begin(record)
        return OpenCall(number, ours[0], ours[1], self._loop.create_future()), ends, record

    def _follow(
        self, call: OpenCall, ends: Ends, record: CallRecord, session: LocalSession | None
    ) -> None:
        """Look after a call of dom0 until its end, and record it."""
        task = self._spawn(self._until_end(ends, record), f"call {call.number}")
        if task is None:
            self._finish(call, record, session)
        else:
            task.add_done_callback(lambda _: self._finish(call, record, session))

    async def _until_end(self, ends: Ends, record: CallRecord) -> None:
        record.cause = "the AdminVM stops"
        record.cause = await ends.wait()

    def _finish(self, call: OpenCall, record: CallRecord, session: LocalSession | None) -> None:
        if session is not None:
            session.close()
        if not call.ended.done():
            call.ended.set_result(None)
        self.numbers.free(call.number)
        self._audit.write(record)

    # --- the end --------------------------------------------------------------------------

    def note_rejected(self, run: DomainRun, reason: str, count: int) -> None:
        """Record calls that were refused unseen, folded into one line."""
        record = CallRecord(0, run.name, "", "")
        record.cause = reason
        record.count = count
        self._audit.write(record)

    def close(self) -> None:
        """End the services that dom0 runs."""
        self._served.close()


@contextlib.contextmanager
def _closing(fds: tuple[int, ...]) -> Iterator[None]:
    """Close descriptors where what is tried with them fails, because nobody else will."""
    try:
        yield
    except BaseException:
        close_all(fds)
        raise


async def _make_room(*runs: DomainRun) -> None:
    """Wait until all these agents have read what was sent to them, but not for ever.

    So the descriptors that we hold for agents which do not read are few, whatever domains agree on.
    """
    while any(run.endpoint.busy for run in runs):
        for run in runs:
            if not await run.endpoint.room(ROOM_PATIENCE):
                raise Refused(f"{run.name} does not read its control channel")


def _join(source: DomainRun, target: DomainRun, request: Request, number: int, text: bytes) -> None:
    """Make the two pipes of a call and hand their ends to both agents, the target's first."""
    near, far = make_pair()
    with _closing(near):
        with _closing(far):
            target.endpoint.execute(wire.EXEC_CMDLINE, source.domid, number, text, far)
        source.endpoint.connect(request, target.domid, number, b"", near)


def _record_of_dom0(number: int, target: str, text: bytes) -> CallRecord:
    """Describe a call that dom0 makes: a service call by its name, else the command."""
    command = text.rstrip(b"\0").partition(b":")[2].removeprefix(HANGUP)
    words = command.split(b" ")
    service = words[1] if command.startswith(b"QUBESRPC ") and len(words) > 1 else b""
    record = CallRecord(number, "dom0", service.decode("ascii", "backslashreplace"), target)
    record.target = target
    record.decision = "allow"
    if not service:
        record.command = os.fsdecode(command[:1024])
    return record
