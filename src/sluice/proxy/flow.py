"""The flow of one proxied call: two ends, two streams, one chain (docs/spec/proxy.md 4).

Theory. A flow goes through

    opening    the filters are asked whether the call may begin; nothing is read
    open       the far end runs, both streams move bytes
    ending     aborted: every descriptor is closed, the far end is being ended (SIGTERM, after two
               seconds SIGKILL)
    over       ``on_end(flow)`` was called, once; nothing is left

It is over when the far end has exited and all that it said is delivered (or there is nobody to
take it), or, after an abort, when the far end is gone. A source that has ended *and* does not read
any more is gone: what it sent is delivered, and after a moment of grace the far end is ended too.
It runs on the Reactor or on an asyncio loop.
"""

from __future__ import annotations

from sluice.errors import SluiceError
from sluice.flow.endpoint import Endpoint, close_fd
from sluice.proxy.chain import FAILED, OPEN, Chain
from sluice.proxy.link import Call, Memory, Tools
from sluice.proxy.stage import Cause
from sluice.proxy.stream import Stream
from sluice.proxy.verdicts import DST2SRC, SRC2DST, Direction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sluice.flow.reactor import Handle, Loop
    from sluice.proxy.far import FarEnd
    from sluice.proxy.stage import FilterUse

KILL_AFTER = 2.0
# How long a far end may go on once its source is gone.
GONE_GRACE = 0.5
# How long reading may wait for memory that other calls hold (every state has a deadline).
MEMORY_PATIENCE = 60.0


class Settings:
    """What a flow is told by the configuration (section 3, 4 and 10)."""

    __slots__ = ("abort_on_closed_reader", "gone_grace", "memory_patience")

    def __init__(
        self,
        *,
        abort_on_closed_reader: bool = False,
        gone_grace: float | None = GONE_GRACE,
        memory_patience: float = MEMORY_PATIENCE,
    ) -> None:
        """Take what to do about readers that go away, and how long to wait for memory (seconds).

        ``gone_grace`` is None where the far end may outlive its source (the command form).
        """
        self.abort_on_closed_reader = abort_on_closed_reader
        self.gone_grace = gone_grace
        self.memory_patience = memory_patience


