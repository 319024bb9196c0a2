"""One run of a domain: from the start of its sandbox until nothing of it is left.

States, in the words of docs/spec/core-stack.md 2.3::

    Transient --agent greeted--> Running --stop asked--> Halting --+--> Halted
        \\________________________\\____ agent gone, agent broke the protocol, sandbox ended __/

A run ends once, whatever the reason: the control channel is closed (which ends an agent that still
lives), the sandbox is killed if it does not end by itself, waited for and cleaned. Calls of other
domains into it end by themselves, because its ends of their pipes are gone.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

from sluice.adminvm.bucket import TokenBucket
from sluice.adminvm.channels import CallTable, Channel
from sluice.adminvm.endpoint import Endpoint
from sluice.adminvm.link import TRIGGER_BURST, TRIGGER_RATE, Link, Rejected, Request
from sluice.adminvm.local import LocalServer, LocalSession
from sluice.adminvm.logs import Counted, FoldedLog, Log, StderrReader
from sluice.adminvm.session import LocalRequest
from sluice.domains.model import DomainConfig
from sluice.domains.sandbox.base import RunningSandbox, Sandbox
from sluice.errors import LocalError, ResourceError, SluiceError
from sluice.wire.names import escape

GRACE = 0.7  # seconds between the end of the control channel and the kill, when all must go


class RunOwner(Protocol):
    """What a run tells the AdminVM."""

    def requested(self, run: DomainRun, request: Request) -> None:
        """Take a call that the domain asks for."""

    def rejected(self, run: DomainRun, reason: str, count: int) -> None:
        """Note calls that were refused unseen."""

    def channel_ended(self, run: DomainRun, channel: Channel, cause: str) -> None:
        """Note the end of one of the domain's sides of a call; ``cause`` is empty if it said so."""

    def local_request(self, run: DomainRun, session: LocalSession, request: LocalRequest) -> None:
        """Take a request of a local client of dom0; what this raises ends the session."""

    def state_changed(self, run: DomainRun) -> None:
        """Note that ``run.state`` is another."""


