"""The smallest filter that changes something: replace a chunk by another one."""

from sluice.proxy.verdicts import SRC2DST, Replace


class Upper:
    """Makes the letters that the source sends large."""

    name = "upper"
    inspects = (SRC2DST,)

    class Options:
        """None."""

    def __init__(self, options, link):
        pass

    def data(self, direction, chunk):
        return Replace(bytes(chunk).upper())
