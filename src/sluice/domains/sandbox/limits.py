"""Limits of a domain: memory, processes, CPU, by whatever this machine lets us set.

Theory. Three ways, best first: control groups version 2 where cpu, memory and pids are ours to
hand on; version 1 memory, pids and cpu, as root; else what the kernel holds for each process
(RLIMIT_AS, RLIMIT_NPROC). Each controller is looked for by itself, since a machine may have some
of them only. A limit that nothing holds does not stop a start: it is listed as unenforced.
Some resource limits are set in any case: descriptors (the kernel counts those in flight for a user
id), core files, locked memory. docs/spec/core-stack.md 12.4.1, 12.5.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
from dataclasses import dataclass, replace
from pathlib import Path

from sluice.domains.model import DomainConfig
from sluice.domains.sandbox import rlimits
from sluice.domains.sandbox.base import Limit
from sluice.errors import LocalError

MIB = 1 << 20
DEFAULT_PIDS = 4096
MAX_PIDS = 1 << 22  # the kernel numbers no more
CPU_PERIOD = 100_000  # microseconds
MAX_DESCRIPTORS = 1024
AGENT_DESCRIPTORS = 4096
CONTROLLERS = ("memory", "pids", "cpu")
_NAMES = {"memory": "memory", "pids": "processes", "cpu": "cpus"}

V2 = "cgroup2"
V1 = "cgroup1"
RLIMIT = "rlimit"
NONE = "none"


@dataclass(frozen=True, slots=True)
class Wanted:
    """The limits of one domain: bytes of memory, processes, CPUs."""

    memory: int
    pids: int
    cpus: int


def wanted(domain: DomainConfig) -> Wanted:
    """Work out a domain's limits from its properties (12.5); never over half of the machine."""
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    memory = (domain.maxmem or domain.memory) * MIB
    asked = domain.feature("sandbox.pids-max") or ""
    pids = int(asked) if asked.isdecimal() and 0 < int(asked) <= MAX_PIDS else DEFAULT_PIDS
    return Wanted(memory=min(memory, half), pids=min(pids, _share()), cpus=domain.vcpus)


