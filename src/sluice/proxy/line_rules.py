"""The patterns of the filter ``lines``: judging many lines in one call.

Theory. A line is judged without its end, ``\\n`` or ``\\r\\n``. With the ends made equal and allow
patterns A and B, a run of whole lines passes if it matches ``(?m)((A|B)\\n)*``. That is one call of
RE2 for a chunk, but it is the same as judging line by line only if A and B cannot match a newline
themselves. So patterns are made so that they cannot (``[^x]`` becomes ``[^\\nx]``), and where that
cannot be seen from the pattern the lines are judged one by one, by the pattern as it was written.
The answer "passes" of the fast way is always right; where it does not pass, each line is looked at.
"""

from __future__ import annotations

import re
from re import _parser  # type: ignore[attr-defined]
from typing import Any

import re2

_NEWLINE = 10


class LineRules:
    """Compiled allow, deny and replace patterns. Lines are bytes with their end."""

    def __init__(
        self, allow: list[str], deny: list[str], replace: dict[str, str], restricted: bool
    ) -> None:
        """Take the patterns; ``restricted``: a line must match one of ``allow``.

        Raises ValueError for what is no RE2 pattern.
        """
        self._restricted = restricted
        self._replace = [(_compile(p), _replacement(p, r)) for p, r in replace.items()]
        self._allow = [_compile(pattern) for pattern in allow]
        self._deny = [_compile(pattern) for pattern in deny]
        safe = [_without_newline(pattern) for pattern in allow]
        anchored = any(re.search(r"\\[AzZ]|\(\?[a-zA-Z-]*[mU-]", pattern) for pattern in deny)
        self.by_chunk = not replace and not anchored and all(map(_cannot_match_newline, safe))
        self._all_allow: Any = None
        self._any_deny: Any = None
        if self.by_chunk and safe:
            self._all_allow = _compile(f"(?m)(?:(?:{_any_of(safe)})\n)*", whole_chunks=True)
        if self.by_chunk and deny:
            # One that finds a newline says no more than that each line is to be looked at.
            narrow = [_without_newline(pattern) for pattern in deny]
            seen = [
                one if _cannot_match_newline(one) else pattern
                for one, pattern in zip(narrow, deny, strict=True)
            ]
            self._any_deny = _compile(f"(?m){_any_of(seen)}", whole_chunks=True)

    def all_pass(self, text: bytes, max_line: int) -> bool:
        """Tell, fast, that all lines of ``text`` pass; False means that each must be looked at."""
        if not self.by_chunk or not text.endswith(b"\n"):
            return False
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        if _has_longer_line(text, max_line):
            return False
        if self._restricted and (self._all_allow is None or not self._all_allow.fullmatch(text)):
            return False
        return self._any_deny is None or not self._any_deny.search(text[:-1])

    def line(self, line: bytes, max_line: int) -> bytes | None:
        """Return what passes of one line (rewritten, with its end), or None."""
        body, end = _body(line)
        for pattern, replacement in self._replace:
            body = pattern.sub(replacement, body)
        if len(body) > max_line or b"\n" in body:
            return None
        if self._restricted and not any(pattern.fullmatch(body) for pattern in self._allow):
            return None
        if any(pattern.search(body) for pattern in self._deny):
            return None
        return body + end


def _body(line: bytes) -> tuple[bytes, bytes]:
    for end in (b"\r\n", b"\n"):
        if line.endswith(end):
            return line[: -len(end)], end
    return line, b""


def _has_longer_line(text: bytes, max_line: int) -> bool:
    """Tell whether one of whole lines is too long, without looking at each of them."""
    start = 0
    while len(text) - start > max_line + 1:
        start = text.rfind(b"\n", start, start + max_line + 1) + 1
        if not start:
            return True
    return False


def _any_of(patterns: list[str]) -> str:
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def _compile(pattern: str, *, whole_chunks: bool = False) -> Any:
    """Return a compiled pattern; one for ``whole_chunks`` says only yes or no, which is faster."""
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.log_errors = False
    options.never_capture = whole_chunks
    options.max_mem = 64 << 20
    try:
        return re2.compile(pattern.encode("utf-8"), options)
    except re2.error as error:
        text = error.args[0]
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        raise ValueError(f"'{pattern}' is no pattern: {text}") from None


def _replacement(pattern: str, text: str) -> bytes:
    made = text.encode("utf-8")
    # A match of nothing that has the pattern's groups shows what the text becomes.
    nothing = _compile(f"(?:{pattern})|").fullmatch(b"")
    try:
        shown = nothing.expand(made)
    except (IndexError, ValueError) as error:
        raise ValueError(f"'{text}' is no replacement of '{pattern}': {error}") from None
    if b"\n" in shown:
        raise ValueError(f"the replacement of '{pattern}' has a newline in it")
    return made


def _without_newline(pattern: str) -> str:
    """Rewrite what would match a newline for no good reason: negated classes and \\s, \\D, \\W."""
    made, at, inside = "", 0, False
    outside = {"\\s": r"[\t\f\r ]", "\\D": r"[^\n0-9]", "\\W": r"[^\n0-9A-Za-z_]"}
    while at < len(pattern):
        pair = pattern[at : at + 2]
        if pair[:1] == "\\":
            made += outside.get(pair, pair) if not inside else pair
            at += 2
        elif not inside and pair == "[^" and pattern[at + 2 : at + 3] != "]":
            made += r"[^\n"
            inside = True
            at += 2
        else:
            if pair[:1] == "[" and not inside:
                inside = True
                if pattern[at + 1 : at + 2] == "]":
                    made += "["
                    at += 1
            elif pair[:1] == "]":
                inside = False
            made += pattern[at]
            at += 1
    return made


def _cannot_match_newline(pattern: str) -> bool:
    """Tell whether a pattern surely matches no newline; False where that cannot be seen."""
    if re.search(r"\(\?[a-zA-Z-]*[smU-]|\\[QCpPzA]|\[\[|\[:", pattern):
        return False
    try:
        return _walk(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError, ValueError):
        return False


_SAFE_CATEGORIES = ("CATEGORY_DIGIT", "CATEGORY_WORD", "CATEGORY_NOT_SPACE")


def _walk(parsed: Any) -> bool:
    return all(_walk_one(str(kind), value) for kind, value in parsed)


def _walk_one(kind: str, value: Any) -> bool:
    if kind == "LITERAL":
        return bool(value != _NEWLINE)
    if kind in ("ANY", "AT"):
        return True
    if kind == "NOT_LITERAL":
        return bool(value == _NEWLINE)
    if kind == "IN":
        return _class(value)
    if kind == "SUBPATTERN":
        return _walk(value[3])
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        return _walk(value[2])
    if kind == "BRANCH":
        return all(map(_walk, value[1]))
    return False


def _class(items: Any) -> bool:
    """Tell whether a character class leaves the newline out."""
    has = False
    negated = False
    for kind, value in items:
        name = str(kind)
        if name == "NEGATE":
            negated = True
        elif name == "LITERAL":
            has = has or value == _NEWLINE
        elif name == "RANGE":
            has = has or value[0] <= _NEWLINE <= value[1]
        elif name == "CATEGORY":
            if negated or str(value) not in _SAFE_CATEGORIES:
                has = has or str(value) == "CATEGORY_SPACE"
                if str(value) not in (*_SAFE_CATEGORIES, "CATEGORY_SPACE"):
                    has = not negated
        else:
            return False
    return has if negated else not has
