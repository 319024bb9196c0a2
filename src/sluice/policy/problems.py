"""What can be wrong with a policy, with the place of it.

Two kinds, because they are treated differently (sections 3.3 and 17): a *syntax error* denies every
call silently, any other failure to load denies every call with a notification. The engine reports
the first error of a set; the tools collect all of them.
"""

from __future__ import annotations

from sluice.errors import PolicyError
from sluice.wire.names import escape

_WINDOW = 96  # characters of a long line that are shown around the mark


class PolicyProblem(PolicyError):
    """What is wrong with a policy and, where it is known, the words at fault.

    ``column`` counts characters from 1 and ``width`` says how many are at fault; both are 0 where
    the whole line is. ``text`` is the line as it stands in the file.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        column: int = 0,
        width: int = 0,
        text: str = "",
    ) -> None:
        """Take the canonical message and where it belongs."""
        super().__init__(message, file=file, line=line)
        self.column = column
        self.width = width
        self.text = text

    def marked(self) -> str:
        """Return the line and, below it, a mark under what is wrong; empty without a line.

        Of a long line only the surroundings of the mark are shown; what a terminal must not see is
        escaped, and tabs become spaces so that the mark stands where it should.
        """
        if not self.text:
            return ""
        start = max(0, self.column - 1 - _WINDOW // 2)
        shown = _plain(self.text[start : start + _WINDOW])
        before = len(_plain(self.text[start : max(start, self.column - 1)]))
        room = max(1, len(shown) - before)
        width = (
            len(_plain(self.text[self.column - 1 :][: self.width])) if self.column else len(shown)
        )
        head = "..." if start else ""
        tail = "..." if start + _WINDOW < len(self.text) else ""
        mark = " " * (len(head) + before) + "^" * max(1, min(width, room))
        return f"{head}{shown}{tail}\n{mark}"


class PolicyLoadError(PolicyProblem):
    """A policy that cannot be read: a missing directory, an illegal file name, bad bytes."""


class PolicySyntaxError(PolicyProblem):
    """A policy that does not follow the grammar; ``str()`` is ``FILE:LINE: MESSAGE`` (3.4)."""

    def __str__(self) -> str:
        """Render as section 3.4 demands, also where file or line are not known."""
        return f"{self.file or '<unknown>'}:{self.line or 0}: {self.message}"


def visible(text: str) -> str:
    """Return what a terminal may see of a text about a policy: printable characters, line ends.

    Names and paths of a policy may hold anything, and a file that is looked at need not be trusted.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else escape(c) for c in text)


def _plain(text: str) -> str:
    return escape(text.replace("\t", " "), limit=_WINDOW * 10)
