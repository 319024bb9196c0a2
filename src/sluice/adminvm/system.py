"""The AdminVM of one system: its domains, their calls, its sockets. What ``sluice up`` runs.

One process, one asyncio loop. Three kinds of things live in it, each looked after by one task:
a domain's run (``run``), a call (``dispatch``), a connection of the ``sluice`` command (``api``).
The data of calls between domains never passes here.

Stopping: nothing new is taken, every control channel is closed (which ends the agents), the
services of dom0 are ended, and what has not gone after a moment is killed. Two seconds at most.
docs/spec/core-stack.md 2, 12.4.1; docs/spec/wire-protocol.md 20.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import stat
import sys
import time
from collections.abc import Mapping

from sluice.adminvm.api import ApiServer
from sluice.adminvm.audit import AuditLog, timestamp
from sluice.adminvm.channels import MAX_CALLS, Channel
from sluice.adminvm.decision import Refused
from sluice.adminvm.dispatch import ROOM_PATIENCE, Dispatcher, OpenCall
from sluice.adminvm.judge import Judge, PolicyJudge
from sluice.adminvm.link import Request
from sluice.adminvm.local import LocalSession
from sluice.adminvm.logs import FoldedLog
from sluice.adminvm.memory import Completed, run_to_end
from sluice.adminvm.rotated import RotatedFile
from sluice.adminvm.run import GRACE, DomainRun
from sluice.adminvm.session import LocalRequest
from sluice.adminvm.supervisor import Supervisor
from sluice.domains.model import DomainConfig
from sluice.domains.paths import Paths
from sluice.domains.registry import Registry
from sluice.domains.sandbox.base import Sandbox
from sluice.errors import LocalError, ResourceError, SluiceError
from sluice.policy.files import PolicyStore
from sluice.service.command import with_hangup
from sluice.wire import messages as wire
from sluice.wire.names import escape

WANTED_DESCRIPTORS = 8192
STOP_WITHIN = 1.8  # seconds; the promise is two


class AdminVM:
    """The trusted side of one system."""

    def __init__(
        self,
        registry: Registry,
        sandboxes: Mapping[str, Sandbox],
        policy: PolicyStore | Judge,
        paths: Paths,
        *,
        max_calls: int = MAX_CALLS,
    ) -> None:
        """Take the domains, the kinds of sandboxes by name, the policy, and the places.

        ``policy`` may be any ``Judge``. ``max_calls`` bounds each domain's calls in each role.
        """
        self.registry = registry
        self.sandboxes = sandboxes
        self.paths = paths
        self._judge: Judge = (
            PolicyJudge(policy, registry, self.warn) if isinstance(policy, PolicyStore) else policy
        )
        self._max_calls = max_calls
        self._runs: dict[str, DomainRun] = {}
        self._starting: dict[str, asyncio.Future[DomainRun]] = {}
        self._running: frozenset[str] = frozenset()
        self._stopped: asyncio.Event | None = None
        self._began = time.time()
        self._calls = Supervisor(self.log)
        self._tasks = Supervisor(self.log)
        self._api: ApiServer | None = None
        self._audit: AuditLog | None = None
        self._domain_lines: RotatedFile | None = None
        self._folded: FoldedLog | None = None
        self.dispatcher: Dispatcher

    # --- start and end --------------------------------------------------------------------

    async def start(self) -> None:
        """Make the sockets and logs and start the domains with ``autostart``.

        A domain that cannot be started is logged and stops nothing. Raises LocalError where the
        places cannot be made.
        """
        loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._folded = FoldedLog(loop, lambda line: self.log_of("dom0", line))
        raise_descriptor_limit(self.log)
        self.paths.create()
        self._audit = AuditLog(self.paths.audit_file, on_trouble=self.log)
        self._domain_lines = RotatedFile(
            self.paths.domain_log_file, 8 << 20, 2, on_trouble=self.log
        )
        self.dispatcher = Dispatcher(
            loop,
            domains=self,
            judge=self._judge,
            audit=self._audit,
            service_path=":".join(map(str, self.paths.rpc)),
            config_path=":".join(map(str, self.paths.rpc_config)),
            environment=dict(os.environb),
            spawn=self._calls.spawn,
        )
        for sandbox in self.sandboxes.values():
            for failure in await sandbox.sweep():
                self.log(failure)
        self._api = ApiServer(self, str(self.paths.control_socket), self._tasks)
        wanted = [domain.name for domain in self.registry if domain.autostart]
        policy, *results = await asyncio.gather(
            self._look_at_policy(),
            *(self.start_domain(name) for name in wanted),
            return_exceptions=True,
        )
        if isinstance(policy, BaseException):
            raise policy
        for name, result in zip(wanted, results, strict=True):
            if isinstance(result, SluiceError):
                self.log(f"{name}: {str(result).removeprefix(name + ': ')}")
            elif isinstance(result, BaseException):
                raise result

    async def _look_at_policy(self) -> None:
        """Read the policy before the first call has to wait for it, and say what is wrong."""
        if isinstance(self._judge, PolicyJudge):
            trouble = await self._judge.trouble()
            if trouble:
                self.log(f"policy: {trouble} (every call is refused until that is mended)")

    async def run_until_stopped(self) -> None:
        """Wait for ``request_stop``, SIGTERM or SIGINT, then stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.request_stop)
        try:
            assert self._stopped is not None, "start() comes first"
            await self._stopped.wait()
        finally:
            await self.stop()

    def request_stop(self) -> None:
        """Make ``run_until_stopped`` return."""
        if self._stopped is not None:
            self._stopped.set()

    async def stop(self) -> None:
        """End everything, within two seconds; nothing of any domain is left."""
        if self._api is not None:
            self._api.close()
        await self._calls.close(0.3)
        runs = list(self._runs.values())
        for run in runs:
            run.stop("the AdminVM stops")
        if self._audit is not None:
            self.dispatcher.close()
        if runs:
            await asyncio.wait([run.ended for run in runs], timeout=GRACE)
        for run in runs:
            run.kill("the AdminVM stops")
        if not await self._tasks.close(STOP_WITHIN - GRACE - 0.3):
            self.log("some domains did not end in time")
        if self._folded is not None:
            self._folded.flush()
        if self._audit is not None:
            self._audit.close()
        if self._domain_lines is not None:
            self._domain_lines.close()
            self._domain_lines = None

    def log(self, text: str) -> None:
        """Write a line for the operator; a full disk or a terminal that is gone stops nobody."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):
            print(f"{stamp} adminvm: {text}", file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Write a line that calls can cause again and again; floods of them are folded.

        It goes where the lines of domains go, since they decide how many there are.
        """
        (self._folded or self.log)(text)

    def log_of(self, name: str, line: str) -> None:
        """Write a line that a domain caused, escaped already; ``sluice log`` shows it too."""
        if not stat.S_ISREG(os.fstat(2).st_mode):
            # A file that nobody rotates is no place for what a domain can cause to be written.
            self.log(f"{name}: {line}")
        if self._domain_lines is not None:
            record = {"time": timestamp(time.time()), "domain": name, "line": line}
            self._domain_lines.append(json.dumps(record).encode() + b"\n")

    # --- domains --------------------------------------------------------------------------

    def running(self) -> frozenset[str]:
        """Return the names of the domains whose agents answer."""
        return self._running

    def state(self, name: str) -> str:
        """Return a domain's state in the words of core-stack.md 2.3."""
        run = self._runs.get(name)
        if run is not None:
            return run.state
        domain = self.registry.get(name)
        return "Running" if domain is not None and domain.is_admin else "Halted"

    def run_of(self, name: str) -> DomainRun | None:
        """Return the present run of a domain, whatever its state."""
        return self._runs.get(name)

    async def start_domain(self, name_or_uuid: str) -> DomainRun:
        """Start a domain and wait until its agent answers; nothing is done where it runs already.

        Raises LocalError or ResourceError where it cannot be started. Two that ask at once get the
        same start, and a stop under way is waited for first (2.5).
        """
        domain = self._startable(name_or_uuid)
        while True:
            pending = self._starting.get(domain.name)
            if pending is not None:
                return await asyncio.shield(pending)
            run = self._runs.get(domain.name)
            if run is None:
                break
            if run.state == "Running":
                return run
            await asyncio.shield(run.ended)
        return await asyncio.shield(self._begin(domain))

    def _startable(self, name_or_uuid: str) -> DomainConfig:
        domain = self.registry.get(name_or_uuid)
        if domain is None:
            raise LocalError(f"there is no domain {escape(name_or_uuid)}")
        if domain.is_admin or domain.klass == "RemoteVM":
            raise LocalError(f"{domain.name}: is of class {domain.klass}, which cannot be started")
        if domain.kind not in self.sandboxes:
            raise LocalError(f"{domain.name}: there is no sandbox of kind {domain.kind!r}")
        return domain

    def _begin(self, domain: DomainConfig) -> asyncio.Future[DomainRun]:
        loop = asyncio.get_running_loop()
        try:
            run = DomainRun(
                loop,
                domain,
                self.sandboxes[domain.kind],
                self,
                daemon_directory=str(self.paths.daemon_dir),
                log=lambda line: self.log_of(domain.name, line),
                limit=self._max_calls,
            )
        except OSError as error:
            raise ResourceError(f"{domain.name}: no control channel: {error.strerror}") from error
        started: asyncio.Future[DomainRun] = loop.create_future()
        self._starting[domain.name] = started
        self._runs[domain.name] = run
        if self._tasks.spawn(self._look_after(run, started), f"domain {domain.name}") is None:
            del self._starting[domain.name], self._runs[domain.name]
            started.set_exception(LocalError("the AdminVM stops"))
        return started

    async def _look_after(self, run: DomainRun, started: asyncio.Future[DomainRun]) -> None:
        """Be the one task of a domain's run."""
        failure: BaseException = LocalError("the AdminVM stops")
        try:
            await run.start()
            self.log(f"{run.name}: running")
            self._tell_unlimited(run)
            started.set_result(run)
        except (SluiceError, OSError) as error:
            failure = error if isinstance(error, SluiceError) else LocalError(str(error))
            run.kill(f"its start failed: {error}")
        finally:
            if not started.done():
                started.set_exception(failure)
                started.exception()  # it counts as seen even if nobody waits
            self._starting.pop(run.name, None)
            try:
                await run.finish(GRACE)
            finally:
                if self._runs.get(run.name) is run:
                    del self._runs[run.name]
                self.log(f"{run.name}: halted ({run.reason})")

    def _tell_unlimited(self, run: DomainRun) -> None:
        """Say once for each start which limits nothing holds (12.5)."""
        limits = run.running.limits() if run.running is not None else []
        names = [limit.name for limit in limits if limit.by == "none"]
        if names:
            self.log(f"{run.name}: nothing holds its limit of {', '.join(names)} here")

    async def stop_domain(self, name: str, *, kill: bool = False) -> None:
        """End a domain and wait until nothing of it is left. Raises LocalError if it is halted."""
        run = self._runs.get(name)
        if run is None:
            raise LocalError(self._why_not_running(name))
        if kill:
            run.kill("killed")
        else:
            run.stop("stopped")
        await asyncio.shield(run.ended)

    def _why_not_running(self, name: str) -> str:
        domain = self.registry.get(name)
        if domain is None:
            return f"there is no domain {escape(name)}"
        if domain.is_admin:
            return f"{domain.name}: ends with the system (`sluice down`)"
        return f"Domain is powered off: '{domain.name}'"

    def change_limits(self, name: str, **limits: int | None) -> None:
        """Set other limits for a domain that runs. Raises LocalError."""
        run = self._runs.get(name)
        if run is None or run.running is None:
            raise LocalError(self._why_not_running(name))
        run.running.change_limits(**limits)

    async def reach(self, name_or_uuid: str, autostart: bool) -> DomainRun:
        """Return the running domain a call goes to, started if policy allows that (6.9.6)."""
        if name_or_uuid.startswith("@dispvm"):
            raise Refused("disposables are not served here")
        domain = self.registry.get(name_or_uuid)
        if domain is None:
            raise Refused("the target does not exist")
        run = self._runs.get(domain.name)
        if run is not None and run.state == "Running":
            return run
        if not autostart:
            raise Refused("the target does not run and may not be started")
        return await self.start_domain(domain.name)

    # --- calls of dom0 --------------------------------------------------------------------

    async def call(
        self, name: str, command: bytes | str, *, user: str = "DEFAULT", autostart: bool = True
    ) -> OpenCall:
        """Call a domain from dom0: ``command`` for a shell, or ``QUBESRPC SERVICE dom0``.

        Returns the caller's ends of the data channel. Raises a SluiceError where it cannot be made.
        """
        run = await self.reach(name, autostart)
        text = command.encode() if isinstance(command, str) else command
        if not await run.endpoint.room(ROOM_PATIENCE):
            raise ResourceError(f"{name} does not read its control channel")
        return self.dispatcher.open(run, user.encode() + b":" + text)

    async def run(
        self,
        name: str,
        command: bytes | str,
        *,
        input: bytes = b"",
        user: str = "DEFAULT",
        timeout: float | None = None,
    ) -> Completed:
        """Make a call from dom0, give it ``input``, and return its status, output and errors.

        Raises a SluiceError where it cannot be made, TimeoutError after ``timeout`` seconds. A
        shell command for which nobody waits any more, then or when this is cancelled, is ended.
        """
        text = command.encode() if isinstance(command, str) else command
        call = await self.call(name, with_hangup(text), user=user)
        async with asyncio.timeout(timeout):
            return await run_to_end(call.read_fd, call.write_fd, input)

    async def just_execute(self, name: str, command: bytes | str, *, user: str = "DEFAULT") -> int:
        """Start a command in a domain and leave it; returns 0, or why it could not be started."""
        run = await self.reach(name, True)
        text = command.encode() if isinstance(command, str) else command
        call = self.dispatcher.open(run, user.encode() + b":" + text, wire.JUST_EXEC)
        return (await run_to_end(call.read_fd, call.write_fd, b"")).status

    # --- what the runs tell ---------------------------------------------------------------

    def requested(self, run: DomainRun, request: Request) -> None:
        """Carry out a call of a domain."""
        task = self._calls.spawn(self.dispatcher.call(run, request), f"call of {run.name}")
        if task is None:
            run.endpoint.refuse(request)

    def rejected(self, run: DomainRun, reason: str, count: int) -> None:
        """Record calls that were refused unseen."""
        if self._audit is not None:
            self.dispatcher.note_rejected(run, reason, count)

    def channel_ended(self, run: DomainRun, channel: Channel, cause: str) -> None:
        """Tell a call that one of its sides has ended."""
        channel.owner.end(cause)  # type: ignore[attr-defined]

    def local_request(self, run: DomainRun, session: LocalSession, request: LocalRequest) -> None:
        """Serve ``qrexec-client``."""
        self.dispatcher.local_request(run, session, request)

    def state_changed(self, run: DomainRun) -> None:
        """Keep the set of running domains."""
        if run.state == "Running":
            self._running |= {run.name}
        else:
            self._running -= {run.name}

    def describe(self) -> list[dict[str, object]]:
        """Describe all domains for the ``sluice`` command."""
        return [self._describe(domain) for domain in self.registry]

    def _describe(self, domain: DomainConfig) -> dict[str, object]:
        run = self._runs.get(domain.name)
        running = run.running if run is not None else None
        return {
            "name": domain.name,
            "qid": domain.qid,
            "uuid": domain.uuid,
            "class": domain.klass,
            "label": domain.label,
            "kind": domain.kind,
            "template": domain.template,
            "state": self.state(domain.name),
            "pid": running.pid if running is not None else -1,
            "calls": len(run.calls) if run is not None else 0,
            "limits": [
                {"name": limit.name, "value": limit.value, "by": limit.by}
                for limit in (running.limits() if running is not None else [])
            ],
        }

    @property
    def uptime(self) -> float:
        """Seconds since the AdminVM was made."""
        return time.time() - self._began


def raise_descriptor_limit(log: object = None) -> None:
    """Allow this process as many descriptors as it may have.

    The kernel compares the descriptors in flight of a user with the sender's own limit; ours must
    be well above that of a domain, or one domain could stop the calls of all (12.4.1).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < WANTED_DESCRIPTORS and callable(log):
        log(f"only {hard} descriptors are allowed; {WANTED_DESCRIPTORS} are needed to be safe")
