"""Processes that a test looks at and ends: known by pid and start, for a pid is soon another's."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Seen:
    """A process that was there when somebody looked."""

    pid: int
    began: str
    parent: int

    @classmethod
    def of(cls, pid: int) -> Seen | None:
        """Look at a process; None if there is none, or only a zombie."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, UnicodeDecodeError):
            return None
        return None if not fields or fields[0] in "ZX" else cls(pid, fields[19], int(fields[1]))

    def alive(self) -> bool:
        """Tell whether it still runs; one that only waits to be reaped does not."""
        now = Seen.of(self.pid)
        return now is not None and now.began == self.began

    def kill(self) -> None:
        """End it, and nobody who has its pid by now. Nothing happens if it is gone."""
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.pid)
            try:
                if self.alive():
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that only waits to be reaped does not."""
    return Seen.of(pid) is not None


def seen(pids: Iterable[int]) -> list[Seen]:
    """Look at several processes; those that are gone already are left out."""
    return [process for process in map(Seen.of, pids) if process is not None]
