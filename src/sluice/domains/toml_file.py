"""Reading a TOML file that a person wrote, with errors that a person can act on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from sluice.errors import ConfigError

_KEY = re.compile(r"\s*([A-Za-z0-9_.\"'-]+)\s*=\s*(.*)")
_HEADER = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]")
_BARE_WORD = re.compile(r"[A-Za-z][\w./-]*\Z")
# What other languages say for the two.
_TRUTH = {
    **dict.fromkeys(("true", "yes", "on"), "true"),
    **dict.fromkeys(("false", "no", "off"), "false"),
}


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """Return a file's text and what it says.

    Raises ConfigError with file, line, the key that the line sets, and what to do.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
    try:
        text = raw.decode("utf-8")
        return text, tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError("is not UTF-8", file=str(path), line=line) from None
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(path, text, error) from None
    except RecursionError:
        raise ConfigError("is nested too deeply", file=str(path)) from None


def _syntax_error(path: Path, text: str, error: tomllib.TOMLDecodeError) -> ConfigError:
    message, _, place = str(error).partition(" (at ")
    lines = text.split("\n")
    number = len(lines)
    if place.startswith("line "):
        number = int(place[5:].split(",")[0])
    found = _KEY.match(lines[number - 1])
    key = value = None
    if found:
        key, value = found.groups()
        tables = [header for line in lines[:number] if (header := _HEADER.match(line))]
        key = f"{tables[-1].group(1)}.{key}" if tables else key
    return ConfigError(
        f"no valid TOML: {message}",
        file=str(path),
        line=number,
        key=key,
        suggestion=_suggestion(message, found.group(1) if found else "", value),
    )


def _suggestion(message: str, key: str, value: str | None) -> str | None:
    """Return what was probably meant, where the two commonest mistakes were made."""
    if value is None:
        return None
    value = value.partition("#")[0].strip()
    if value.lower() in _TRUTH:
        return f"write {_TRUTH[value.lower()]}"
    if _BARE_WORD.match(value):
        return f'texts stand in quotes, as in {key} = "{value}"'
    if "'\\n'" in message and value[:1] in "\"'":
        return "is a quote missing at the end of the line?"
    return None
