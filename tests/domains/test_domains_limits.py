"""Limits that are changed while a domain runs: what is shown is what holds."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sluice.domains.model import DomainConfig
from sluice.domains.sandbox import leftovers, limits
from sluice.errors import LocalError

MIB = 1 << 20
BEGIN = limits.Wanted(500 * MIB, 50, 2)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a child, both of which wait for the end of their input."""
    code = "import os, sys; os.fork(); os.write(1, b'%9d\\n' % os.getpid()); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        yield child


def shown(held: limits.DomainLimits) -> dict[str, tuple[str, str]]:
    return {limit.name: (limit.value, limit.by) for limit in held.limits()}


@pytest.mark.spec("CORE-180")
def test_a_group_gets_other_values(tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    found = {
        "pids": (limits.V1, tmp_path / "p"),
        "memory": (limits.V2, tmp_path / "m"),
        "cpu": (limits.V1, tmp_path / "c"),
    }
    for _, directory in found.values():
        directory.mkdir()
    held = limits.DomainLimits(limits.Controllers(found), "work", BEGIN)
    held.apply(process.pid)
    assert (tmp_path / "p/work/cgroup.procs").read_text() == str(process.pid)
    held.change(limits.Wanted(7 * MIB, 70, 3))
    assert (tmp_path / "p/work/pids.max").read_text() == "70"
    assert (tmp_path / "m/work/memory.max").read_text() == str(7 * MIB)
    assert (tmp_path / "m/work/memory.swap.max").read_text() == "0"
    assert (tmp_path / "m/work/memory.oom.group").read_text() == "1"
    assert (tmp_path / "c/work/cpu.cfs_quota_us").read_text() == "300000"
    assert shown(held)["processes"] == ("70", "cgroup1")


@pytest.mark.spec("CORE-180")
def test_what_the_kernel_refuses_stays_as_it_is(
    tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A domain uses more memory than it is to have from now on: version 1 answers EBUSY."""
    found = {name: (limits.V1, tmp_path / name) for name in ("memory", "pids", "cpu")}
    for _, directory in found.values():
        directory.mkdir()
    held = limits.DomainLimits(limits.Controllers(found), "work", BEGIN)
    held.apply(process.pid)
    (tmp_path / "memory/work/memory.usage_in_bytes").write_text(str(200 * MIB))
    write = limits._write

    def busy(path: Path, value: int | str) -> bool:
        return value != 40 * MIB and write(path, value)

    monkeypatch.setattr(limits, "_write", busy)
    with pytest.raises(LocalError, match="work: memory stays as it is: the domain uses more"):
        held.change(limits.Wanted(40 * MIB, 60, 2))
    assert shown(held)["memory"] == ("500", "cgroup1")
    assert shown(held)["processes"] == ("60", "cgroup1")  # the others are changed all the same
    memory = tmp_path / "memory/work/memory.limit_in_bytes"
    assert memory.read_text() == str(500 * MIB)


@pytest.mark.spec("CORE-180")
def test_limits_of_each_process_are_lowered_for_all_of_them(
    process: subprocess.Popen[bytes],
) -> None:
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(2)]
    held = limits.DomainLimits(limits.Controllers({}), "work", limits.Wanted(9 << 40, 5000, 2))
    held.apply(process.pid)
    held.change(limits.Wanted(300 * MIB, 40, 2))
    for pid in pids:
        assert resource.prlimit(pid, resource.RLIMIT_AS) == (300 * MIB, 300 * MIB)
        assert resource.prlimit(pid, resource.RLIMIT_NPROC) == (40, 40)
    assert shown(held)["memory"] == ("300", "rlimit")
    with pytest.raises(LocalError, match="work: cpus stays as it is: nothing holds it here"):
        held.change(limits.Wanted(300 * MIB, 40, 1))
    assert shown(held)["cpus"] == ("2", "none")


@pytest.mark.spec("CORE-180")
def test_only_a_start_raises_what_each_process_has(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = limits.DomainLimits(limits.Controllers({}), "work", BEGIN)
    held.apply(process.pid)
    if os.geteuid() == 0:  # root may; everybody else is answered so
        prlimit = resource.prlimit

        def refused(pid: int, what: int, *values: tuple[int, int]) -> tuple[int, int]:
            if values and values[0][1] > prlimit(pid, what)[1]:
                raise PermissionError
            return prlimit(pid, what, *values)

        monkeypatch.setattr(resource, "prlimit", refused)
    with pytest.raises(LocalError, match="only a start can raise it"):
        held.change(limits.Wanted(600 * MIB, 50, 2))
    assert shown(held)["memory"] == ("500", "rlimit")


def test_a_lower_limit_of_our_own_is_what_is_shown(process: subprocess.Popen[bytes]) -> None:
    """The AdminVM was started under limits itself: a domain does not get more than those."""
    resource.prlimit(process.pid, resource.RLIMIT_AS, (100 * MIB, 100 * MIB))
    held = limits.DomainLimits(limits.Controllers({}), "work", BEGIN)
    held.apply(process.pid)
    assert shown(held)["memory"] == ("100", "rlimit")


@pytest.mark.spec("CORE-180")
def test_another_system_removes_our_empty_group(
    tmp_path: Path, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our domains had all halted, and it could be removed; the next one must have limits again."""
    found = limits.Controllers({"pids": (limits.V2, tmp_path / "sluice-ours")})
    other = limits.Controllers({"pids": (limits.V2, tmp_path / "sluice-other")})
    (tmp_path / "sluice-ours").mkdir()
    limits.remove_groups(other)
    assert not (tmp_path / "sluice-ours").exists()
    made = []

    def make(path: Path, kind: str) -> bool:
        made.append((path, kind))
        path.mkdir()
        return True

    monkeypatch.setattr(
        limits, "_make_group", make
    )  # hands its controllers on, which a folder cannot
    held = limits.DomainLimits(found, "work", BEGIN)
    held.apply(process.pid)
    assert made == [(tmp_path / "sluice-ours", limits.V2)]
    assert shown(held)["processes"] == ("50", "cgroup2")


def test_a_domain_gets_a_share_of_the_users_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    domain = DomainConfig("work", 1, "1" * 8)
    few = DomainConfig("few", 2, "2" * 8, features={"sandbox.pids-max": "20"})
    monkeypatch.setattr(resource, "getrlimit", lambda what: (400, 4000))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert limits.wanted(domain).pids == 100
    assert limits.wanted(few).pids == 20
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY,) * 2)
    assert limits.wanted(domain).pids == limits.DEFAULT_PIDS
    monkeypatch.setattr(resource, "getrlimit", lambda what: (400, 4000))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert limits.wanted(domain).pids == limits.DEFAULT_PIDS


def test_only_members_are_ended(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that is not in the group any more when it is looked at again is somebody else's."""
    other = subprocess.Popen(["sleep", "1000"])
    looks = [{process.pid, other.pid, 999_999_999}, {process.pid}]
    monkeypatch.setattr(leftovers, "_members", lambda group: looks.pop(0))
    try:
        leftovers._kill_members(Path("/nowhere"))
        assert process.wait(30) == -9
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
