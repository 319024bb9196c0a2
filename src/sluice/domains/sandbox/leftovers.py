"""Ending what an AdminVM that was killed has left running.

Theory. Everything of a domain ends when its AdminVM does: bwrap hears of its parent's death, and
process 1 of the end of its control channel. But a bwrap that loses its parent between two steps of
its own start can leave a child that waits for it for ever, before it has executed anything. Such
processes are in no control group yet, and others may not look at their environment or descriptors.
What can be seen of them is their command line: so ``argv[0]`` of each bwrap names its system, by
the directory itself and not only its path (``limits.label_of``), for we may see into containers.
The next AdminVM holds the system's lock, so whoever still carries that name is a leftover. A domain
that takes the name for a process of its own ends that process. What is in the system's control
groups is a leftover by the same right. docs/spec/core-stack.md 12.4.1.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from pathlib import Path

from sluice.domains.sandbox.limits import Controllers

PATIENCE = 2.0  # seconds that the kernel may take to end them


def end_leftovers(name: str) -> int:
    """End all processes that were started as ``name``; returns how many there were.

    Only by a process that holds the lock of the system that ``name`` stands for.
    """
    handles = []
    try:
        for entry in os.listdir("/proc"):
            if entry.isdigit() and _is_called(entry, name):
                with contextlib.suppress(OSError):
                    handle = os.pidfd_open(int(entry))
                    handles.append(handle)
                    # Once more, now that the number stays its own.
                    if _is_called(entry, name):
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
        _wait(handles)
        return len(handles)
    finally:
        for handle in handles:
            os.close(handle)


def _is_called(pid: str, name: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(len(name) + 1) == os.fsencode(name) + b"\0"
    except OSError:
        return False


def _wait(handles: list[int]) -> None:
    """Wait until all of them have ended, but not for ever."""
    poll = select.poll()
    for handle in handles:
        poll.register(handle, select.POLLIN)
    left, end = set(handles), time.monotonic() + PATIENCE
    while left and (rest := end - time.monotonic()) > 0:
        for handle, _ in poll.poll(rest * 1000):
            poll.unregister(handle)
            left.discard(handle)


def end_in_groups(controllers: Controllers) -> None:
    """End what an earlier AdminVM of this system left in its groups, and remove those."""
    for directory in controllers.directories():
        with contextlib.suppress(OSError):
            for entry in directory.iterdir():
                if entry.is_dir():
                    _kill_group(entry)
                with contextlib.suppress(OSError):
                    entry.rmdir()


def _kill_group(group: Path) -> None:
    try:
        (group / "cgroup.kill").write_text("1")
    except OSError:
        _kill_members(group)  # version 1, or a kernel that cannot do it at once


def _kill_members(group: Path) -> None:
    handles: dict[int, int] = {}
    try:
        for pid in _members(group):
            with contextlib.suppress(OSError):
                handles[pid] = os.pidfd_open(pid)
        # Who is in it still is the one that we hold: no number was given out anew meanwhile.
        for pid in handles.keys() & _members(group):
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(handles[pid], signal.SIGKILL)
    finally:
        for descriptor in handles.values():
            os.close(descriptor)


def _members(group: Path) -> set[int]:
    try:
        return set(map(int, (group / "cgroup.procs").read_text().split()))
    except (OSError, ValueError):
        return set()
