"""What kind of content a stream begins with."""

from __future__ import annotations

from sluice.proxy.kinds import GROUPS, KINDS, kind_of
from sluice.proxy.options import OptionError, Size, SizeLimit
from sluice.proxy.units import show_size
from sluice.proxy.verdicts import (
    DST2SRC,
    HOLD,
    PASS,
    PASS_REST,
    SRC2DST,
    Abort,
    Direction,
    Emit,
    Replace,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from sluice.proxy.link import Link
    from sluice.proxy.verdicts import Answer


class Content:
    """Judges a stream by the kind of content that it begins with (magic numbers), and its size.

    The first ``preview`` bytes are held until their kind is known; nothing of a forbidden kind
    passes. Afterwards the stream is moved by the kernel, unless its size is limited. Kinds are
    names such as ``pdf`` or groups such as ``image``; ``unknown`` is what is none of them, and an
    ``empty`` stream passes unless it is denied. It is a check of what something claims to be: a
    file can be of two kinds at once.
    """

    name = "content"

    class Options:
        """What can be set.

        allow: kinds or groups that may pass; none given means all
        deny: kinds or groups that may not pass
        preview: bytes that are looked at
        max_size: bytes that the stream may have; -1 for no limit
        direction: which direction is judged
        """

        allow: list[str] = []  # noqa: RUF012
        deny: list[str] = []  # noqa: RUF012
        preview: Size = 4 << 10
        max_size: SizeLimit = -1
        direction: Literal["src2dst", "dst2src", "both"] = "src2dst"

    @staticmethod
    def check(options: Options) -> None:
        """See that the kinds exist and that there is something to look at."""
        if not options.allow and not options.deny and options.max_size < 0:
            raise OptionError("allow", "kinds must be given, here or with deny or max_size")
        for option in ("allow", "deny"):
            for kind in getattr(options, option):
                if kind not in KINDS and kind not in GROUPS:
                    from sluice.proxy.schema import suggest

                    hint = suggest(kind, (*KINDS, *GROUPS))
                    raise OptionError(option, f"'{kind}' is no known kind, {hint}")
        if not 16 <= options.preview <= 1 << 20:
            raise OptionError("preview", "must be from 16 bytes to 1M")

    @staticmethod
    def inspects(options: Options) -> tuple[Direction, ...]:
        """Look at the directions that are judged."""
        if options.direction == "both":
            return (SRC2DST, DST2SRC)
        return (SRC2DST,) if options.direction == "src2dst" else (DST2SRC,)

    def __init__(self, options: Options, link: Link) -> None:
        """Resolve groups into kinds."""
        self._link = link
        self._options = options
        self._allow = _kinds(options.allow)
        self._deny = _kinds(options.deny)
        self._judged = [False, False]
        self._size = [0, 0]
        self._inspected = self.inspects(options)
        self.max_held = 2 * options.preview + (1 << 20)

    def data(self, direction: Direction, chunk: memoryview) -> Answer:
        """Hold the preview, judge it, then let the rest go."""
        self._size[direction] += len(chunk)
        limit = self._options.max_size
        if 0 <= limit < self._size[direction]:
            return Abort(f"{direction} is longer than {show_size(limit)}")
        if self._judged[direction]:
            return PASS
        held = self._link.held(direction)
        if len(held) + len(chunk) < self._options.preview:
            return HOLD
        refused = self._judge(direction, held.peek() + bytes(chunk[: self._options.preview]))
        if refused is not None:
            return refused
        if limit >= 0:
            return Replace(held.take(), chunk)
        return Replace(held.take(), chunk), PASS_REST

    def eof(self, direction: Direction) -> Answer:
        """Judge a stream that is shorter than the preview."""
        if direction not in self._inspected or self._judged[direction]:
            return PASS
        held = self._link.held(direction)
        refused = self._judge(direction, held.peek())
        return refused if refused is not None else (Emit(direction, held.take()), PASS)

    def _judge(self, direction: Direction, preview: bytes) -> Abort | None:
        self._judged[direction] = True
        kind = kind_of(preview[: self._options.preview])
        if kind in self._deny or (self._allow and kind not in self._allow and kind != "empty"):
            return Abort(f"{direction} is of kind {kind}")
        return None


def _kinds(names: list[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        found.update(GROUPS.get(name, (name,)))
    return found
