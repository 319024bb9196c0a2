"""Messages that must be JSON, and fit a schema."""

from __future__ import annotations

from sluice.proxy.options import OptionError, Size, absolute, either
from sluice.proxy.verdicts import (
    DST2SRC,
    HOLD,
    PASS,
    SRC2DST,
    Abort,
    Direction,
    Emit,
    Replace,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

    from sluice.proxy.link import Link
    from sluice.proxy.verdicts import Answer


class Json:
    """Lets only JSON pass, and only what fits a JSON Schema.

    Each line is a message, or with ``framing = "whole"`` the whole stream is one. A message must be
    valid JSON in UTF-8, nested no deeper than ``max_depth``, with numbers of at most 64 characters,
    and fit the schema of its direction, if there is one. Bytes are handed on as they came. Empty
    lines pass. A schema cannot refer to anything outside of its file. Where a key stands twice in
    an object the last one is judged, which is the one that most readers take.
    """

    name = "json"

    class Options:
        """What can be set.

        src2dst: file of the schema from source to target; "any" for any JSON; empty: not looked at
        dst2src: the same from target to source
        framing: whether each line is a message or the whole stream
        max_depth: how deep a message may be nested
        max_message: bytes that a message may have
        """

        src2dst: str = ""
        dst2src: str = ""
        framing: Literal["lines", "whole"] = "lines"
        max_depth: int = 64
        max_message: Size = 1 << 20

    @staticmethod
    def check(options: Options) -> None:
        """Read the schemas."""
        either(options, 'a schema or "any"')
        for name in ("src2dst", "dst2src"):
            _schema(name, getattr(options, name))
        if not 1 <= options.max_depth <= 512:
            raise OptionError("max_depth", "must be from 1 to 512")
        if not 1 <= options.max_message <= 1 << 28:
            raise OptionError("max_message", "must be from 1 byte to 256M")

    @staticmethod
    def inspects(options: Options) -> tuple[Direction, ...]:
        """Look at the directions that are to be JSON."""
        return tuple(d for d in (SRC2DST, DST2SRC) if getattr(options, d.name))

    def __init__(self, options: Options, link: Link) -> None:
        """Read the schemas again: a chain that is kept compiled has only their names."""
        from sluice.proxy.json_rules import Judge

        self._link = link
        self._whole = options.framing == "whole"
        self._most = options.max_message
        self._judges = tuple(
            Judge(_schema(name, getattr(options, name)), options.max_depth)
            for name in ("src2dst", "dst2src")
        )
        self._inspected = self.inspects(options)
        self.max_held = 2 * options.max_message + 2

    def data(self, direction: Direction, chunk: memoryview) -> Answer:
        """Judge the whole messages; hold the rest."""
        held = self._link.held(direction)
        data = bytes(chunk)
        end = 0 if self._whole else data.rfind(b"\n") + 1
        if end == 0:
            if len(held) + len(data) > self._most:
                return self._too_long(direction)
            return HOLD
        messages = held.take() + data[:end]
        if len(messages) > self._most and max(map(len, messages.split(b"\n"))) > self._most:
            return self._too_long(direction)
        wrong = self._judges[direction].wrong_among(messages)
        if wrong:
            return Abort(f"{direction}: {wrong}")
        if len(data) - end > self._most:
            return self._too_long(direction)
        held.append(data[end:])
        return Replace(messages)

    def eof(self, direction: Direction) -> Answer:
        """Judge the last message."""
        if direction not in self._inspected:
            return PASS
        rest = self._link.held(direction).take()
        wrong = self._judges[direction].wrong(rest)
        if wrong:
            return Abort(f"{direction}: {wrong}")
        return Emit(direction, rest), PASS

    def _too_long(self, direction: Direction) -> Abort:
        return Abort(f"{direction}: a message is longer than {self._most} bytes")


def _schema(name: str, file: str) -> Any:
    """Return the validator of a schema file, or None. Raises OptionError."""
    if file in ("", "any"):
        return None
    absolute(name, file)
    from sluice.proxy.json_rules import read_schema

    try:
        return read_schema(file)
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OptionError(name, f"schema '{file}': {text}") from None
