"""Text protocols, line by line."""

from __future__ import annotations

from sluice.proxy.options import OptionError, Size
from sluice.proxy.verdicts import (
    DROP,
    DST2SRC,
    PASS,
    SRC2DST,
    Abort,
    Direction,
    Emit,
    Replace,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from sluice.proxy.line_rules import LineRules
    from sluice.proxy.link import Link
    from sluice.proxy.verdicts import Answer, Verdict

_KEYS = ("allow", "deny", "replace")


class Lines:
    r"""Judges each line of a text protocol: it must match one ``allow`` pattern and no ``deny``.

    For each direction a table: ``allow`` is a list of patterns of which one must match the whole
    line, ``deny`` a list of patterns none of which may match anywhere in it, ``replace`` a table of
    pattern and replacement (``\1`` for a group). Rewriting comes first: what is judged is what
    passes. Patterns are RE2, on bytes; a line is judged without its end (``\n`` or ``\r\n``). The
    last line may lack its end. Whole chunks are judged in one call where nothing is rewritten.
    """

    name = "lines"

    class Options:
        """What can be set.

        src2dst: the rules from source to target, { allow = [...], deny = [...], replace = {...} }
        dst2src: the rules from target to source
        max_line: bytes that a line may have
        on_mismatch: what to do with a line that may not pass
        """

        src2dst: dict[str, list[str] | dict[str, str]] | None = None
        dst2src: dict[str, list[str] | dict[str, str]] | None = None
        max_line: Size = 64 << 10
        on_mismatch: Literal["abort", "drop"] = "abort"

    @staticmethod
    def check(options: Options) -> None:
        """Compile the patterns."""
        if options.src2dst is None and options.dst2src is None:
            raise OptionError("src2dst", "rules must be given, here or dst2src")
        for name in ("src2dst", "dst2src"):
            rules = getattr(options, name)
            if rules is not None:
                _compiled(name, rules)
        if not 1 <= options.max_line <= 1 << 26:
            raise OptionError("max_line", "must be from 1 byte to 64M")

    @staticmethod
    def describe(options: Options) -> list[str]:
        """Say which rules cannot be judged by the chunk (for ``sluice proxy check``)."""
        found = []
        for name in ("src2dst", "dst2src"):
            rules = getattr(options, name)
            if rules is not None and not _compiled(name, rules).by_chunk:
                found.append(f"{name}: judged line by line, which is slower")
        return found

    @staticmethod
    def inspects(options: Options) -> tuple[Direction, ...]:
        """Look at the directions that have rules."""
        return tuple(d for d in (SRC2DST, DST2SRC) if getattr(options, d.name) is not None)

    def __init__(self, options: Options, link: Link) -> None:
        """Compile the patterns again: objects of a call are its own."""
        self._link = link
        self._max_line = options.max_line
        self._drop = options.on_mismatch == "drop"
        self._rules: tuple[LineRules | None, ...] = tuple(
            None if rules is None else _compiled(name, rules)
            for name, rules in (("src2dst", options.src2dst), ("dst2src", options.dst2src))
        )
        # A line that is dropped because it is too long goes on to its end.
        self._skipping = [False, False]
        self.max_held = 2 * options.max_line

    def data(self, direction: Direction, chunk: memoryview) -> Answer:
        """Judge the whole lines, hold the rest."""
        held = self._link.held(direction)
        data = bytes(chunk)
        if self._skipping[direction]:
            end = data.find(b"\n")
            if end < 0:
                return DROP
            self._skipping[direction] = False
            data = data[end + 1 :]
        end = data.rfind(b"\n") + 1
        if not end:
            if len(held) + len(data) > self._max_line:
                held.take()
                return self._over_long(direction, skip=True)
            held.append(data)
            return Replace()
        passed = self._judge(direction, held.take() + data[:end])
        if isinstance(passed, Abort):
            return passed
        if len(data) - end > self._max_line:
            rest = self._over_long(direction, skip=True)
            return rest if isinstance(rest, Abort) else Replace(passed)
        held.append(data[end:])
        return Replace(passed)

    def eof(self, direction: Direction) -> Answer:
        """Judge a last line that has no end."""
        rest = self._link.held(direction).take()
        if not rest:
            return PASS
        passed = self._judge(direction, rest)
        return passed if isinstance(passed, Abort) else (Emit(direction, passed), PASS)

    def _over_long(self, direction: Direction, *, skip: bool) -> Verdict:
        if not self._drop:
            return Abort(f"{direction}: a line is longer than {self._max_line} bytes")
        self._skipping[direction] = skip
        return DROP

    def _judge(self, direction: Direction, text: bytes) -> bytes | Abort:
        """Return what passes of whole lines."""
        rules = self._rules[direction]
        assert rules is not None
        if rules.all_pass(text, self._max_line):
            return text
        passed = []
        for line in _split(text):
            result = rules.line(line, self._max_line)
            if result is not None:
                passed.append(result)
            elif not self._drop:
                return Abort(f"{direction}: a line matches no rule")
        return b"".join(passed)


def _split(text: bytes) -> list[bytes]:
    """Return lines with their ends; only ``\\n`` ends a line."""
    parts = text.split(b"\n")
    last = parts.pop()
    lines = [part + b"\n" for part in parts]
    if last:
        lines.append(last)
    return lines


def _compiled(name: str, rules: dict[str, list[str] | dict[str, str]]) -> LineRules:
    """Return the rules of a direction. Raises OptionError."""
    from sluice.proxy.line_rules import LineRules

    for key in rules:
        if key not in _KEYS:
            from sluice.proxy.schema import suggest

            raise OptionError(name, f"unknown key '{key}', {suggest(key, _KEYS)}")
    allow, deny = rules.get("allow", []), rules.get("deny", [])
    replace = rules.get("replace", {})
    if not isinstance(allow, list) or not isinstance(deny, list):
        raise OptionError(name, "allow and deny are lists of patterns")
    if not isinstance(replace, dict):
        raise OptionError(name, "replace is a table of pattern and replacement")
    try:
        return LineRules(allow, deny, replace, "allow" in rules)
    except ValueError as error:
        raise OptionError(name, str(error)) from None
