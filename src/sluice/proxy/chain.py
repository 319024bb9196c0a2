"""The chain: filters in a row, as a state machine without I/O (docs/spec/proxy.md 4 and 5).

Theory. A chain is asked about events (``open``, ``data``, ``eof``, ``expire``, ``act``) and changes
what it shows: ``out`` (bytes for the far side of each direction), ``ended`` (end-of-file is due
after them), ``paused``, ``mode`` and ``failure``. The one who drives it looks at these after each
event. Filters are traversed by function calls: ``src2dst`` bytes from first to last, ``dst2src``
bytes from last to first; what is forwarded are slices of the very buffer that was inspected.

    state      open()        CONTINUE of all     Refuse/Abort/error     close()
    new        opening       -                   -                      closed
    opening    -             open                failed                 closed
    open       -             -                   failed                 closed
    failed     -             -                   -                      closed

In each direction a filter is *active* (asked about bytes), *resting* (does not inspect it, or said
pass-rest, after which it is not told of the end either) or *shut* (closed the direction behind it:
what arrives before it is discarded). The mode of a direction follows: INSPECT while somebody before
the first shut filter is active, else DISCARD where one is shut, else SPLICE.

Whatever goes wrong in a filter (an exception, a verdict that its event does not allow, more bytes
held than declared, bytes held at the end) fails the chain: nothing that was not judged passes.
"""

from __future__ import annotations

