"""Tests of filters as a script of events and expected answers (docs/spec/proxy.md 6).

    from sluice.proxy.playbook import SRC2DST, data, eof, passes, ends, play

    play(MyFilter, limit=3) >> data(SRC2DST, b"abcdef") << passes(b"abc") << ends(SRC2DST)

``>>`` is an event, ``<<`` what must have come of it. What comes out and was not expected before
the next event, or at ``done()``, fails the test too. Time stands still until ``after(seconds)``.
The memory of a chunk is overwritten after each event, so that a filter that keeps a view of it
instead of a copy is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sluice.proxy.chain import FAILED, OPEN, Chain
from sluice.proxy.link import Call, Memory, Tools
from sluice.proxy.stage import Cause, FilterUse
from sluice.proxy.verdicts import DST2SRC, SRC2DST, Direction, Verdict

Event = Callable[["Playbook"], None]
Expectation = Callable[["Playbook"], None]


class Playbook:
    """A chain under test; made by ``play``. ``log`` has the lines that its filters logged."""

    def __init__(
        self, uses: Sequence[FilterUse], call: Call, *, chance: float = 0.5, wall: float = 1e9
    ) -> None:
        """Take the filters and the call; ``chance`` is what ``link.random()`` returns."""
        self.now = 0.0
        self.wall = wall
        self.log: list[str] = []
        self.tools = Tools(
            wall_clock=lambda: self.wall + self.now,
            random=lambda: chance,
            log=self.log.append,
        )
        self.tools.moved = self._moved  # type: ignore[method-assign]
        self.tools.delivered = self._delivered  # type: ignore[method-assign]
        self.tools.ended = lambda direction: self._ended[direction]  # type: ignore[method-assign]
        self.memory = Memory()
        self.chain = Chain(uses, call, clock=lambda: self.now, tools=self.tools, memory=self.memory)
        self._count = [0, 0]
        self._came = [0, 0]
        self._ended = [False, False]
        self._seen_end = [False, False]
        self._out = [bytearray(), bytearray()]
        self._failure: Cause | None = None
        self.opened = False

    @property
    def filter(self) -> Any:
        """The first filter's object."""
        return self.chain.stages[0].filter

    def open(self) -> Playbook:
        """Begin the call; comes by itself before the first event."""
        if not self.opened:
            self.opened = True
            self.chain.open()
            self._collect()
        return self

    def __rshift__(self, event: Event) -> Playbook:
        """Let something happen."""
        self.open()
        self._nothing_left()
        event(self)
        self._collect()
        return self

    def __lshift__(self, expectation: Expectation) -> Playbook:
        """Check what came of it."""
        self.open()
        expectation(self)
        return self

    def done(self) -> Playbook:
        """Check that nothing came that was not expected."""
        self._nothing_left()
        return self

    # --- for events -------------------------------------------------------------------------------

    def send(self, direction: Direction, payload: bytes) -> None:
        """Give bytes to the chain as the flow does, and spoil their memory afterwards."""
        self._count[direction] += len(payload)
        buffer = bytearray(payload)
        self.chain.data(direction, memoryview(buffer))
        self._collect()
        buffer[:] = b"\xdd" * len(buffer)

    def end(self, direction: Direction) -> None:
        """Give the end of a direction."""
        self.chain.eof(direction)

    def advance(self, seconds: float) -> None:
        """Let time pass; each timer is called at its own moment."""
        until = self.now + seconds
        while True:
            due = self.chain.timers.next_due()
            if due is None or due > until or self.chain.state == FAILED:
                break
            self.now = max(self.now, due)
            self.chain.expire()
            self._collect()
        self.now = until

    def mark_ended(self, direction: Direction) -> None:
        """Make ``link.ended(direction)`` true: delivered to the far side."""
        self._ended[direction] = True

    def _moved(self, direction: Direction) -> int:
        return self._count[direction]

    def _delivered(self, direction: Direction) -> int:
        return self._came[direction]

    def _collect(self) -> None:
        for direction in (SRC2DST, DST2SRC):
            for piece in self.chain.out[direction]:
                self._out[direction] += piece
                self._came[direction] += len(piece)
            self.chain.out[direction].clear()

    def _nothing_left(self) -> None:
        for direction in (SRC2DST, DST2SRC):
            assert not self._out[direction], (
                f"{direction}: {bytes(self._out[direction])!r} passed, nobody expected it"
            )
            assert not (self.chain.ended[direction] and not self._seen_end[direction]), (
                f"{direction} ended, nobody expected it"
            )
        if self.chain.failure is not None and self._failure is None:
            raise AssertionError(f"failed, nobody expected it: {self.chain.failure}")

    # --- for expectations -------------------------------------------------------------------------

    def take(self, direction: Direction) -> bytes:
        """Return and forget what came out of a direction."""
        taken = bytes(self._out[direction])
        self._out[direction].clear()
        return taken

    def take_end(self, direction: Direction) -> bool:
        """Tell whether a direction ended; that is expected from now on."""
        self._seen_end[direction] = True
        return self.chain.ended[direction]

    def take_failure(self) -> Cause | None:
        """Return why the chain failed, if it did; that is expected from now on."""
        self._failure = self.chain.failure
        return self._failure


