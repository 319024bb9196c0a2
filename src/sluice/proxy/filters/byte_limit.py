"""So many bytes and no more."""

from __future__ import annotations

from sluice.proxy.options import SizeLimit, idle
from sluice.proxy.verdicts import (
    CONTINUE,
    DST2SRC,
    PASS,
    SRC2DST,
    Abort,
    Close,
    Direction,
    Replace,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from sluice.proxy.link import Call, Link
    from sluice.proxy.verdicts import Answer


class ByteLimit:
    """Passes so many bytes of a direction; what follows is read and discarded.

    At the limit the far side sees end-of-file, and the sender is not blocked. With
    ``over = "abort"`` the first byte over the limit ends the call. A direction with limit 0 is
    closed before the first byte.
    """

    name = "byte-limit"
    aliases = (("src2dst_limit", "src2dst"), ("dst2src_limit", "dst2src"))

    class Options:
        """What can be set.

        src2dst: bytes that pass from source to target; -1 for no limit
        dst2src: bytes that pass from target to source; -1 for no limit
        over: what to do with the first byte over the limit
        """

        src2dst: SizeLimit = -1
        dst2src: SizeLimit = -1
        over: Literal["discard", "abort"] = "discard"

    @staticmethod
    def inspects(options: Options) -> tuple[Direction, ...]:
        """Look at limited directions only."""
        limits = ((SRC2DST, options.src2dst), (DST2SRC, options.dst2src))
        return tuple(direction for direction, limit in limits if limit >= 0)

    @staticmethod
    def describe(options: Options) -> list[str]:
        """Say where nothing is limited (for ``sluice proxy check``)."""
        return idle(options, "src2dst", "dst2src")

    def __init__(self, options: Options, link: Link) -> None:
        """Start counting."""
        self._left = [options.src2dst, options.dst2src]
        self._limits = [options.src2dst, options.dst2src]
        self._abort = options.over == "abort"

    def opened(self, call: Call) -> Answer:
        """Close a direction that may pass nothing."""
        if self._abort:
            return CONTINUE
        closed = tuple(Close(d) for d in (SRC2DST, DST2SRC) if self._limits[d] == 0)
        return (CONTINUE, *closed)

    def data(self, direction: Direction, chunk: memoryview) -> Answer:
        """Count; at the limit hand on what still fits and close."""
        left = self._left[direction]
        if len(chunk) > left and self._abort:
            return Abort(f"more than {self._limits[direction]} bytes {direction}")
        if len(chunk) < left or self._abort:
            self._left[direction] = left - len(chunk)
            return PASS
        self._left[direction] = 0
        return Replace(chunk[:left]), Close(direction)
