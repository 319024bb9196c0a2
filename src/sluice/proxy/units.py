"""Durations and sizes as people write them (docs/spec/proxy.md 3)."""

from __future__ import annotations

_DURATIONS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
# A hundred years: what is over it is a mistake, and stays a float that every clock can add.
MAX_DURATION = 100 * 366 * 86400.0
MAX_SIZE = 1 << 60


def parse_duration(value: int | float | str) -> float:
    """Return seconds from a number of seconds or ``500ms 5s 2m 1h``.

    Raises ValueError with the reason: no number, an unknown unit, negative, not finite, or over a
    hundred years.
    """
    if isinstance(value, bool):
        raise ValueError("must be a duration such as 5, 0.5, '500ms', '5s', '2m' or '1h'")
    if isinstance(value, str):
        text = value.strip()
        number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
        unit = text[len(number) :] or "s"
        if unit not in _DURATIONS:
            raise ValueError(f"'{value}' has an unknown unit: use ms, s, m or h")
        try:
            seconds = _plain_number(number) * _DURATIONS[unit]
        except ValueError:
            raise ValueError(f"'{value}' is no duration: write 5, '500ms', '5s', '2m'") from None
    else:
        seconds = float(value)
    if not 0 <= seconds <= MAX_DURATION:
        raise ValueError(f"{value} is out of range: from 0 to a hundred years")
    return seconds


def parse_size(value: int | str) -> int:
    """Return bytes from a number of bytes or ``64k 10M 1G`` (powers of 1024, case is ignored).

    Raises ValueError with the reason.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("must be a size such as 4096, '64k', '10M' or '1G'")
    if isinstance(value, str):
        text = value.strip()
        factor = _SIZES.get(text[-1:].lower(), 1)
        digits = text[:-1] if factor > 1 else text
        if not digits.isascii() or not digits.isdigit():
            raise ValueError(f"'{value}' is no size: write 4096, '64k', '10M' or '1G'")
        size = int(digits[:20]) * factor
    else:
        size = value
    if not 0 <= size <= MAX_SIZE:
        raise ValueError(f"{value} is out of range: from 0 to {MAX_SIZE}")
    return size


def _plain_number(text: str) -> float:
    """Read ``12`` or ``0.5``; refuse what float() takes besides: signs, exponents, inf, ``_``."""
    if not text.isascii() or text.translate({ord("."): None}).isdigit() is False:
        raise ValueError(text)
    return float(text)


def show_duration(seconds: float) -> str:
    """Write seconds as people do: ``500ms``, ``5s``, ``2m``, ``1h``; -1 is ``never``."""
    if seconds < 0:
        return "never"
    if 0 < seconds < 1:
        return f"{seconds * 1000:g}ms"
    for unit, factor in (("h", 3600), ("m", 60)):
        if seconds >= factor and seconds % factor == 0:
            return f"{seconds / factor:g}{unit}"
    return f"{seconds:g}s"


def show_size(size: int | float) -> str:
    """Write bytes as people do: ``512``, ``64k``, ``1.5M``; -1 is ``no limit``."""
    if size < 0:
        return "no limit"
    for unit, factor in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("k", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.4g}{unit}"
    return f"{size:.4g}"
