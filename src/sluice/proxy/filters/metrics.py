"""Counters for a chain."""

from __future__ import annotations

from sluice.proxy.options import absolute
from sluice.proxy.verdicts import CONTINUE, DST2SRC, SRC2DST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.proxy.link import Call, Link
    from sluice.proxy.stage import Cause
    from sluice.proxy.verdicts import Answer


class Metrics:
    """Counts the calls of the chain, how they ended, their bytes and their time.

    The counters are kept over all processes and restarts, and ``sluice proxy metrics`` prints them
    in the Prometheus text format. The bytes are not looked at. What cannot be counted is logged and
    hinders no call. (The resident form has counters of all calls besides.)
    """

    name = "metrics"
    inspects = ()

    class Options:
        """What can be set.

        state: where the counters are kept; empty for the place of the configuration
        """

        state: str = ""

    @staticmethod
    def check(options: Options) -> None:
        """See that the place is the same for every call."""
        absolute("state", options.state)

    def __init__(self, options: Options, link: Link) -> None:
        """Take the options."""
        self._link = link
        self._base = options.state or link.state_directory
        self._begun = link.time()

    def opened(self, call: Call) -> Answer:
        """Note when the call began."""
        self._begun = self._link.time()
        return CONTINUE

    def closed(self, cause: Cause) -> None:
        """Add the call to the counters."""
        from sluice.proxy.metrics_file import add

        values = {
            f"calls:cause={cause.kind}": 1.0,
            "seconds": self._link.time() - self._begun,
        }
        for direction in (SRC2DST, DST2SRC):
            values[f"bytes:direction={direction}"] = float(self._link.moved(direction))
        try:
            add(self._base, self._link.chain, values)
        except OSError as error:
            self._link.log(f"not counted: {error.filename}: {error.strerror}")
