"""Hold bytes until there are enough of them to decide, then ask for no more."""

from sluice.proxy.verdicts import HOLD, PASS, PASS_REST, SRC2DST, Abort, Replace


class RequireMagic:
    """Lets a stream pass only if it begins with certain bytes."""

    name = "require-magic"
    inspects = (SRC2DST,)

    class Options:
        """What can be set.

        magic: the bytes, as text
        """

        magic: str

    def __init__(self, options, link):
        self.magic = options.magic.encode()
        self.link = link

    def data(self, direction, chunk):
        held = self.link.held(direction)
        start = held.peek() + bytes(chunk)
        if not start.startswith(self.magic[: len(start)]):
            return Abort("does not begin as it must")
        if len(start) < len(self.magic):
            return HOLD
        # From here on the kernel moves the bytes; we are not asked again.
        return Replace(held.take(), chunk), PASS_REST

    def eof(self, direction):
        if direction == SRC2DST:
            return Abort("ended before it was known what it is")
        return PASS
