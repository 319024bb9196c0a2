"""Say something at the end of a direction: the event ``eof`` may emit bytes."""

from sluice.proxy.verdicts import DST2SRC, PASS, Emit


class Greeting:
    """Adds a line to the end of what the target answers."""

    name = "greeting"
    inspects = ()

    class Options:
        """What can be set.

        text: the line
        """

        text: str = "checked by sluice"

    def __init__(self, options, link):
        self.line = options.text.encode() + b"\n"

    def eof(self, direction):
        if direction == DST2SRC:
            return Emit(direction, self.line), PASS
        return PASS