class DomainRun:
    """A domain that starts, runs or ends. Make it, then ``await start()``."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: DomainConfig,
        sandbox: Sandbox,
        owner: RunOwner,
        *,
        daemon_directory: str,
        log: Log,
        limit: int,
    ) -> None:
        """``log`` takes lines about this domain; ``limit`` bounds its calls in each role."""
        self.config = config
        self.name = config.name
        self.domid = config.domid
        self.state = "Transient"
        self.reason = ""
        self.calls = CallTable(limit)
        self.running: RunningSandbox | None = None
        self.ended: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._sandbox = sandbox
        self._owner = owner
        self._directory = daemon_directory
        self._log = FoldedLog(loop, log)
        self._flood = Counted(loop, self._flooded)
        self._greeted: asyncio.Future[None] = loop.create_future()
        self._gone = asyncio.Event()
        self._stderr: StderrReader | None = None
        ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        bucket = TokenBucket(TRIGGER_RATE, TRIGGER_BURST, loop.time)
        link = Link(self.calls, default_user=config.default_user, bucket=bucket)
        self.endpoint = Endpoint(loop, self.name, self.domid, ours, link, self, passed=True)

    # --- starting -------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the sandbox and wait for its agent, at most ``qrexec_timeout`` seconds.

        Raises LocalError or ResourceError where that fails; the run must be given to ``finish``
        in any case.
        """
        try:
            self.running = await self._sandbox.start(self.config, self._theirs)
        finally:
            self._theirs.close()
        stderr = getattr(self.running, "stderr_fd", -1)
        if isinstance(stderr, int) and stderr >= 0:
            self._stderr = StderrReader(self._loop, stderr, self._log)
        self.endpoint.start()
        timeout = self.config.qrexec_timeout
        try:
            async with asyncio.timeout(timeout):
                await self._greeted
        except TimeoutError:
            raise ResourceError(
                f"{self.name}: its agent did not answer within {timeout} seconds"
            ) from None
        self._serve_dom0()
        self._set_state("Running")

    def _serve_dom0(self) -> None:
        """Make the sockets by which dom0's clients reach the domain (6.2 step 9)."""
        prefix = f"{self._directory}/qrexec."
        self.endpoint.local = LocalServer(
            self._loop,
            f"{prefix}{self.domid}",
            self._local,
            self._log,
            links=(f"{prefix}{self.name}", f"{prefix}uuid:{self.config.uuid}"),
        )

    def _local(self, session: LocalSession, request: LocalRequest) -> None:
        self._owner.local_request(self, session, request)

    # --- ending ---------------------------------------------------------------------------

    def read_stderr(self, fd: int) -> None:
        """Log what a service of dom0 writes to stderr for this domain, to the end of the pipe.

        What it says may be the domain's own bytes, and as much as the domain likes.
        """
        StderrReader(self._loop, fd, self._log, last=False)

    def note(self, text: str) -> None:
        """Log a line that the domain caused, escaped already; floods of them are folded."""
        self._log(text)

    def stop(self, reason: str) -> None:
        """Begin to end the run, in order: close the control channel, which ends the agent."""
        self._end(reason, "Halting")

    def kill(self, reason: str) -> None:
        """End every process of the domain now."""
        self._end(reason, "Halting")
        if self.running is not None:
            self.running.kill()

    async def finish(self, seconds: float) -> None:
        """Wait until the run is over, give an agent that was told to stop ``seconds``, clean up.

        Runs as the one task of the run, from the moment that ``start`` returned or failed; it ends
        only when nothing of the domain is left. Cancelling it kills the domain.
        """
        running = self.running
        try:
            if running is not None:
                await self._wait(running, seconds)
        finally:
            self._end(self.reason or "the sandbox ended", "Halting")
            if running is not None:
                running.kill()
                await running.wait()
                await self._clean(running)
            if self._stderr is not None:
                self._stderr.close()
            self._set_state("Halted")
            if not self.ended.done():
                self.ended.set_result(None)

    async def _clean(self, running: RunningSandbox) -> None:
        """Clean up what is left; a failure is logged, for nobody must wait for a run in vain."""
        try:
            await running.clean()
        except (SluiceError, OSError) as error:
            self._log(f"not all of it was cleaned up: {escape(str(error), 300)}")

    async def _wait(self, running: RunningSandbox, seconds: float) -> None:
        """Wait for the sandbox's end; after the end of the channel no longer than ``seconds``."""
        sandbox = asyncio.ensure_future(running.wait())
        channel = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait({sandbox, channel}, return_when=asyncio.FIRST_COMPLETED)
            if not sandbox.done():
                await asyncio.wait({sandbox}, timeout=seconds)
        finally:
            for task in (sandbox, channel):
                task.cancel()
            await asyncio.gather(sandbox, channel, return_exceptions=True)

    def _end(self, reason: str, state: str) -> None:
        """Close everything that leads to the domain; tell what ended with it. Works once."""
        if self._gone.is_set():
            return
        self._gone.set()
        self.reason = reason
        self._theirs.close()
        self.endpoint.close()
        self._flood.flush()
        self._log.flush()
        if not self._greeted.done():
            self._greeted.set_exception(LocalError(f"{self.name}: {reason}"))
            self._greeted.exception()  # it was looked at, even if nobody waits
        self._set_state(state)
        for channel in self.calls.all():
            self.calls.release(channel)
            self._owner.channel_ended(self, channel, f"{self.name} is gone: {reason}")

    def _set_state(self, state: str) -> None:
        if self.state != state:
            self.state = state
            self._owner.state_changed(self)

    # --- what the endpoint tells ----------------------------------------------------------

    def greeted(self, endpoint: Endpoint) -> None:
        """Note the handshake."""
        if not self._greeted.done():
            self._greeted.set_result(None)

    def requested(self, endpoint: Endpoint, request: Request) -> None:
        """Pass a request on."""
        self._owner.requested(self, request)

    def rejected(self, endpoint: Endpoint, event: Rejected) -> None:
        """Count floods, pass on what was malformed."""
        if event.flood:
            self._flood.add(event.reason)
        else:
            self._owner.rejected(self, event.reason, 1)

    def _flooded(self, reason: str, count: int) -> None:
        self._log(f"{count} calls refused: {reason}")
        self._owner.rejected(self, reason, count)

    def ended_side(self, endpoint: Endpoint, channel: Channel) -> None:
        """Pass the end of a side on."""
        self._owner.channel_ended(self, channel, "")

    def lost(self, endpoint: Endpoint, reason: str, broken: bool) -> None:
        """End the run: without a control channel there is no domain."""
        if broken:
            self._log(f"protocol violation: {reason}")
        self._end(reason, "Halting")
        if broken and self.running is not None:
            self.running.kill()