def _share() -> int:
    """Return how many processes one domain may have at most.

    The kernel counts a domain's also for the user who started the system, whatever ids they have:
    with all that this user may have, one domain could keep the others and that user from starting
    anything. It does not hold root to any number.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() == 0 or soft == resource.RLIM_INFINITY:
        return MAX_PIDS
    return max(soft // 4, 1)


@dataclass(frozen=True, slots=True)
class Controllers:
    """For each controller that we may use: the directory to make groups in, and its version."""

    found: dict[str, tuple[str, Path]]

    def kind(self, controller: str) -> str:
        """Return ``cgroup2``, ``cgroup1`` or ``none``."""
        return self.found[controller][0] if controller in self.found else NONE

    def directories(self) -> list[Path]:
        """Return the directories in which a domain gets a group, each once."""
        return list(dict.fromkeys(path for _, path in self.found.values()))


def label_of(state: Path) -> str:
    """Return the name by which what belongs to a system is known to the kernel.

    A container with a system at the same path has another directory there, and so another name:
    what carries ours belongs to whoever holds the lock in our directory.
    """
    try:
        found = os.stat(state)
        which = f"{found.st_dev}:{found.st_ino}:{state}"
    except FileNotFoundError:
        which = str(state)  # nothing was ever started there
    return "sluice-" + hashlib.sha256(os.fsencode(which)).hexdigest()[:12]


def probe(state: Path, *, proc: Path = Path("/proc/self"), prepare: bool = True) -> Controllers:
    """Find the controllers that are ours to use for the system whose state is in ``state``.

    With ``prepare`` the system's own group is made; without it nothing is changed (doctor).
    """
    own = _own_groups(proc)
    label = label_of(state)
    found: dict[str, tuple[str, Path]] = {}
    for kind, controllers, mount in _mounts(proc):
        relative = own.get("" if kind == V2 else next(iter(controllers & own.keys()), "-"))
        if relative is None:
            continue
        base = mount / relative.lstrip("/")
        if kind == V2:
            usable = _delegated(base, prepare)
        else:
            usable = controllers if os.access(base, os.W_OK) else set()
        for controller in usable & set(CONTROLLERS):
            if controller not in found or kind == V2:
                found[controller] = (kind, base / label)
    if prepare:
        for controller, (kind, path) in list(found.items()):
            if not _make_group(path, kind):
                del found[controller]
    return Controllers(found)


def _own_groups(proc: Path) -> dict[str, str]:
    """Return controller (empty for version 2) -> path of our own group."""
    groups: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in (proc / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                groups[controller] = path
    return groups


def _mounts(proc: Path) -> list[tuple[str, set[str], Path]]:
    """Return (version, controllers named by the mount, mount point) of each hierarchy."""
    mounts: list[tuple[str, set[str], Path]] = []
    with contextlib.suppress(OSError):
        for line in (proc / "mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            point, (kind, _, options) = before.split(" ")[4], after.split(" ", 2)
            if kind == "cgroup2":
                mounts.append((V2, set(), Path(point)))
            elif kind == "cgroup":
                mounts.append((V1, set(options.split(",")) & set(CONTROLLERS), Path(point)))
    return mounts


def _delegated(base: Path, prepare: bool) -> set[str]:
    """Return the controllers that our own version 2 group can hand on to its children."""
    try:
        offered = set((base / "cgroup.controllers").read_text().split()) & set(CONTROLLERS)
        handed = set((base / "cgroup.subtree_control").read_text().split())
    except OSError:
        return set()
    missing = offered - handed
    if not offered or not os.access(base / "cgroup.subtree_control", os.W_OK):
        return offered & handed if os.access(base, os.W_OK) else set()
    if not missing or not prepare:
        return offered
    # A group with processes cannot hand controllers on: we move into a leaf of our own. That
    # fails, as it should, where others share our group.
    try:
        leaf = base / "sluice-adminvm"
        leaf.mkdir(exist_ok=True)
        (leaf / "cgroup.procs").write_text(str(os.getpid()))
        (base / "cgroup.subtree_control").write_text(" ".join("+" + name for name in missing))
    except OSError:
        return offered & handed
    return offered


def _make_group(path: Path, kind: str) -> bool:
    try:
        path.mkdir(exist_ok=True)
        if kind == V2:
            offered = set((path / "cgroup.controllers").read_text().split()) & set(CONTROLLERS)
            (path / "cgroup.subtree_control").write_text(" ".join("+" + name for name in offered))
    except OSError:
        return False
    return True


class DomainLimits:
    """The groups and limits of one run of a domain."""

    def __init__(self, controllers: Controllers, name: str, limits: Wanted) -> None:
        """Take what the machine has and what is wanted; ``name`` is a valid domain name."""
        self._controllers = controllers
        self.name = name
        self._held: dict[str, str] = {}
        self._pid = -1
        # What is in force, or will be with the start.
        self.wanted = limits

    def _groups(self) -> list[Path]:
        return [directory / self.name for directory in self._controllers.directories()]

    def apply(self, pid: int, *, agent_has_own_id: bool = True) -> None:
        """Put a process, which has no children yet, under the limits. Never raises for a limit.

        An agent that shares its user id with everything else needs more descriptors than its
        services may have, which it then limits itself (see sluice.agent.users).
        """
        self._pid = pid
        for kind, directory in dict.fromkeys(self._controllers.found.values()):
            with contextlib.suppress(OSError):
                _make_below(directory, kind, self.name)
                (directory / self.name / "cgroup.procs").write_text(str(pid))
        for controller in CONTROLLERS:
            kind = self._controllers.kind(controller)
            held = kind != NONE and self._write(controller, kind, self.wanted)
            self._held[controller] = kind if held else NONE
        descriptors = MAX_DESCRIPTORS if agent_has_own_id else AGENT_DESCRIPTORS
        rlimits.lower(pid, resource.RLIMIT_NOFILE, descriptors)
        rlimits.lower(pid, resource.RLIMIT_CORE, rlimits.CORE_TO_NOBODY)
        rlimits.lower(pid, resource.RLIMIT_MEMLOCK, 8 * MIB)
        wanted = self.wanted
        if self._held["memory"] == NONE:
            memory = rlimits.lower(pid, resource.RLIMIT_AS, wanted.memory)
            if memory is not None:
                self._held["memory"], wanted = RLIMIT, replace(wanted, memory=memory)
        # Beside a pids controller this one is counted for a user id in its namespace.
        pids = rlimits.lower(pid, resource.RLIMIT_NPROC, wanted.pids)
        if pids is not None and self._held["pids"] == NONE:
            self._held["pids"], wanted = RLIMIT, replace(wanted, pids=pids)
        self.wanted = wanted

    def change(self, limits: Wanted) -> None:
        """Set other values while the domain runs. What cannot be set stays as it is.

        Raises LocalError that tells which limits those are, when all others are set.
        """
        failures = []
        for controller, field in zip(CONTROLLERS, ("memory", "pids", "cpus"), strict=True):
            value = getattr(limits, field)
            if value == getattr(self.wanted, field):
                continue
            failure = self._change_one(controller, limits)
            if failure:
                failures.append(f"{_NAMES[controller]} stays as it is: {failure}")
            else:
                self.wanted = replace(self.wanted, **{field: value})
        if failures:
            raise LocalError(f"{self.name}: {'; '.join(failures)}")

    def _change_one(self, controller: str, limits: Wanted) -> str:
        """Set one limit to another value; return why that failed, empty where it did not."""
        held = self._held.get(controller, NONE)
        if held == NONE:
            return "nothing holds it here"
        if held != RLIMIT:
            if self._write(controller, held, limits):
                return ""
            self._write(controller, held, self.wanted)  # none of it rather than half
            in_use = controller == "memory" and self.usage().get("memory", 0) > limits.memory
            return "the domain uses more" if in_use else "the kernel refuses the value"
        what = resource.RLIMIT_AS if controller == "memory" else resource.RLIMIT_NPROC
        value = limits.memory if controller == "memory" else limits.pids
        return "" if rlimits.lower_for_all(self._pid, what, value) else "only a start can raise it"

    def _write(self, controller: str, kind: str, limits: Wanted) -> bool:
        """Write one limit into the files of the domain's group; tell whether it is in force."""
        quota = limits.cpus * CPU_PERIOD
        # Each: the file that counts, then what is written in this order.
        files: dict[tuple[str, str], tuple[str, list[tuple[str, int | str]]]] = {
            ("memory", V2): (
                "memory.max",
                [("memory.oom.group", 1), ("memory.swap.max", 0), ("memory.max", limits.memory)],
            ),
            ("memory", V1): (
                "memory.limit_in_bytes",
                [
                    ("memory.limit_in_bytes", limits.memory),
                    ("memory.memsw.limit_in_bytes", limits.memory),
                    # Once more: where the limit rises, the other one has to rise before it.
                    ("memory.limit_in_bytes", limits.memory),
                ],
            ),
            ("pids", V2): ("pids.max", [("pids.max", limits.pids)]),
            ("pids", V1): ("pids.max", [("pids.max", limits.pids)]),
            ("cpu", V2): ("cpu.max", [("cpu.max", f"{quota} {CPU_PERIOD}")]),
            ("cpu", V1): (
                "cpu.cfs_quota_us",
                [("cpu.cfs_period_us", CPU_PERIOD), ("cpu.cfs_quota_us", quota)],
            ),
        }
        group = self._controllers.found[controller][1] / self.name
        counts, values = files[controller, kind]
        wrote = [(name, _write(group / name, value)) for name, value in values]
        return (counts, True) in wrote

    def memory_event(self) -> int:
        """Return a descriptor that is readable once the kernel has ended something for memory.

        Only for version 1 groups, else -1; the caller closes it.
        """
        if self._held.get("memory") != V1:
            return -1
        group = self._controllers.found["memory"][1] / self.name
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with contextlib.suppress(OSError), open(group / "memory.oom_control") as control:
            if _write(group / "cgroup.event_control", f"{event} {control.fileno()}"):
                return event
        os.close(event)
        return -1

    def limits(self) -> list[Limit]:
        """Return what is in force, and what is not (``by`` is ``none``)."""
        held = self._held
        return [
            Limit("memory", str(self.wanted.memory // MIB), held.get("memory", NONE)),
            Limit("processes", str(self.wanted.pids), held.get("pids", NONE)),
            Limit("cpus", str(self.wanted.cpus), held.get("cpu", NONE)),
            Limit("descriptors", str(MAX_DESCRIPTORS), RLIMIT),
        ]

    def usage(self) -> dict[str, int]:
        """Return what the groups count: ``memory`` in bytes, ``processes``, where there are any."""
        files = {
            "memory": {V2: "memory.current", V1: "memory.usage_in_bytes"},
            "pids": {V2: "pids.current", V1: "pids.current"},
        }
        counted: dict[str, int] = {}
        for controller, names in files.items():
            kind = self._controllers.kind(controller)
            if kind != NONE:
                group = self._controllers.found[controller][1] / self.name
                with contextlib.suppress(OSError, ValueError):
                    counted[controller] = int((group / names[kind]).read_text())
        return counted

    def kill(self) -> bool:
        """End all processes of the domain by its group; False where the kernel cannot do that."""
        return any(_write(group / "cgroup.kill", 1) for group in self._groups())

    def remove(self) -> bool:
        """Remove the groups, which must be empty; tells whether all are gone."""
        gone = True
        for group in self._groups():
            try:
                group.rmdir()
            except OSError as error:
                gone = gone and error.errno in (errno.ENOENT, errno.ENOTDIR)
        return gone


def remove_groups(controllers: Controllers) -> None:
    """Remove the system's own groups, and those that systems left which were killed.

    Only empty ones can be removed. One that lives but runs no domain makes its group anew.
    """
    for directory in controllers.directories():
        with contextlib.suppress(OSError):
            for entry in directory.parent.glob("sluice-*"):
                if entry.name != "sluice-adminvm":
                    with contextlib.suppress(OSError):
                        entry.rmdir()


def _write(path: Path, value: int | str) -> bool:
    try:
        with open(path, "w") as file:
            file.write(str(value))
    except OSError:
        return False
    return True


def _make_below(directory: Path, kind: str, name: str) -> None:
    """Make a domain's group in the system's, and that one where another system removed it.

    It removes all empty ones at its end, see ``remove_groups``. Raises OSError.
    """
    for _ in range(10):
        try:
            (directory / name).mkdir(exist_ok=True)
            return
        except FileNotFoundError:
            _make_group(directory, kind)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory))
