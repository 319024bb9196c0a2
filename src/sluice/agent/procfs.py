"""What /proc tells of a process."""

from __future__ import annotations


def stat_fields(pid: int | str) -> list[bytes]:
    """Return the fields of ``/proc/PID/stat`` from the state on: the third of proc(5) is the first.

    The name before them may hold blanks and parentheses of its own. Raises OSError where there is
    no such process.
    """
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return stat.read(4096).rpartition(b")")[2].split()
