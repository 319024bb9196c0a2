"""The words of a rule: which are legal in which column, and what they are (section 5).

A *token* is one word in the source, target or redirect column of a rule, or the target that a
request names. Most words are literal names and go through unchanged; words that begin with ``@``
and the word ``*`` are keywords, and each column allows some of them.

Files that opt into the extensions of section 31 may join keywords with commas; such a *conjunction*
matches what matches every part. So a token has *parts*: one as a rule, several in a conjunction,
sorted so that equal meanings compare equal. What a part matches is told in ``system_info``.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

WILDCARD = "*"
ADMINVM = "@adminvm"
ANYVM = "@anyvm"
DEFAULT = "@default"
DISPVM = "@dispvm"

TYPE_PREFIX = "@type:"
TAG_PREFIX = "@tag:"
DISPVM_PREFIX = "@dispvm:"
DISPVM_TAG_PREFIX = "@dispvm:@tag:"

MAX_PARTS = 32
"""Of a conjunction: the index descends one level for each."""


class Column(Enum):
    """A place where a token can stand; the value is the word used for it in error texts."""

    SOURCE = "source"
    TARGET = "target"
    REDIRECT = "redirect"  # the value of target= and default_target=
    REQUEST = "intendedtarget"  # the target that a request names


KEYWORDS: dict[Column, frozenset[str]] = {
    Column.SOURCE: frozenset({WILDCARD, ADMINVM, ANYVM}),
    Column.TARGET: frozenset({WILDCARD, ADMINVM, ANYVM, DEFAULT, DISPVM}),
    Column.REDIRECT: frozenset({ADMINVM, DISPVM}),
    Column.REQUEST: frozenset({ADMINVM, DEFAULT, DISPVM}),
}
# In the order in which they are tried (section 5.2 step 4).
PREFIXES: dict[Column, tuple[str, ...]] = {
    Column.SOURCE: (TYPE_PREFIX, TAG_PREFIX, DISPVM_PREFIX, DISPVM_TAG_PREFIX),
    Column.TARGET: (TYPE_PREFIX, TAG_PREFIX, DISPVM_PREFIX, DISPVM_TAG_PREFIX),
    Column.REDIRECT: (DISPVM_PREFIX,),
    Column.REQUEST: (DISPVM_PREFIX,),
}


class TokenError(ValueError):
    """A word that its column does not allow.

    The text is the canonical one of section 4.3; ``offset`` and ``width`` mark the offending part
    within the word, in characters.
    """

    def __init__(self, message: str, offset: int, width: int) -> None:
        """Take the message and the span within the word."""
        super().__init__(message)
        self.offset = offset
        self.width = width


class Token(NamedTuple):
    """A recognised word of the source or target column."""

    text: str
    """As written."""
    parts: tuple[str, ...]
    """What must all be facets of the thing matched; sorted, without duplicates."""


def check(word: str, column: Column) -> None:
    """Raise TokenError unless ``word`` is a legal token of ``column`` (section 5.2)."""
    if not word:
        raise TokenError(f"invalid empty {column.value} token", 0, 0)
    if word in KEYWORDS[column] or (word[0] != "@" and word != WILDCARD):
        return
    for prefix in PREFIXES[column]:
        if word.startswith(prefix):
            if word == prefix:
                raise TokenError(f"invalid empty {prefix} token: '{word}'", 0, len(word))
            if word[len(prefix)] != "@":
                return
    raise TokenError(f"invalid {column.value} token: '{word}'", 0, len(word))


def recognise(word: str, column: Column, *, extensions: bool = False) -> Token:
    """Return the token for a word of the source or target column, or raise TokenError.

    With ``extensions`` a word with commas is a conjunction: every part must be a keyword that the
    column allows; literal names are not allowed in it, for no domain has two of them.
    """
    if not extensions or "," not in word:
        check(word, column)
        return Token(word, (word,))
    words = word.split(",")
    if len(words) > MAX_PARTS:
        message = f"a conjunction of {len(words)} parts: at most {MAX_PARTS}"
        raise TokenError(message, 0, len(word))
    offset = 0
    for part in words:
        try:
            check(part, column)
        except TokenError as error:
            raise TokenError(str(error), offset + error.offset, max(error.width, 1)) from None
        if is_literal(part):
            message = f"a name cannot be part of a conjunction: '{part}'"
            raise TokenError(message, offset, len(part))
        offset += len(part) + 1
    return Token(word, tuple(sorted(set(words))))


def is_literal(word: str) -> bool:
    """Tell whether a legal word names a domain, rather than being a keyword."""
    return word[0] != "@" and word != WILDCARD