from sluice.proxy.link import Call, HeldTooMuchError, Memory, Timers, Tools
from sluice.proxy.stage import Cause, FilterUse, Stage, allowed, verdicts_of, where_raised
from sluice.proxy.verdicts import (
    DIRECTIONS,
    DROP,
    HOLD,
    PASS,
    PASS_REST,
    Abort,
    Close,
    Direction,
    Emit,
    Pause,
    Refuse,
    Replace,
    Resume,
    Verdict,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from functools import partial

    from sluice.proxy.verdicts import Answer, Bytes
else:
    # The module functools costs a millisecond.
    from _functools import partial


NEW, OPENING, OPEN, FAILED, CLOSED = "new", "opening", "open", "failed", "closed"
SPLICE, INSPECT, DISCARD = "splice", "inspect", "discard"


class Chain:
    """The filters of one call. See the module's text for how it is driven."""

    def __init__(
        self,
        uses: Sequence[FilterUse],
        call: Call,
        *,
        clock: Callable[[], float],
        tools: Tools | None = None,
        memory: Memory | None = None,
    ) -> None:
        """Take the filters in order, the call, a clock that only goes forward.

        ``on_change`` may be set afterwards: it is called after what nobody else looks at: an
        ``act``, which comes from outside, and a failure in ``drained``.
        """
        self.call = call
        self.clock = clock
        self.tools = tools or Tools()
        self.memory = memory or Memory()
        self.state = NEW
        self.failure: Cause | None = None
        self.out: tuple[list[Bytes], list[Bytes]] = ([], [])
        self.ended = [False, False]
        self.mode = [SPLICE, SPLICE]
        self.paused = [False, False]
        self.dropped = [0, 0]
        self.on_change: Callable[[], None] | None = None
        self.stages: list[Stage] = []
        self.timers = Timers(clock)
        self._uses = uses
        self._path: tuple[list[Stage], list[Stage]] = ([], [])
        self._opening = 0
        self._to_finish: list[tuple[Stage, Direction]] = []
        self._busy = 0

    # --- events -------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the filters and ask each, first to last, whether the call may begin."""
        self.state = OPENING
        for use in self._uses:
            try:
                stage = Stage(self, use)
            except BaseException as error:
                self._broken(use.name, error)
                return
            self.stages.append(stage)
        self._path = (self.stages, self.stages[::-1])
        self._update()
        self._continue_opening()

    def data(self, direction: Direction, chunk: memoryview) -> None:
        """Take bytes from the sender of ``direction``.

        ``chunk`` is valid during this call; ``out`` may afterwards have slices of it.
        """
        if self.state == OPEN:
            self._push(direction, 0, [chunk])

    def eof(self, direction: Direction) -> None:
        """Take the end of what the sender of ``direction`` sends."""
        if self.state == OPEN:
            self._finish(direction, 0)

    def expire(self) -> None:
        """Call the timers that are due by the clock, the earliest first."""
        for stage, key in self.timers.due():
            if self.state in (OPENING, OPEN):
                self._outside(stage, "timer", partial(stage.filter.timer, key))

    def act(self, stage: Stage, verdicts: Iterable[Verdict]) -> None:
        """Carry out what a filter wants at a time of its own (``Link.act``)."""
        if self.state not in (OPENING, OPEN):
            return
        self._outside(stage, "act", lambda: tuple(verdicts))
        if self.on_change is not None and not self._busy:
            self.on_change()

    def drained(self, direction: Direction) -> None:
        """Tell the filters that asked for it that what waited in a direction is delivered."""
        for stage in self.stages:
            if stage.on_drained is not None and self.state == OPEN:
                try:
                    stage.on_drained(direction)
                except BaseException as error:
                    self._broken(stage.name, error)
        if self.state == FAILED and self.on_change is not None:
            self.on_change()

    def fail(self, cause: Cause) -> None:
        """End the call; the first cause stands."""
        if self.failure is None:
            self.failure = cause
        if self.state != CLOSED:
            self.state = FAILED

    def close(self, cause: Cause) -> None:
        """Tell every filter, once, that the call is over, and let go of what they hold."""
        if self.state == CLOSED:
            return
        self.state = CLOSED
        self.timers.clear()
        for stage in self.stages:
            closed = getattr(stage.filter, "closed", None)
            if closed is not None:
                try:
                    closed(cause)
                except BaseException as error:
                    self._broken(stage.name, error)
            stage.release()

    # --- opening ------------------------------------------------------------------------------

    def _continue_opening(self) -> None:
        """Ask the filters from ``_opening`` on; stop where one holds or refuses."""
        while self.state == OPENING and self._opening < len(self.stages):
            stage = self.stages[self._opening]
            opened = getattr(stage.filter, "opened", None)
            if opened is not None:
                answer = self._ask(stage, "opened", partial(opened, self.call))
                if self.state != OPENING:
                    return
                if HOLD in answer:
                    return
            self._opening += 1
        if self.state == OPENING:
            self.state = OPEN
            for stage, direction in self._to_finish:
                self._finish(direction, self._path[direction].index(stage) + 1)

    # --- bytes --------------------------------------------------------------------------------

    def _push(self, direction: Direction, at: int, pieces: list[Bytes]) -> None:
        """Lead pieces through the filters from place ``at`` of the direction's path."""
        path = self._path[direction]
        for place in range(at, len(path)):
            stage = path[place]
            if stage.shut[direction]:
                self.dropped[direction] += sum(map(len, pieces))
                return
            if not stage.active[direction]:
                continue
            result: list[Bytes] = []
            for piece in pieces:
                if stage.active[direction] and not stage.shut[direction]:
                    self._judge(stage, direction, piece, result)
                elif stage.shut[direction]:
                    self.dropped[direction] += len(piece)
                else:
                    result.append(piece)
                if self.state != OPEN:
                    return
            if stage.shut[direction]:
                if result:
                    self._push(direction, place + 1, result)
                self._finish(direction, place + 1)
                return
            if not result:
                return
            pieces = result
        self.out[direction].extend(pieces)

    def _judge(self, stage: Stage, direction: Direction, piece: Bytes, result: list[Bytes]) -> None:
        """Ask one filter about one piece; append what it hands on to ``result``."""
        view = piece if isinstance(piece, memoryview) else memoryview(piece)
        answer = self._ask(stage, "data", partial(stage.filter.data, direction, view), direction)
        decided = False
        for verdict in answer:
            if verdict is PASS or (verdict is PASS_REST and not decided):
                result.append(piece)
            elif verdict is HOLD:
                self._hold(stage, direction, piece)
            elif verdict is DROP:
                self.dropped[direction] += len(piece)
            elif isinstance(verdict, Replace):
                result.extend(chunk for chunk in verdict.chunks if len(chunk))
            elif isinstance(verdict, Emit) and verdict.direction == direction:
                result.extend(chunk for chunk in verdict.chunks if len(chunk))
                continue
            if verdict is PASS_REST:
                self._rest(stage, direction)
            decided = True

    def _hold(self, stage: Stage, direction: Direction, piece: Bytes) -> None:
        """Keep a piece for a filter, within the bound that it declares."""
        try:
            stage.held[direction].append(piece)
        except HeldTooMuchError as error:
            self._abort(stage, str(error), "filter-error")

    def _rest(self, stage: Stage, direction: Direction) -> None:
        """Ask a filter no more about a direction. What it holds must be gone."""
        if len(stage.held[direction]):
            self._abort(stage, "said pass-rest while it held bytes", "filter-error")
            return
        stage.active[direction] = False
        stage.resting[direction] = True
        self._update()

    def _finish(self, direction: Direction, at: int) -> None:
        """Lead end-of-file through the filters from place ``at``."""
        path = self._path[direction]
        for place in range(at, len(path)):
            stage = path[place]
            if stage.eof_seen[direction]:
                return
            stage.eof_seen[direction] = True
            if stage.shut[direction]:
                return
            eof = getattr(stage.filter, "eof", None)
            if eof is not None and not stage.resting[direction]:
                emitted: list[Bytes] = []
                answer = self._ask(stage, "eof", partial(eof, direction), direction)
                for verdict in answer:
                    if isinstance(verdict, Emit) and verdict.direction == direction:
                        emitted.extend(chunk for chunk in verdict.chunks if len(chunk))
                if self.state != OPEN:
                    return
                if emitted:
                    self._push(direction, place + 1, emitted)
                if self.state != OPEN:
                    return
                if HOLD in answer and not stage.shut[direction]:
                    stage.eof_kept[direction] = True
                    return
            if len(stage.held[direction]):
                self._abort(
                    stage, f"{direction} ended while it held undecided bytes", "filter-error"
                )
                return
            if stage.shut[direction]:
                self._finish(direction, place + 1)
                return
        self.ended[direction] = True

    # --- verdicts -----------------------------------------------------------------------------

    def _outside(self, stage: Stage, event: str, ask: Callable[[], Answer]) -> None:
        """Carry out the answer to an event that is not part of a stream."""
        answer = self._ask(stage, event, ask)
        if self.state == OPENING and PASS in answer and stage is self.stages[self._opening]:
            self._opening += 1
            self._continue_opening()

    def _ask(
        self,
        stage: Stage,
        event: str,
        ask: Callable[[], Answer],
        direction: Direction | None = None,
    ) -> tuple[Verdict, ...]:
        """Call a filter, check its answer, carry out all but the bytes of ``direction``.

        Returns the verdicts. ``direction`` is the one that is being led, if any.
        """
        self._busy += 1
        try:
            answer = ask()
        except BaseException as error:
            self._broken(stage.name, error)
            return ()
        finally:
            self._busy -= 1
        verdicts = verdicts_of(event, answer)
        for verdict in verdicts:
            if not allowed(event, verdict):
                self._abort(stage, f"answered {verdict!r} to {event}", "filter-error")
                return ()
            self._carry_out(stage, verdict, direction)
            if self.state not in (OPENING, OPEN):
                break
        return verdicts

    def _carry_out(self, stage: Stage, verdict: Verdict, direction: Direction | None) -> None:
        """Do what a verdict says, but for the bytes of the direction that is being led."""
        stage.count(verdict)
        if isinstance(verdict, (Abort, Refuse)):
            self._abort(stage, verdict.reason, "filter")
        elif isinstance(verdict, (Pause, Resume)):
            stage.paused[verdict.direction] = isinstance(verdict, Pause)
            self._update()
        elif isinstance(verdict, Close):
            self._shut(stage, verdict.direction, now=verdict.direction != direction)
        elif isinstance(verdict, Emit) and verdict.direction != direction:
            self._emit(stage, verdict)
        elif verdict is PASS_REST and direction is None:
            for each in DIRECTIONS:
                if stage.active[each]:
                    self._rest(stage, each)

    def _emit(self, stage: Stage, verdict: Emit) -> None:
        """Put bytes behind a filter into a direction that is not being led just now."""
        direction = verdict.direction
        if stage.shut[direction] or (stage.eof_seen[direction] and not stage.eof_kept[direction]):
            self._abort(stage, f"emitted bytes after the end of {direction}", "filter-error")
            return
        chunks = [chunk for chunk in verdict.chunks if len(chunk)]
        if chunks:
            place = self._path[direction].index(stage)
            if self.state == OPEN:
                self._push(direction, place + 1, chunks)
            else:
                self._abort(stage, "emitted bytes before the call began", "filter-error")

    def _shut(self, stage: Stage, direction: Direction, *, now: bool) -> None:
        """Close a direction behind a filter; ``now`` where it is not being led."""
        if stage.shut[direction]:
            return
        ended = stage.eof_seen[direction] and not stage.eof_kept[direction]
        stage.shut[direction] = True
        stage.eof_kept[direction] = False
        stage.paused[direction] = False
        stage.held[direction].take()
        self._update()
        if now and not ended:
            if self.state == OPENING:
                # Filters further on may not have been opened yet: they hear of it afterwards.
                self._to_finish.append((stage, direction))
            else:
                self._finish(direction, self._path[direction].index(stage) + 1)

    def _update(self) -> None:
        """Work out mode and pause of both directions anew."""
        for direction in DIRECTIONS:
            mode = SPLICE
            for stage in self._path[direction]:
                if stage.shut[direction]:
                    mode = DISCARD if mode == SPLICE else mode
                    break
                if stage.active[direction]:
                    mode = INSPECT
            self.mode[direction] = mode
            self.paused[direction] = any(stage.paused[direction] for stage in self.stages)

    # --- failing ------------------------------------------------------------------------------

    def _abort(self, stage: Stage, reason: str, kind: str) -> None:
        """Fail because of a filter: its own wish (126), or its defect (125)."""
        code = 126 if kind == "filter" else 125
        self.fail(Cause(kind, reason, filter=stage.name, exit_code=code))

    def _broken(self, name: str, error: BaseException) -> None:
        """Fail because a filter raised; the cause names its file and line.

        Its SystemExit ends its call too, not the process with all the others.
        """
        if isinstance(error, KeyboardInterrupt):
            raise error  # the user's, whoever happened to be at work
        text = f"{type(error).__name__}: {error}{where_raised(error)}"
        cause = Cause("filter-error", text, filter=name, exit_code=125)
        self.tools.log(f"{name}: {cause.reason}")
        self.fail(cause)
