"""Judging JSON messages, with no message that can cost more than its length (filter ``json``).

Depth and lengths of numbers are looked at before anything is parsed, with operations that run in C:
strings are cut out, then empty pairs of brackets are taken away again and again; what is left after
as many rounds as there may be levels is nested deeper.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

_MAX_NUMBER = 64
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b'[]{}"\\')
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_STRING = re.compile(rb'"[^"]*"')
_FULL_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_LONG_NUMBER = re.compile(rb"[-+.0-9eE]{%d}" % (_MAX_NUMBER + 1))
_LARGE_EXPONENT = re.compile(rb"[0-9.][eE][-+]?[0-9]{4}")
_MAX_SCHEMA = 4 << 20
_decoder = msgspec.json.Decoder()


class Judge:
    """The rules of one direction."""

    def __init__(self, validator: Any, max_depth: int) -> None:
        """Take the validator of a schema, or None, and how deep a message may be nested."""
        self._validator = validator
        self._depth = max_depth

    def wrong(self, message: bytes) -> str | None:
        """Return what is wrong with a message, in words of ours only; None where nothing is."""
        if not message.strip(b" \t\r\n"):
            return None
        if too_deep(message, self._depth):
            return f"nested deeper than {self._depth}"
        if has_long_number(message):
            return f"a number of more than {_MAX_NUMBER} characters, or a huge exponent"
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


def too_deep(message: bytes, most: int) -> bool:
    """Tell whether brackets are nested deeper than ``most``; wrong JSON may be called either."""
    if message.count(b"[") + message.count(b"{") <= most:
        return False
    left = message.translate(None, _NOT_BRACKETS)
    # A quote behind a backslash ends no string, so with backslashes strings are cut out first.
    if b"\\" in left:
        left = _FULL_STRING.sub(b"", message).translate(None, _NOT_BRACKETS)
    else:
        left = _STRING.sub(b"", left)
    # One kind of bracket, so that a round takes one level; mixed pairs are no JSON anyhow.
    left = left.translate(_ONE_KIND)
    for _ in range(most):
        if not left:
            return False
        left = left.replace(b"[]", b"")
    return bool(left)


def has_long_number(message: bytes) -> bool:
    """Tell whether a number is too long to be read quickly, or has a huge exponent."""
    if not _LONG_NUMBER.search(message) and not _LARGE_EXPONENT.search(message):
        return False
    bare = _FULL_STRING.sub(b"", message)
    return bool(_LONG_NUMBER.search(bare) or _LARGE_EXPONENT.search(bare))


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
