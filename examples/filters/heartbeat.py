"""Timers: do something while nothing arrives."""

from sluice.proxy.options import Duration
from sluice.proxy.verdicts import CONTINUE, DST2SRC, Emit


class Heartbeat:
    """Sends a dot to the source at intervals, so that it knows that the call is alive."""

    name = "heartbeat"
    inspects = ()

    class Options:
        """What can be set.

        every: the interval
        """

        every: Duration = 10.0

    def __init__(self, options, link):
        self.every = options.every
        self.link = link

    def opened(self, call):
        self.link.set_timer("beat", self.every)
        return CONTINUE

    def timer(self, key):
        if self.link.ended(DST2SRC):
            return ()
        self.link.set_timer("beat", self.every)
        return Emit(DST2SRC, b".")

    def eof(self, direction):
        from sluice.proxy.verdicts import PASS

        if direction == DST2SRC:
            self.link.cancel_timer("beat")
        return PASS
