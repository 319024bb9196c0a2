"""Counters of chains in files, for calls that are each a process of their own (filter metrics).

A chain has one file below the state directory, replaced as a whole under a lock. The text is what
Prometheus reads; no label has a value that a domain chose.
"""

from __future__ import annotations

import os
import time

from sluice.proxy import state

_HEADER = "sluice-metrics 1"
_PATIENCE = 1.0
_HELP = {
    "calls": "Calls that are over, by how they ended.",
    "bytes": "Bytes read from the sender, of calls that are over.",
    "seconds": "Time that calls took, summed.",
}


def add(base: str, chain: str, values: dict[str, float]) -> None:
    """Add to the counters of a chain. Raises StateError where they cannot be kept."""
    where = state.directory(base, "metrics")
    path = f"{where}/{chain}.metrics"
    lock = None
    deadline = time.monotonic() + _PATIENCE
    while lock is None:
        lock = state.try_lock(f"{where}/lock")
        if lock is None:
            if time.monotonic() > deadline:
                raise state.StateError(11, "is locked by another process", where)
            time.sleep(0.002)
    try:
        kept = parse(state.read(path) or b"")
        for name, value in values.items():
            kept[name] = kept.get(name, 0.0) + value
        lines = [_HEADER, *(f"{name} {value!r}" for name, value in sorted(kept.items())), "end", ""]
        state.replace(path, "\n".join(lines).encode("ascii"))
    finally:
        os.close(lock)


def parse(data: bytes) -> dict[str, float]:
    """Return the counters of a file; a damaged one counts from nought."""
    try:
        lines = data.decode("ascii").split("\n")
        if lines[0] != _HEADER or lines[-2:] != ["end", ""]:
            return {}
        pairs = (line.rpartition(" ") for line in lines[1:-2])
        return {name: float(value) for name, _, value in pairs}
    except ValueError:
        return {}


def text(base: str) -> str:
    """Return all counters in the Prometheus text format."""
    found: dict[str, dict[str, float]] = {}
    try:
        names = sorted(os.listdir(f"{base}/metrics"))
    except FileNotFoundError:
        names = []
    for name in names:
        if name.endswith(".metrics"):
            found[name[: -len(".metrics")]] = parse(state.read(f"{base}/metrics/{name}") or b"")
    lines = []
    for kind, about in _HELP.items():
        lines += [f"# HELP sluice_chain_{kind}_total {about}"]
        lines += [f"# TYPE sluice_chain_{kind}_total counter"]
        for chain, counters in found.items():
            for key, value in counters.items():
                what, _, label = key.partition(":")
                if what == kind:
                    which = f',{label.replace("=", "=" + chr(34))}"' if label else ""
                    number = repr(int(value)) if value == int(value) else repr(value)
                    lines.append(f'sluice_chain_{kind}_total{{chain="{chain}"{which}}} {number}')
    return "\n".join(lines) + "\n"
