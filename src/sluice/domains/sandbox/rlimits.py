"""Resource limits of other processes: what holds a domain where no control group does.

The kernel keeps them for each process, hands them on to what that starts, and lets only root raise
one. docs/spec/core-stack.md 12.4.1.
"""

from __future__ import annotations

import contextlib
import os
import resource

from sluice.agent.procfs import stat_fields

# A crash of a process with this limit of core files goes to nobody. Any other value, 0 too, would
# hand it to the program that the host's core_pattern may name, which runs as the host's root and
# reads what the domain has prepared (core(5)). Nobody inside can set another (see seccomp).
CORE_TO_NOBODY = 1
_LOOKS = 10


def lower(pid: int, what: int, value: int) -> int | None:
    """Lower one limit of another process, never above what it has; return what it is now.

    None where it cannot be set.
    """
    try:
        _, hard = resource.prlimit(pid, what)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.prlimit(pid, what, (value, value))
    except (OSError, ValueError):
        return None
    return value


def lower_for_all(agent: int, what: int, value: int) -> bool:
    """Set a limit of the agent, so that it holds for what it will start, and of what runs already.

    Only root may raise one. False where it would have to be raised, or the agent is gone.
    """
    try:
        resource.prlimit(agent, what, (value, value))
    except (OSError, ValueError):
        return False
    done = {agent}
    # What forks meanwhile is found by the next look, unless it is a flood: then it has its old
    # limit, which it is under as well.
    for _ in range(_LOOKS):
        found = _below(agent) - done
        if not found:
            break
        for pid in found:
            lower(pid, what, value)
        done |= found
    return True


def _below(agent: int) -> set[int]:
    """Return the processes of the domain: those that have ``agent`` among their parents."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parents[int(entry)] = int(stat_fields(entry)[1])
    found: set[int] = set()
    todo = {agent}
    while todo:
        todo = {pid for pid, parent in parents.items() if parent in todo} - found
        found |= todo
    return found
