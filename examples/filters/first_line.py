"""Close a direction early: what comes after is read and discarded."""

from sluice.proxy.verdicts import HOLD, PASS, SRC2DST, Abort, Close, Emit, Replace


class FirstLine:
    """Lets the first line of the source pass and nothing more."""

    name = "first-line"
    inspects = (SRC2DST,)
    max_held = 4096

    class Options:
        """None."""

    def __init__(self, options, link):
        self.link = link

    def data(self, direction, chunk):
        held = self.link.held(direction)
        end = bytes(chunk).find(b"\n")
        if end < 0:
            if len(held) + len(chunk) > self.max_held:
                return Abort("the first line is too long")
            return HOLD
        return Replace(held.take(), chunk[: end + 1]), Close(direction)

    def eof(self, direction):
        if direction != SRC2DST:
            return PASS
        return Emit(direction, self.link.held(direction).take()), PASS
