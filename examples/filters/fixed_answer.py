"""Answer in the target's place: emit into the other direction and close it."""

from sluice.proxy.verdicts import DROP, DST2SRC, PASS, SRC2DST, Close, Emit


class FixedAnswer:
    """Gives the source an answer of ours and lets the target hear nothing of the question."""

    name = "fixed-answer"
    inspects = (SRC2DST, DST2SRC)

    class Options:
        """What can be set.

        text: the answer
        """

        text: str = "no\n"

    def __init__(self, options, link):
        self.answer = options.text.encode()
        self.answered = False

    def data(self, direction, chunk):
        if direction == DST2SRC:
            return DROP
        if self.answered:
            return DROP
        self.answered = True
        return DROP, Emit(DST2SRC, self.answer), Close(DST2SRC), Close(SRC2DST)

    def eof(self, direction):
        return PASS
