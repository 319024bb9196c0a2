"""Measuring: medians of interleaved rounds, always beside a reference taken in the same run.

A machine is noisy and differs from the next one, so no program here prints an absolute time as a
result: what counts is the ratio to the reference, and the spread of the rounds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

MIB = 1 << 20


@dataclass
class Row:
    """One measured thing: its samples (seconds or bytes a second) and what it is compared to."""

    name: str
    unit: str
    samples: list[float] = field(default_factory=list)
    reference: str = ""
    goal: str = ""
    higher_is_better: bool = False

    @property
    def median(self) -> float:
        """Return the median of the samples."""
        return statistics.median(self.samples)


class Table:
    """Rows of one benchmark, measured round by round and printed with their ratios."""

    def __init__(self, title: str) -> None:
        """Begin empty."""
        self.title = title
        self.rows: dict[str, Row] = {}
        self._work: list[tuple[str, Callable[[], float]]] = []

    def add(
        self,
        name: str,
        unit: str,
        measure: Callable[[], float],
        *,
        reference: str = "",
        goal: str = "",
    ) -> None:
        """Register a measurement: ``measure`` does it once and returns the sample."""
        self.rows[name] = Row(name, unit, reference=reference, goal=goal)
        self._work.append((name, measure))

    def run(self, rounds: int = 5, warm: int = 1) -> None:
        """Do every measurement ``rounds`` times, interleaved, after ``warm`` that do not count."""
        for number in range(warm + rounds):
            for name, measure in self._work:
                sample = measure()
                if number >= warm:
                    self.rows[name].samples.append(sample)

    def ratio(self, name: str) -> float | None:
        """Return the ratio of a row to its reference, or None where it has none."""
        row = self.rows[name]
        if not row.reference:
            return None
        return row.median / self.rows[row.reference].median

    def render(self) -> str:
        """Return the table as text: median, spread, ratio, goal."""
        lines = [self.title, f"{'what':<46} {'median':>14} {'spread':>7} {'ratio':>7}  to / goal"]
        for row in self.rows.values():
            middle = row.median
            spread = (max(row.samples) - min(row.samples)) / middle * 100 if middle else 0.0
            ratio = self.ratio(row.name)
            shown = f"{ratio:7.2f}" if ratio is not None else "      -"
            beside = f"{row.reference}  {row.goal}".strip()
            value = present(middle, row.unit)
            lines.append(f"{row.name:<46} {value:>14} {spread:6.0f}% {shown}  {beside}")
        return "\n".join(lines)


def present(value: float, unit: str) -> str:
    """Return a number with its unit, in a size that people read."""
    if unit == "B/s":
        return f"{value / MIB:.0f} MiB/s"
    if unit == "s":
        return f"{value * 1000:.2f} ms"
    return f"{value:.3g} {unit}".strip()


def wall(command: list[str] | str, *, shell: bool = False) -> float:
    """Return the seconds that a command takes from start to end. Raises when it fails."""
    begun = time.perf_counter()
    subprocess.run(command, shell=shell, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def shell_pipe(size: int) -> float:
    """Return the bytes a second of ``head -c SIZE /dev/zero | cat >/dev/null``."""
    return size / wall(f"head -c {size} /dev/zero | cat >/dev/null", shell=True)


def spawn_true() -> float:
    """Return the seconds for starting /bin/true and seeing its end, by posix_spawn."""
    begun = time.perf_counter()
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    return time.perf_counter() - begun


def bare_python() -> float:
    """Return the seconds of ``python3 -I -S -c pass``, the least a program here costs."""
    begun = time.perf_counter()
    pid = os.posix_spawn("/usr/bin/python3", ["python3", "-I", "-S", "-c", "pass"], {})
    os.waitpid(pid, 0)
    return time.perf_counter() - begun