class Flow:
    """One call through a chain. Owns the source's two descriptors and the far end."""

    def __init__(
        self,
        loop: Loop,
        uses: Sequence[FilterUse],
        call: Call,
        far: FarEnd,
        *,
        in_fd: int,
        out_fd: int,
        on_end: Callable[[Flow], None],
        log: Callable[[str], None],
        settings: Settings | None = None,
        memory: Memory | None = None,
        tools: Tools | None = None,
    ) -> None:
        """Take the chain's filters, the call and its ends. ``in_fd`` is read, ``out_fd`` written.

        ``log`` takes lines that are escaped already. Nothing happens before ``start``.
        """
        self.loop = loop
        self.call = call
        self.far = far
        self.log = log
        self.settings = settings or Settings()
        self.memory = memory or Memory()
        self.tools = tools or Tools(log=log, loop=loop)
        self.tools.moved = self._moved  # type: ignore[method-assign]
        self.tools.delivered = self._delivered  # type: ignore[method-assign]
        self.tools.ended = self._ended  # type: ignore[method-assign]
        self.tools.waiting = self._waiting  # type: ignore[method-assign]
        self.chain = Chain(uses, call, clock=loop.time, tools=self.tools, memory=self.memory)
        self.chain.on_change = self.settle
        self.memory.listen(self._memory_changed)
        self.exit_code = 125
        self.cause: Cause | None = None
        # Times of the loop's clock: begun, far end called, first byte each way, ended.
        self.times: dict[str, float] = {"begun": loop.time()}
        self.streams: tuple[Stream, ...] = ()
        self._settling = self._again = self._soon = False
        self._shown_ended = [False, False]
        self._shown_paused = [False, False]
        self._on_end = on_end
        self._fds = (in_fd, out_fd)
        self._far_code: int | None = None
        self._far_running = False
        self._ending = self._over = False
        self._timer: Handle | None = None
        self._timer_due: float | None = None
        self._kill: Handle | None = None
        self._grace: Handle | None = None
        self._patience: Handle | None = None
        self._source_out: Endpoint | None = None

    # --- beginning --------------------------------------------------------------------------------

    def start(self) -> None:
        """Ask the filters, and call the far end as soon as they agree."""
        self._source_out = Endpoint(self.loop, self._fds[1], writing=True)
        self._source_out.on_hangup = self._gone_while_opening
        self._source_out.want_hangup(True)
        self.chain.open()
        self.settle()

    def _gone_while_opening(self) -> None:
        self.abort(Cause("source-gone", "the source went away before the call began"))

    def _call_far_end(self) -> None:
        """Start the far end and the streams."""
        self.times["called"] = self.loop.time()
        try:
            self.far.start(self._far_exited)
        except SluiceError as error:
            self.abort(Cause("far", str(error), exit_code=getattr(error, "code", 125)))
            return
        self._far_running = True
        assert self._source_out is not None
        self.streams = (
            Stream(self, SRC2DST, self._fds[0], self.far.in_fd),
            Stream(self, DST2SRC, self.far.out_fd, self._source_out),
        )
        for stream in self.streams:
            stream.start()
            if self._ending or self._over:
                return

    # --- after each event -------------------------------------------------------------------------

    def settle(self) -> None:
        """Look what the chain wants now. Called after everything that it is asked."""
        if self._over or self._ending:
            return
        if self._settling:
            # What a stream does here may be an event of its own: its source ended, say.
            self._again = True
            return
        self._settling = self._again = True
        try:
            while self._again and not (self._ending or self._over):
                self._again = False
                self._settle()
        finally:
            self._settling = False
        if not (self._over or self._ending):
            self._arm()
            self._check_over()

    def _settle(self) -> None:
        if self.chain.state == OPEN and not self.streams:
            self._call_far_end()
        if self.chain.state == FAILED:
            assert self.chain.failure is not None
            self.abort(self.chain.failure)
        for stream in self.streams:
            if self._ending or self._over:
                return
            stream.settle()
        if self.chain.state == FAILED or any(self.chain.out):
            self._again = True

    def inspected(self, stream: Stream) -> None:
        """Look at the chain after it was shown bytes, as far as it concerns other things."""
        out = self.chain.out[stream.direction.other]
        # These may be slices of a buffer that is read into again before the other pump writes.
        out[:] = [bytes(piece) for piece in out]
        if (
            self.chain.state == FAILED
            or out
            or self.chain.ended != self._shown_ended
            or self.chain.paused != self._shown_paused
            or self.chain.mode[stream.direction] != "inspect"
        ):
            self._shown_ended = self.chain.ended[:]
            self._shown_paused = self.chain.paused[:]
            # Now, not in the next round: what was closed or aborted lets nothing more pass.
            self.settle()
        elif self.chain.timers.next_due() != self._timer_due:
            self._arm()
        stream.update()

    def settle_soon(self) -> None:
        """Settle when the pump that is at work has written what it has."""
        if not self._soon:
            self._soon = True
            self.loop.call_soon(self._settle_now)

    def _settle_now(self) -> None:
        self._soon = False
        self.settle()

    def _arm(self) -> None:
        """Keep one timer of the loop at the chain's next time."""
        due = self.chain.timers.next_due()
        if due == self._timer_due:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_due = due
        if due is not None:
            self._timer = self.loop.call_later(due - self.loop.time(), self._expire)

    def _expire(self) -> None:
        self._timer = self._timer_due = None
        self.chain.expire()
        self.settle()

    def _check_over(self) -> None:
        """End the flow when the far end is done and all that it said is delivered."""
        self._check_gone()
        if self._far_code is None or not self.streams:
            return
        self.streams[SRC2DST].stop_reading()
        if self.streams[DST2SRC].finished and self.chain.state == OPEN:
            # One that is a chain itself knows better why it ended.
            told = getattr(self.far, "cause", None)
            self._finish(told or Cause("done", exit_code=self._far_code))

    # --- what streams tell ------------------------------------------------------------------------

    def reader_gone(self, stream: Stream) -> None:
        """Note that nobody reads the far side of a stream any more."""
        if self.settings.abort_on_closed_reader and self._far_code is None:
            who = "target" if stream.direction == SRC2DST else "source"
            self.abort(Cause("closed-reader", f"the {who} does not read any more"))
            return
        self._check_gone()
        self.settle_soon()

    def _check_gone(self) -> None:
        """A source that ended and does not read is gone: give the far end a moment, then end it."""
        if not self.streams or self.settings.gone_grace is None or self._grace is not None:
            return
        if not self.streams[DST2SRC].gone or not self.streams[SRC2DST].finished:
            return
        self._grace = self.loop.call_later(self.settings.gone_grace, self._source_gone)

    def _source_gone(self) -> None:
        self.abort(Cause("source-gone", "the source is gone"))

    def _memory_changed(self) -> None:
        """Memory became full or free: read on or wait, but not for ever."""
        if self._over or self._ending:
            return
        for stream in self.streams:
            stream.update()
        if self.memory.full and self._patience is None:
            self._patience = self.loop.call_later(
                self.settings.memory_patience, self._out_of_patience
            )
        elif not self.memory.full and self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _out_of_patience(self) -> None:
        self._patience = None
        if any(stream.pump.paused for stream in self.streams):
            self.abort(Cause("memory", "no memory became free"))

    # --- ending -----------------------------------------------------------------------------------

    def abort(self, cause: Cause) -> None:
        """End the call now: close every descriptor, end the far end. The first cause stands."""
        if self._ending or self._over:
            return
        self._ending = True
        self.cause = cause
        self.chain.fail(cause)
        self._close_descriptors()
        if self._far_running and self._far_code is None:
            self.far.terminate()
            self._kill = self.loop.call_later(KILL_AFTER, self.far.kill)
        else:
            self._finish(cause)

    def _far_exited(self, code: int) -> None:
        self._far_code = code
        self._far_running = False
        if self._kill is not None:
            self._kill.cancel()
        if self._ending:
            assert self.cause is not None
            self._finish(self.cause)
        else:
            # Not from inside start(): the streams must be there first.
            self.loop.call_soon(self.settle)

    def _close_descriptors(self) -> None:
        for handle in (self._timer, self._grace, self._patience):
            if handle is not None:
                handle.cancel()
        self._timer = self._timer_due = None
        if self.streams:
            for stream in self.streams:
                stream.close()
        elif self._fds != (-1, -1):
            close_fd(self._fds[0])
            if self._source_out is not None:
                self._source_out.shutdown(reading=False)
                self._source_out.close()
            else:
                close_fd(self._fds[1])
        self._fds = (-1, -1)

    def _finish(self, cause: Cause) -> None:
        if self._over:
            return
        self._over = True
        self.cause = cause
        self.exit_code = cause.exit_code
        self._close_descriptors()
        self.memory.forget(self._memory_changed)
        self.chain.close(cause)
        self.times["ended"] = self.loop.time()
        self._on_end(self)

    # --- counters ---------------------------------------------------------------------------------

    def _moved(self, direction: Direction) -> int:
        return self.streams[direction].moved if self.streams else 0

    def _delivered(self, direction: Direction) -> int:
        return self.streams[direction].pump.moved if self.streams else 0

    def _ended(self, direction: Direction) -> bool:
        return bool(self.streams) and self.streams[direction].finished

    def _waiting(self, direction: Direction) -> int:
        return self.streams[direction].pump.held if self.streams else 0

    def counters(self) -> dict[str, dict[str, int]]:
        """Return bytes read, written, spliced and discarded each way, for audit and ``top``."""
        return {stream.name: stream.counters() for stream in self.streams}

    @property
    def state(self) -> str:
        """``opening``, ``open``, ``ending`` or ``over``."""
        if self._over:
            return "over"
        if self._ending:
            return "ending"
        return "open" if self.streams else "opening"
