"""Judging JSON messages, with no message that can cost more than its length (filter ``json``).

Depth and lengths of numbers are looked at before anything is parsed, with operations that run in C:
strings are cut out, then empty pairs of brackets are taken away again and again; what is left after
as many rounds as there may be levels is nested deeper.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import re2

_MAX_NUMBER = 64
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b'[]{}"')
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_STRING = re.compile(rb'"[^"]*"')
_FULL_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
# RE2 reads every byte once, which the module re does not for these two.
_SUSPECT = re2.compile(rb"[-+.0-9eE]{%d}|[0-9.][eE][-+]?[0-9]{4}" % (_MAX_NUMBER + 1))
# Also what is too large for a float, which only the decoder that makes values finds.
_LARGE = re2.compile(rb"[-+.0-9eE]{%d}|[0-9.][eE][-+]?[0-9]{3}" % (_MAX_NUMBER + 1))
_MAX_SCHEMA = 4 << 20
_decoder = msgspec.json.Decoder()
# Looks at the syntax alone: makes no values, and leaves alone what is in strings.
_checker = msgspec.json.Decoder(msgspec.Raw)


class Judge:
    """The rules of one direction."""

    def __init__(self, validator: Any, max_depth: int) -> None:
        """Take the validator of a schema, or None, and how deep a message may be nested."""
        self._validator = validator
        self._depth = max_depth

    def wrong(self, message: bytes) -> str | None:
        """Return what is wrong with a message, in words of ours only; None where nothing is."""
        if too_deep(message, self._depth):
            return f"nested deeper than {self._depth}"
        if has_long_number(message):
            return f"a number of more than {_MAX_NUMBER} characters, or a huge exponent"
        return self._parsed(message)

    def wrong_among(self, text: bytes) -> str | None:
        """Return what is wrong with the first wrong line of many, each a message.

        What is looked at before anything is parsed is looked at for all of them at once. If all is
        well in the whole it is well in each: brackets that close in another line are no JSON.
        Where nobody asks for values, none are made; what that way finds wrong is judged again.
        """
        lines = text.split(b"\n")
        judge = self.wrong
        # Brackets that are nested deeper, with those that close them, make a longer line.
        longer = [line for line in lines if len(line) > 2 * self._depth]
        if not longer or not too_deep(b"\n".join(longer), self._depth):
            if self._validator is None and not _LARGE.search(text) and _all_well(text, lines):
                return None
            if not has_long_number(text):
                judge = self._parsed
        for line in lines:
            wrong = judge(line)
            if wrong is not None:
                return wrong
        return None

    def _parsed(self, message: bytes) -> str | None:
        if not message or message.isspace():
            return None
        try:
            value = _decoder.decode(message)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
            return "no valid JSON"
        if self._validator is not None and not self._fits(value):
            return "does not fit the schema"
        return None

    def _fits(self, value: Any) -> bool:
        try:
            return bool(self._validator.is_valid(value))
        except (ValueError, RecursionError, OverflowError):
            # Strings with lone surrogates and the like: the validator cannot take them.
            return False


def _all_well(text: bytes, lines: list[bytes]) -> bool:
    """Tell whether all lines of ``text`` are surely JSON; False where somebody must look again."""
    check = _checker.decode
    try:
        text.decode("utf-8")
        for line in lines:
            if line:
                check(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def too_deep(message: bytes, most: int) -> bool:
    """Tell whether brackets are nested deeper than ``most``; wrong JSON may be called either.

    All in operations that run in C. A bracket is in a string if there is an odd number of quotes
    before it. That stays so when two quotes that stand together are taken away, so most strings
    go like that, once everything but brackets and quotes is gone.
    """
    if message.count(b"[") + message.count(b"{") <= most:
        return False
    left = message
    if b"\\" in left:
        left = left.replace(b"\\\\", b"").replace(b'\\"', b"")
    left = left.translate(_ONE_KIND, _NOT_BRACKETS).replace(b'""', b"")
    if b'"' in left:
        left = _STRING.sub(b"", left)
    for _ in range(most):
        if not left:
            return False
        left = left.replace(b"[]", b"")
    return bool(left)


def has_long_number(message: bytes) -> bool:
    """Tell whether a number is too long to be read quickly, or has a huge exponent."""
    if not _SUSPECT.search(message):
        return False
    bare = _FULL_STRING.sub(b"", message)
    return bool(_SUSPECT.search(bare))


def read_schema(file: str) -> Any:
    """Return the validator for a JSON Schema file. Raises OSError, or ValueError for what it is."""
    import jsonschema_rs

    with open(file, "rb") as stream:
        raw = stream.read(_MAX_SCHEMA + 1)
    if len(raw) > _MAX_SCHEMA:
        raise ValueError("is too large")
    try:
        schema = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise ValueError(f"no valid JSON: {error}") from None

    def nothing_outside(uri: str) -> Any:
        raise ValueError(f"refers to {uri}")

    try:
        return jsonschema_rs.validator_for(schema, retriever=nothing_outside)
    except Exception as error:
        raise ValueError(f"no valid schema: {str(error).splitlines()[0]}") from None