def play(
    *filters: type[Any] | FilterUse | tuple[type[Any], dict[str, Any]],
    call: Call | None = None,
    chance: float = 0.5,
    **options: Any,
) -> Playbook:
    """Return a playbook of one filter with ``options``, or of several ``(class, options)``.

    Options are validated as in a configuration file.
    """
    from sluice.proxy.schema import use_filter

    uses = []
    for each in filters:
        if isinstance(each, FilterUse):
            uses.append(each)
        elif isinstance(each, tuple):
            uses.append(use_filter(each[0], each[1]))
        else:
            uses.append(use_filter(each, options if len(filters) == 1 else {}))
    return Playbook(uses, call or Call("work", "vault", "test.Service", chain="x"), chance=chance)


# --- events ---------------------------------------------------------------------------------------


def data(direction: Direction, payload: bytes) -> Event:
    """Bytes arrive."""
    return lambda book: book.send(direction, payload)


def eof(direction: Direction) -> Event:
    """The sender of a direction ends."""
    return lambda book: book.end(direction)


def after(seconds: float) -> Event:
    """Time passes."""
    return lambda book: book.advance(seconds)


def delivered(direction: Direction) -> Event:
    """All of a direction was delivered and it was closed."""
    return lambda book: book.mark_ended(direction)


def closed(kind: str = "done") -> Event:
    """The call is over."""
    return lambda book: book.chain.close(Cause(kind))


def acts(*verdicts: Verdict) -> Event:
    """The first filter acts at a time of its own."""
    return lambda book: book.chain.act(book.chain.stages[0], verdicts)


# --- expectations ---------------------------------------------------------------------------------


def passes(payload: bytes, direction: Direction | None = None) -> Expectation:
    """These bytes, and no others, came out (of a direction, or of whichever has some)."""

    def check(book: Playbook) -> None:
        if direction is None:
            got = book.take(SRC2DST) or book.take(DST2SRC)
        else:
            got = book.take(direction)
        assert got == payload, f"passed {got!r}, not {payload!r}"

    return check


def nothing() -> Expectation:
    """No byte came out."""

    def check(book: Playbook) -> None:
        book.done()

    return check


def ends(direction: Direction) -> Expectation:
    """The far side of a direction sees end-of-file."""

    def check(book: Playbook) -> None:
        assert book.take_end(direction), f"{direction} has not ended"

    return check


def aborts(part: str = "", kind: str | None = None) -> Expectation:
    """The call is aborted or refused, and the reason contains ``part``."""

    def check(book: Playbook) -> None:
        failure = book.take_failure()
        assert failure is not None, "did not abort"
        assert part in failure.reason, f"aborted with {failure.reason!r}"
        assert kind is None or failure.kind == kind, f"aborted with kind {failure.kind}"

    return check


def waits() -> Expectation:
    """The call has not begun yet."""

    def check(book: Playbook) -> None:
        assert book.chain.state == "opening", book.chain.state

    return check


def begins() -> Expectation:
    """The call has begun."""

    def check(book: Playbook) -> None:
        assert book.chain.state == OPEN, book.chain.state

    return check


def paused(direction: Direction, expected: bool = True) -> Expectation:
    """A direction is not read just now (or is)."""

    def check(book: Playbook) -> None:
        assert book.chain.paused[direction] is expected, f"{direction}: {book.chain.paused}"

    return check


def mode(direction: Direction, expected: str) -> Expectation:
    """A direction is in mode ``splice``, ``inspect`` or ``discard``."""

    def check(book: Playbook) -> None:
        assert book.chain.mode[direction] == expected, book.chain.mode[direction]

    return check


def logs(part: str) -> Expectation:
    """A line with ``part`` was logged; it and those before are forgotten."""

    def check(book: Playbook) -> None:
        for place, line in enumerate(book.log):
            if part in line:
                del book.log[: place + 1]
                return
        raise AssertionError(f"{part!r} was not logged: {book.log}")

    return check
