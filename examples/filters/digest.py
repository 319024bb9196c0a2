"""Only look: note what passed in the log when the call is over."""

import hashlib

from sluice.proxy.verdicts import DST2SRC, PASS, SRC2DST


class Digest:
    """Logs the SHA-256 digest of each direction."""

    name = "digest"
    inspects = (SRC2DST, DST2SRC)

    class Options:
        """None."""

    def __init__(self, options, link):
        self.link = link
        self.sums = {SRC2DST: hashlib.sha256(), DST2SRC: hashlib.sha256()}

    def data(self, direction, chunk):
        self.sums[direction].update(chunk)
        return PASS

    def closed(self, cause):
        for direction, digest in self.sums.items():
            self.link.log(f"{direction} sha256 {digest.hexdigest()}")
