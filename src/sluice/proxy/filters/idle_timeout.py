"""A call in which nothing happens is ended."""

from __future__ import annotations

from sluice.proxy.options import DurationLimit, OptionError, idle
from sluice.proxy.units import show_duration
from sluice.proxy.verdicts import CONTINUE, DST2SRC, SRC2DST, Abort, Direction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.proxy.link import Call, Link
    from sluice.proxy.verdicts import Answer

_DIRECTIONS = {"both": (SRC2DST, DST2SRC), "src2dst": (SRC2DST,), "dst2src": (DST2SRC,)}
# How often in that time the counters are looked at: the call ends at most a quarter later.
_LOOKS = 4
_SHORTEST = 0.1


class IdleTimeout:
    """Ends the call when no byte moved for so long: none was read, and none was delivered.

    The bytes are not looked at, only counted, so they are moved by the kernel. The counters are
    read four times in the interval: the call ends between one and one and a quarter of it after
    the last byte. A direction that has ended is no longer watched on its own.
    """

    name = "idle-timeout"
    inspects = ()

    class Options:
        """What can be set.

        both: time without a byte in either direction; -1 for never
        src2dst: time without a byte from source to target; -1 for never
        dst2src: time without a byte from target to source; -1 for never
        """

        both: DurationLimit = -1
        src2dst: DurationLimit = -1
        dst2src: DurationLimit = -1

    @staticmethod
    def check(options: Options) -> None:
        """See that there is time between two looks."""
        for name in ("both", "src2dst", "dst2src"):
            if 0 <= getattr(options, name) < _SHORTEST:
                raise OptionError(name, "must be at least 100ms")

    @staticmethod
    def describe(options: Options) -> list[str]:
        """Say where nothing is limited (for ``sluice proxy check``)."""
        return idle(options, "both", "src2dst", "dst2src")

    def __init__(self, options: Options, link: Link) -> None:
        """Take the times."""
        self._link = link
        self._times = {
            key: time
            for key, time in (
                ("both", options.both),
                ("src2dst", options.src2dst),
                ("dst2src", options.dst2src),
            )
            if time >= 0
        }
        self._seen: dict[str, tuple[int, float]] = {}

    def opened(self, call: Call) -> Answer:
        """Begin to watch."""
        for key in self._times:
            self._seen[key] = (0, self._link.time())
            self._link.set_timer(key, self._times[key] / _LOOKS)
        return CONTINUE

    def timer(self, key: str) -> Answer:
        """Look whether bytes moved since the last time."""
        directions = _DIRECTIONS[key]
        if all(self._link.ended(direction) for direction in directions):
            return ()
        now, moved = self._link.time(), self._moved(directions)
        before, since = self._seen[key]
        if moved != before:
            self._seen[key] = (moved, now)
        elif now - since >= self._times[key] - 1e-6:
            where = "" if key == "both" else f" {key}"
            return Abort(f"no byte moved{where} for {show_duration(self._times[key])}")
        self._link.set_timer(key, self._times[key] / _LOOKS)
        return ()

    def _moved(self, directions: tuple[Direction, ...]) -> int:
        # Both: a slow filter or reader takes its time with what was read long ago.
        link = self._link
        return sum(link.moved(each) + link.delivered(each) for each in directions)
