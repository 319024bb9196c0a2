"""Back-pressure: let the source wait until the target has answered."""

from sluice.proxy.verdicts import DST2SRC, PASS, SRC2DST, Pause, Resume


class OneAtATime:
    """After each line of the source nothing more of it is read before the target says something."""

    name = "one-at-a-time"
    inspects = (SRC2DST, DST2SRC)

    class Options:
        """None."""

    def __init__(self, options, link):
        pass

    def data(self, direction, chunk):
        if direction == SRC2DST:
            return (PASS, Pause(SRC2DST)) if bytes(chunk[-1:]) == b"\n" else PASS
        return PASS, Resume(SRC2DST)
