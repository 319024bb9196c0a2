"""Where in a TOML file something stands: the line of each key and element.

``tomllib`` parses but forgets where. This follows a text that it has found to be valid, looking at
no more than brackets, quotes and keys.
"""

from __future__ import annotations

import contextlib
import re

Path = tuple[str | int, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SCALAR = re.compile(r"[^,\]}\n#]*")
_STRINGS = (
    re.compile(r'"""(?:\\.|[^\\])*?"""(?:"{0,2})', re.DOTALL),
    re.compile(r"'''.*?'''(?:'{0,2})", re.DOTALL),
    re.compile(r'"(?:\\.|[^"\\\n])*"'),
    re.compile(r"'[^'\n]*'"),
)


class Places:
    """The lines of a text; ``line(("chains", "x", "filters", 1, "use"))`` counts from 1."""

    def __init__(self, text: str) -> None:
        """Take a text that ``tomllib`` accepts; another one gives fewer places, never an error."""
        self._text = text
        self._at = 0
        self._lines: dict[Path, int] = {}
        self._arrays: dict[Path, int] = {}
        with contextlib.suppress(IndexError, ValueError, RecursionError):
            self._document()

    def line(self, path: Path) -> int | None:
        """Return the line of the longest known beginning of ``path``."""
        for size in range(len(path), 0, -1):
            if path[:size] in self._lines:
                return self._lines[path[:size]]
        return None

    def _document(self) -> None:
        table: Path = ()
        self._skip()
        while self._at < len(self._text):
            start = self._at
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._assignment(table)
            self._skip()
            if self._at == start:
                return

    def _header(self) -> Path:
        double = self._text.startswith("[[", self._at)
        start = self._at
        self._at += 2 if double else 1
        path = self._inside_arrays(self._key())
        if double:
            place = self._arrays.get(path, -1) + 1
            self._arrays[path] = place
            path = (*path, place)
        self._note(path, start)
        self._at = self._text.index("]", self._at) + (2 if double else 1)
        return path

    def _inside_arrays(self, key: Path) -> Path:
        """Lead ``[a.b]`` below ``[[a]]`` to the last element of a."""
        path: Path = ()
        for place, part in enumerate(key):
            path = (*path, part)
            if path in self._arrays and place < len(key) - 1:
                path = (*path, self._arrays[path])
        return path

    def _assignment(self, table: Path) -> None:
        start = self._at
        path = table + self._key()
        self._note(path, start)
        self._skip()
        if self._text[self._at] == "=":
            self._at += 1
            self._skip()
            self._value(path)

    def _key(self) -> Path:
        parts: list[str] = []
        while True:
            self._skip()
            start = self._at
            if self._string():
                parts.append(self._text[start + 1 : self._at - 1])
            elif match := _BARE.match(self._text, self._at):
                parts.append(match[0])
                self._at = match.end()
            self._skip()
            if self._text[self._at : self._at + 1] != ".":
                return tuple(parts)
            self._at += 1

    def _value(self, path: Path) -> None:
        self._lines.setdefault(path, self._line_at(self._at))
        opening = self._text[self._at]
        if self._string():
            return
        if opening in "[{":
            self._at += 1
            self._members(path, "]" if opening == "[" else "}")
            return
        match = _SCALAR.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _members(self, path: Path, closing: str) -> None:
        place = 0
        while True:
            self._skip()
            if self._text[self._at] == closing:
                self._at += 1
                return
            if self._text[self._at] == ",":
                self._at += 1
                continue
            start = self._at
            if closing == "]":
                self._value((*path, place))
                place += 1
            else:
                self._assignment(path)
            if self._at == start:
                raise IndexError

    def _string(self) -> bool:
        for pattern in _STRINGS:
            if match := pattern.match(self._text, self._at):
                self._at = match.end()
                return True
        return False

    def _skip(self) -> None:
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _note(self, path: Path, at: int) -> None:
        line = self._line_at(at)
        for size in range(1, len(path) + 1):
            self._lines.setdefault(path[:size], line)

    def _line_at(self, at: int) -> int:
        return self._text.count("\n", 0, at) + 1
