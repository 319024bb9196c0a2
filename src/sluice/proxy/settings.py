"""What the values of the table ``[proxy]`` can be (docs/spec/proxy.md 3, 8 and 10).

Types are seen to before (``schema.py``); this is about ranges, places in the file system, and the
address of the metrics.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator
from typing import Any

from sluice.errors import ConfigError
from sluice.proxy.schema import did_you_mean
from sluice.proxy.units import show_duration, show_size

_LOGS = ("auto", "journal", "syslog", "stderr")
_COUNTS = ("max_calls", "max_calls_source", "log_lines", "audit_keep")
# Less memory than this is less than two calls hold that hold nothing; an audit record has 4 KiB.
_LEAST_SIZES = {"max_memory": 1 << 20, "audit_max": 64 << 10}
_LEAST_TIMES = {"far_timeout": 0.1}
# Words that stand in the place of a path.
_WORDS: dict[str, tuple[str, ...]] = {"log": _LOGS, "audit": ("", "none"), "state": ("",)}


def mistakes(values: dict[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str, str | None]]:
    """Yield what is wrong with settings: the key within the table, the message, what to do."""
    for name in _COUNTS:
        if name in values and not 1 <= values[name] <= 1_000_000:
            yield (name,), "is out of range", "from 1 to 1000000"
    for name, least in _LEAST_SIZES.items():
        if name in values and values[name] < least:
            yield (name,), "is out of range", f"from {show_size(least)}"
    for name, shortest in _LEAST_TIMES.items():
        if name in values and values[name] < shortest:
            yield (name,), "is out of range", f"from {show_duration(shortest)}"
    for name, words in _WORDS.items():
        value = values.get(name, words[0])
        if value not in words and not os.path.isabs(value):
            hint = did_you_mean(value, words) or "write an absolute path"
            yield (name,), f"'{value}' is no absolute path", hint
    for name in ("filters", "legacy_plugins"):
        for place, directory in enumerate(values.get(name, [])):
            if not os.path.isdir(directory):
                yield (name, place), f"'{directory}' is no directory", None
            elif not os.path.isabs(directory):
                yield (name, place), f"'{directory}' is no absolute path", None
    if values.get("metrics"):
        try:
            parse_address(values["metrics"])
        except ConfigError as error:
            yield ("metrics",), error.message, error.suggestion


def parse_address(setting: str) -> str | tuple[str, int]:
    """Return the path of a Unix socket, or a loopback address and port.

    Raises ConfigError for what is neither: metrics are never served to other machines.
    """
    if setting.startswith("/"):
        return setting
    host, _, port = setting.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    try:
        number = int(port)
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback, number = False, 0
    if not loopback or not 0 <= number < 65536:
        raise ConfigError(
            f"'{setting}' is no Unix socket and no port of a loopback address",
            key="proxy.metrics",
            suggestion='"/run/sluice-proxy/metrics.sock" or "127.0.0.1:9101"',
        )
    return host, number
