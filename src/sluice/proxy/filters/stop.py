"""One way only."""

from __future__ import annotations

from sluice.proxy.verdicts import CONTINUE, DST2SRC, SRC2DST, Close

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.proxy.link import Call, Link
    from sluice.proxy.verdicts import Answer


class _Stop:
    """Closes one direction at once; what is sent in it is read and discarded."""

    inspects = ()
    _direction = SRC2DST

    class Options:
        """None."""

    def __init__(self, options: Options, link: Link) -> None:
        """Take the options and the link to the chain."""

    def opened(self, call: Call) -> Answer:
        """Close the direction before its first byte."""
        return CONTINUE, Close(self._direction)


class StopSrc(_Stop):
    """Lets nothing pass from source to target: the target reads end-of-file at once.

    What the source sends is read and discarded, so that it is not blocked.
    """

    name = "stop-src"


class StopDst(_Stop):
    """Lets nothing pass from target to source: the source reads end-of-file at once.

    What the target sends is read and discarded. The target can still signal to the source by the
    moment at which it ends, by its exit code and by how fast it reads; the filter ``diode`` is for
    where that matters.
    """

    name = "stop-dst"
    _direction = DST2SRC
