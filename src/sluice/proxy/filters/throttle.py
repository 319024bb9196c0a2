"""So many bytes a second."""

from __future__ import annotations

from sluice.proxy.options import OptionError, Size, SizeLimit, idle
from sluice.proxy.verdicts import (
    DST2SRC,
    HOLD,
    PASS,
    SRC2DST,
    Close,
    Direction,
    Emit,
    Pause,
    Replace,
    Resume,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.proxy.link import Link
    from sluice.proxy.verdicts import Answer

_LEAST_WAIT = 0.001


class Throttle:
    """Lets so many bytes a second pass: a token bucket a direction.

    By the filter's clock never more than rate times time plus ``burst`` bytes have passed. The
    sender waits; nothing is lost.
    """

    name = "throttle"

    class Options:
        """What can be set.

        src2dst: bytes a second from source to target; -1 for no limit
        dst2src: bytes a second from target to source; -1 for no limit
        burst: bytes that may pass at once after a pause
        """

        src2dst: SizeLimit = -1
        dst2src: SizeLimit = -1
        burst: Size = 64 << 10

    @staticmethod
    def check(options: Options) -> None:
        """See that something can pass at all."""
        for name in ("src2dst", "dst2src"):
            if getattr(options, name) == 0:
                raise OptionError(name, "a rate of 0 lets nothing pass; stop-src and stop-dst do")
        if options.burst < 1:
            raise OptionError("burst", "must be at least 1")

    @staticmethod
    def inspects(options: Options) -> tuple[Direction, ...]:
        """Look at limited directions only."""
        rates = ((SRC2DST, options.src2dst), (DST2SRC, options.dst2src))
        return tuple(direction for direction, rate in rates if rate > 0)

    @staticmethod
    def describe(options: Options) -> list[str]:
        """Say where nothing is limited (for ``sluice proxy check``)."""
        return idle(options, "src2dst", "dst2src")

    def __init__(self, options: Options, link: Link) -> None:
        """Begin with full buckets."""
        self._link = link
        self._rates = (options.src2dst, options.dst2src)
        self._burst = options.burst
        self._tokens = [float(options.burst)] * 2
        self._filled = [link.time()] * 2
        self._ending = [False, False]

    def data(self, direction: Direction, chunk: memoryview) -> Answer:
        """Hand on what the bucket has; hold the rest and let the sender wait."""
        held = self._link.held(direction)
        self._fill(direction)
        if not len(held) and len(chunk) <= self._tokens[direction]:
            self._tokens[direction] -= len(chunk)
            return PASS
        now = 0 if len(held) else int(self._tokens[direction])
        held.append(chunk[now:])
        self._tokens[direction] -= now
        self._wait(direction)
        return Replace(chunk[:now]), Pause(direction)

    def eof(self, direction: Direction) -> Answer:
        """Keep the end back until all is handed on."""
        if not len(self._link.held(direction)):
            return PASS
        self._ending[direction] = True
        return HOLD

    def timer(self, key: str) -> Answer:
        """Hand on what the bucket has by now."""
        direction = SRC2DST if key == "src2dst" else DST2SRC
        held = self._link.held(direction)
        self._fill(direction)
        piece = held.take(int(self._tokens[direction]))
        self._tokens[direction] -= len(piece)
        if len(held):
            self._wait(direction)
            return Emit(direction, piece)
        last = Close(direction) if self._ending[direction] else Resume(direction)
        return Emit(direction, piece), last

    def _fill(self, direction: Direction) -> None:
        now = self._link.time()
        gained = (now - self._filled[direction]) * self._rates[direction]
        self._tokens[direction] = min(self._tokens[direction] + gained, self._burst)
        self._filled[direction] = now

    def _wait(self, direction: Direction) -> None:
        """Come back when there is enough for what is held, or a good part of the bucket."""
        wanted = min(len(self._link.held(direction)), max(self._burst // 2, 1))
        missing = max(wanted - self._tokens[direction], 0)
        # A part of a byte is worth no wake-up, and rounding may always leave one over.
        self._link.set_timer(direction.name, max(missing / self._rates[direction], _LEAST_WAIT))
