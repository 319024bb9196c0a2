"""A call that takes too long is ended."""

from __future__ import annotations

from sluice.proxy.options import DurationLimit, idle
from sluice.proxy.units import show_duration
from sluice.proxy.verdicts import CONTINUE, DST2SRC, SRC2DST, Abort

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.proxy.link import Call, Link
    from sluice.proxy.verdicts import Answer


class Timeout:
    """Ends the call when a direction has not ended by then, counted from the call's beginning.

    A direction has ended when its sender closed it and all that was sent is delivered.
    """

    name = "timeout"
    aliases = (("src2dst_timeout", "src2dst"), ("dst2src_timeout", "dst2src"))
    inspects = ()

    class Options:
        """What can be set.

        src2dst: time until source to target must have ended; -1 for never
        dst2src: time until target to source must have ended; -1 for never
        """

        src2dst: DurationLimit = -1
        dst2src: DurationLimit = -1

    @staticmethod
    def describe(options: Options) -> list[str]:
        """Say where nothing is limited (for ``sluice proxy check``)."""
        return idle(options, "src2dst", "dst2src")

    def __init__(self, options: Options, link: Link) -> None:
        """Take the times."""
        self._link = link
        self._times = {"src2dst": options.src2dst, "dst2src": options.dst2src}

    def opened(self, call: Call) -> Answer:
        """Start the clocks."""
        for key, delay in self._times.items():
            if delay >= 0:
                self._link.set_timer(key, delay)
        return CONTINUE

    def timer(self, key: str) -> Answer:
        """End the call if that direction has not ended."""
        direction = SRC2DST if key == "src2dst" else DST2SRC
        if self._link.ended(direction):
            return ()
        return Abort(f"{key} has not ended after {show_duration(self._times[key])}")
