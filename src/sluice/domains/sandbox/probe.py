"""What this machine can do, and what follows from it. For ``sluice doctor`` and the log of a start.

Everything is tried rather than assumed: user namespaces by making a sandbox, control groups by
their files. Nothing of the machine is changed. docs/spec/core-stack.md 12.1.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sluice import runtime
from sluice.domains.sandbox import ids, limits, mounts
from sluice.errors import LocalError, SluiceError

GOOD, WEAK, BAD = "ok", "weak", "missing"
OLDEST_BWRAP = (0, 8)
OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: how it is (``ok``, ``weak``, ``missing``), what follows."""

    what: str
    state: str
    found: str
    follows: str = ""


def examine(state: Path) -> list[Finding]:
    """Look at everything; ``state`` is the system's state directory."""
    checks: list[Callable[[], Finding]] = [
        _kernel,
        _interpreter,
        _bubblewrap,
        _namespaces,
        _ids,
        *(lambda name=name: _controller(name, state) for name in limits.CONTROLLERS),
        _seccomp,
        _descriptors,
        _libraries,
    ]
    return [check() for check in checks]


def level(findings: list[Finding]) -> int:
    """Return the capability level of 12.1: 3 privileged, 2 rootless+, 1 rootless, 0 none."""
    by_name = {finding.what: finding for finding in findings}
    if by_name["namespaces"].state == BAD:
        return 0
    if by_name["user ids"].state != GOOD:
        return 1
    return 3 if os.geteuid() == 0 else 2


def obstacles(findings: list[Finding], what: str) -> list[Finding]:
    """Return what stands in the way of ``bubblewrap``, ``process``, ``own-ids`` or ``limits``."""
    needed = {
        "bubblewrap": (
            "interpreter",
            "bubblewrap",
            "namespaces",
            "user ids",
            "system-call filter",
            "libraries",
        ),
        "process": ("interpreter",),
        "own-ids": ("user ids",),
        "limits": tuple(f"limit of {name}" for name in limits.CONTROLLERS),
    }[what]
    states = (BAD,) if what in ("bubblewrap", "process") else (BAD, WEAK)
    return [finding for finding in findings if finding.what in needed and finding.state in states]


def _kernel() -> Finding:
    return Finding("kernel", GOOD, platform.release())


def _interpreter() -> Finding:
    try:
        done = subprocess.run(
            [runtime.INTERPRETER, "-IS", "-c", "import sys; print(*sys.version_info[:3])"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        version = tuple(int(word) for word in done.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        follows = "no domain can start: their agents need it"
        return Finding("interpreter", BAD, f"{runtime.INTERPRETER}: {error}", follows)
    shown = f"{runtime.INTERPRETER} {'.'.join(map(str, version))}"
    if version[:2] < OLDEST_PYTHON:
        return Finding("interpreter", BAD, shown, "no domain can start: 3.11 is needed")
    if version[:2] != sys.version_info[:2]:
        return Finding(
            "interpreter",
            WEAK,
            f"{shown}, but this is {platform.python_version()}",
            "libraries inside domains may not load; make the environment with /usr/bin/python3",
        )
    return Finding("interpreter", GOOD, shown)


def _bubblewrap() -> Finding:
    path = shutil.which("bwrap")
    if path is None:
        return Finding("bubblewrap", BAD, "not installed", "no domain can start (apt: bubblewrap)")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_BWRAP:
        return Finding("bubblewrap", BAD, said.strip(), "no domain can start: 0.8 is needed")
    if os.stat(path).st_mode & 0o4000:
        return Finding("bubblewrap", WEAK, f"{found[0]}, setuid", "some options do not work then")
    return Finding("bubblewrap", GOOD, f"{path} {found[0]}")


def _namespaces() -> Finding:
    """Make a whole sandbox, mounts and /proc included: a namespace alone proves nothing."""
    command = ["bwrap", "--unshare-all", "--unshare-user", "--as-pid-1", "--ro-bind", "/", "/"]
    command += ["--proc", "/proc", "--dev", "/dev", "--", "/bin/true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0]
        worked = done.returncode == 0
    except (OSError, subprocess.SubprocessError) as error:
        worked, said = False, str(error)
    if worked:
        return Finding("namespaces", GOOD, "user, pid, mount, ipc, uts, net, cgroup")
    follows = "no sandbox can start; kind `process` works, without any isolation"
    return Finding("namespaces", BAD, said, follows)


def _ids() -> Finding:
    try:
        found = ids.detect()
    except LocalError as error:
        return Finding("user ids", BAD, str(error), "no sandbox can start")
    if found.mode == ids.SINGLE:
        remedy = "; to change that: apt install uidmap, and lines in /etc/subuid and /etc/subgid"
        if ids.subordinate("/etc/subuid") and ids.subordinate("/etc/subgid"):
            remedy = f"; you have subordinate ids, but: {ids.obstacle()}"
        return Finding("user ids", WEAK, "one for all domains", found.sentence() + remedy)
    return Finding("user ids", GOOD, f"{found.mode}: {found.slots} domains", found.sentence())


def _controller(name: str, state: Path) -> Finding:
    kind = limits.probe(state, prepare=False).kind(name)
    if kind != limits.NONE:
        return Finding(f"limit of {name}", GOOD, kind)
    instead = {
        "memory": "RLIMIT_AS, for each process, holds it instead",
        "pids": "RLIMIT_NPROC, for each user id, holds it instead",
        "cpu": "a domain can use all processors",
    }[name]
    return Finding(f"limit of {name}", WEAK, "no control group of ours", instead)


def _seccomp() -> Finding:
    try:
        from sluice.domains.sandbox.seccomp import program

        size = len(program()) // 8
    except (SluiceError, ImportError, OSError, RuntimeError) as error:
        return Finding("system-call filter", BAD, str(error), "no domain can start")
    return Finding("system-call filter", GOOD, f"{size} instructions")


def _descriptors() -> Finding:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 8192:
        follows = "many calls at once can fail: raise the hard limit of open files to 8192"
        return Finding("descriptors", WEAK, str(hard), follows)
    return Finding("descriptors", GOOD, str(hard))


def _libraries() -> Finding:
    if (closed := mounts.closed_to_others()) and _ids().state == GOOD:
        follows = f"no domain with ids of its own can start: chmod -R o+rX {closed}"
        return Finding("libraries", BAD, f"{closed}: others may not read it", follows)
    site = runtime.site_packages()
    if site is None:
        return Finding("libraries", WEAK, "the system's own", "large programs inside may lack some")
    return Finding("libraries", GOOD, site)
