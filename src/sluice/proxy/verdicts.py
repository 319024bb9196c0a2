"""What a filter can answer, and the words it shares with the chain (docs/spec/proxy.md 5).

An event is answered with one verdict, or with a tuple of them that is carried out in order.
Verdicts are values: making one does nothing. Imports nothing, so that every form of the proxy can
afford it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    Bytes: TypeAlias = bytes | memoryview


class Direction(int):
    """``SRC2DST`` (0) or ``DST2SRC`` (1): an index that shows its name."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """``src2dst`` or ``dst2src``."""
        return "dst2src" if self else "src2dst"

    @property
    def other(self) -> Direction:
        """The opposite direction."""
        return SRC2DST if self else DST2SRC

    def __repr__(self) -> str:
        """Show the name."""
        return self.name

    __str__ = __repr__


SRC2DST = Direction(0)
DST2SRC = Direction(1)
DIRECTIONS = (SRC2DST, DST2SRC)


class Verdict:
    """What all verdicts have in common: a name for messages and counters."""

    __slots__ = ()
    name = "verdict"

    def __repr__(self) -> str:
        """Show the name, for tests and messages."""
        return self.name


class _Pass(Verdict):
    __slots__ = ()
    name = "pass"


class _Hold(Verdict):
    __slots__ = ()
    name = "hold"


class _Drop(Verdict):
    __slots__ = ()
    name = "drop"


class _PassRest(Verdict):
    __slots__ = ()
    name = "pass-rest"


PASS = _Pass()
"""``data``: hand the chunk on. ``eof``: hand the end on. ``opened``: go on (also CONTINUE)."""

CONTINUE = PASS
"""``opened``: go on. Also what ends a HOLD of ``opened``, from a timer or ``Link.act``."""

HOLD = _Hold()
"""``data``: keep the whole chunk in ``link.held(direction)`` and wait for more. ``eof``: keep the
end back until a later ``Close(direction)``. ``opened``: the far end is not called before a later
CONTINUE."""

DROP = _Drop()
"""``data``: the chunk is gone. It is counted."""

PASS_REST = _PassRest()
"""``data``: hand the chunk on and do not ask again in this direction, not at its end either. After
another verdict of the same tuple, or from a timer (for both directions), it hands on nothing."""


class _Chunks(Verdict):
    __slots__ = ("chunks",)

    def __init__(self, *chunks: Bytes) -> None:
        """Take the bytes, in order. Empty ones are left out."""
        self.chunks = chunks

    def __repr__(self) -> str:
        return f"{self.name}({b''.join(self.chunks)[:60]!r})"


class Replace(_Chunks):
    """``data``: hand these bytes on in place of the chunk. Without bytes it is DROP."""

    __slots__ = ()
    name = "replace"


class Emit(Verdict):
    """Put bytes into a direction, behind this filter: what lies further on in it sees them."""

    __slots__ = ("chunks", "direction")
    name = "emit"

    def __init__(self, direction: Direction, *chunks: Bytes) -> None:
        """Take the direction and the bytes, in order."""
        self.direction = direction
        self.chunks = chunks

    def __repr__(self) -> str:
        return f"emit({self.direction}, {b''.join(self.chunks)[:60]!r})"


class _OfDirection(Verdict):
    __slots__ = ("direction",)

    def __init__(self, direction: Direction) -> None:
        """Take the direction."""
        self.direction = direction

    def __repr__(self) -> str:
        return f"{self.name}({self.direction})"


class Close(_OfDirection):
    """End a direction behind this filter: what lies further on sees end-of-file.

    What still arrives in it before this filter is read and discarded, so that the sender is not
    blocked.
    """

    __slots__ = ()
    name = "close"


class Pause(_OfDirection):
    """Read no more of a direction until this filter says Resume: back-pressure."""

    __slots__ = ()
    name = "pause"


class Resume(_OfDirection):
    """Undo Pause."""

    __slots__ = ()
    name = "resume"


class _WithReason(Verdict):
    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        """Take the reason for log and audit. It is escaped by who writes it."""
        self.reason = reason

    def __repr__(self) -> str:
        return f"{self.name}({self.reason!r})"


class Abort(_WithReason):
    """End the whole call now; both ends are closed within a second."""

    __slots__ = ()
    name = "abort"


class Refuse(_WithReason):
    """``opened``: do not make the call at all. The source gets exit code 126."""

    __slots__ = ()
    name = "refuse"


if TYPE_CHECKING:
    Answer: TypeAlias = Verdict | tuple[Verdict, ...] | None
