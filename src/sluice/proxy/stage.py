"""A filter's place in a chain and in a call, why a call ended, and which answer is allowed when.

docs/spec/proxy.md 5. The chain (chain.py) is what moves these.
"""

from __future__ import annotations

from sluice.proxy.link import DEFAULT_MAX_HELD, Held, HeldTooMuchError, Link, Memory
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
from sluice.wire.names import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sluice.proxy.chain import Chain

EVENTS = ("opened", "data", "eof", "timer", "closed")
# An error of a filter is told in so many characters at most.
_REASON = 300
# An exception of a filter is placed in the filter, not in what called it.
_MACHINERY = ("sluice.proxy.chain", "sluice.proxy.stage", "sluice.proxy.link")


class Cause:
    """Why a call ended: for log, audit and the exit code. ``reason`` is escaped already.

    ``kind`` is ``done``, ``filter`` (a filter's refusal or abort), ``filter-error`` (a filter is
    broken), ``refused`` (the proxy's own rules), ``busy`` (no place is free), ``far``
    (the far end could not be reached), ``source-gone``, ``closed-reader``, ``memory``,
    ``deadline``, ``killed`` or ``shutdown``.
    """

    __slots__ = ("exit_code", "filter", "kind", "reason")

    def __init__(
        self, kind: str, reason: str = "", *, filter: str | None = None, exit_code: int = 125
    ) -> None:
        """Take the kind, the reason, the name of the filter and the code for the source."""
        self.kind = kind
        self.reason = escape(reason, _REASON)
        self.filter = filter
        self.exit_code = exit_code

    def __str__(self) -> str:
        """Render for the log."""
        who = f"{self.filter}: " if self.filter else ""
        return f"{self.kind}: {who}{self.reason}" if self.reason else self.kind

    def __repr__(self) -> str:
        """Show all, for tests."""
        return f"Cause({self!s}, {self.exit_code})"


class FilterUse:
    """One place of a chain: the filter's class and its validated options.

    ``name`` is what log and audit call it. ``options`` has one attribute for each option.
    """

    __slots__ = ("cls", "name", "options", "values")

    def __init__(self, cls: type[Any], options: Any = None, name: str | None = None) -> None:
        """Take the class and the options; without a name it is the class's."""
        self.cls = cls
        self.options = options
        self.name = name or cls.name
        # The options as they were validated, without defaults: for `check` and for keeping.
        self.values: dict[str, Any] = {}

    def inspected(self) -> tuple[Direction, ...]:
        """Return the directions whose bytes the filter is asked about, given its options."""
        inspects = self.cls.inspects
        if callable(inspects):
            inspects = inspects(self.options)
        return directions(inspects)


def directions(inspects: Any) -> tuple[Direction, ...]:
    """Return what a filter says that it inspects. Raises TypeError where that is no direction.

    A word in the place of a direction would mean that the filter is never asked.
    """
    if isinstance(inspects, (tuple, list)) and all(isinstance(d, Direction) for d in inspects):
        return tuple(inspects)
    raise TypeError("inspects must be (), (SRC2DST,), (DST2SRC,) or (SRC2DST, DST2SRC)")


class Stage:
    """A filter in a call: its object, what it holds, what it said."""

    __slots__ = (
        "active",
        "charged",
        "eof_kept",
        "eof_seen",
        "filter",
        "held",
        "limit",
        "name",
        "on_drained",
        "paused",
        "resting",
        "shut",
        "use",
        "verdicts",
    )

    def __init__(self, chain: Chain, use: FilterUse) -> None:
        """Make the filter's object. Raises whatever its constructor raises."""
        self.use = use
        self.name = use.name
        self.charged = 0
        self.limit = DEFAULT_MAX_HELD
        self.held = tuple(Held(lambda size: self._charge(chain.memory, size)) for _ in DIRECTIONS)
        inspected = use.inspected()
        self.active = [direction in inspected for direction in DIRECTIONS]
        self.resting = [False, False]
        self.shut = [False, False]
        self.eof_seen = [False, False]
        self.eof_kept = [False, False]
        self.paused = [False, False]
        self.verdicts: dict[str, int] = {}
        self.on_drained: Callable[[Direction], None] | None = None
        self.filter: Any = use.cls(use.options, Link(chain, self))
        self.limit = getattr(self.filter, "max_held", DEFAULT_MAX_HELD)

    def _charge(self, memory: Memory, size: int) -> None:
        if size > 0 and self.charged + size > self.limit:
            raise HeldTooMuchError(f"holds more than the {self.limit} bytes that it declares")
        self.charged += size
        memory.add(size)

    def release(self) -> None:
        """Let go of all that is held."""
        for held in self.held:
            held.take()

    def count(self, verdict: Verdict) -> None:
        """Count a verdict for the audit record."""
        self.verdicts[verdict.name] = self.verdicts.get(verdict.name, 0) + 1


_ALLOWED: dict[str, tuple[tuple[Verdict, ...], tuple[type[Verdict], ...]]] = {
    "opened": ((PASS, HOLD, PASS_REST), (Refuse, Abort, Pause, Resume, Close)),
    "data": ((PASS, HOLD, DROP, PASS_REST), (Replace, Emit, Abort, Close, Pause, Resume)),
    "eof": ((PASS, HOLD), (Emit, Abort, Close, Pause, Resume)),
    "timer": ((PASS, PASS_REST), (Emit, Abort, Refuse, Close, Pause, Resume)),
    "act": ((PASS, PASS_REST), (Emit, Abort, Refuse, Close, Pause, Resume)),
}


def allowed(event: str, verdict: object) -> bool:
    """Tell whether a verdict may answer an event (the table of section 5)."""
    values, kinds = _ALLOWED[event]
    return verdict in values or isinstance(verdict, kinds)


def verdicts_of(event: str, answer: Any) -> tuple[Verdict, ...]:
    """Return what a filter answered as a tuple; ``allowed`` tells whether each is a verdict.

    None is taken as it is meant: the call may begin; the timer had nothing to do.
    """
    if isinstance(answer, tuple):
        return answer
    if answer is None and event in ("opened", "timer"):
        return (PASS,) if event == "opened" else ()
    return (answer,)


def where_raised(error: BaseException) -> str:
    """Return `` at FILE:LINE`` of the innermost place outside of the proxy's own machinery."""
    trace = error.__traceback__
    place = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if trace.tb_frame.f_globals.get("__name__") not in _MACHINERY:
            place = f" at {code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
