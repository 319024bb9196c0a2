# ruff: noqa: E501  (what runs inside is written as it runs there)
"""Limits that are changed while a domain runs, on real domains in each of three modes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from tests.support.sandbox import MODES, Machine, machine

pytestmark = [pytest.mark.sandbox, pytest.mark.xdist_group("sandbox")]

SETTINGS = """
[domains.work]
maxmem = 600
"""
# Takes 150 MiB, says so, then as much again for each line it is sent.
TAKE = """
import sys
taken = [bytearray(150 << 20)]
print('taken', flush=True)
for line in sys.stdin:
    try: taken.append(bytearray(150 << 20)); print('more', flush=True)
    except MemoryError: print('refused', flush=True)
"""


@pytest.fixture(scope="module", params=MODES)
def inside(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A system with the domain ``work``."""
    with machine(request.param, SETTINGS) as made:
        yield made


def sluice(inside: Machine, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        inside.sluice(*words), capture_output=True, text=True, timeout=60,
        env=inside.environment, cwd="/", check=False,
    )  # fmt: skip


def limits(inside: Machine) -> dict[str, tuple[str, str]]:
    rows = [line.split() for line in sluice(inside, "ls", "--limits").stdout.splitlines()]
    return {row[1]: (row[2], row[-1]) for row in rows if row[0] == "work"}


@pytest.mark.spec("CORE-180")
def test_memory_is_changed_while_the_domain_runs(inside: Machine) -> None:
    """What is shown is what holds, also of a process that runs already, and also after a refusal."""
    before = limits(inside)["memory"]
    assert before[0] == "600"
    process = subprocess.Popen(
        inside.command(f"/usr/bin/python3 -c '{TAKE.replace(chr(39), chr(34))}'"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=inside.environment, cwd="/",
    )  # fmt: skip
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        by = before[1]
        if by == "cgroup1":
            # Less than is in use: version 1 cannot take it away.
            done = sluice(inside, "limits", "work", "--memory", "50")
            assert done.returncode == 125
            assert "memory stays as it is: the domain uses more" in done.stderr
            assert limits(inside)["memory"] == before
        assert sluice(inside, "limits", "work", "--memory", "250").returncode == 0
        assert limits(inside)["memory"] == ("250", by)
        if by == "rlimit":
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"refused\n"
            assert inside.value("__import__('resource').getrlimit(9)[1] >> 20") == "250"
            done = sluice(inside, "limits", "work", "--memory", "700")
            assert done.returncode == 125
            assert "memory stays as it is: only a start can raise it" in done.stderr
            assert limits(inside)["memory"] == ("250", by)
        else:
            assert sluice(inside, "limits", "work", "--memory", "900").returncode == 0
            assert limits(inside)["memory"] == ("900", by)
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"more\n"


BOMB = """
import os, sys, time
made = 0
try:
    while made < 2000:
        if os.fork() == 0:
            os.closerange(0, 3); time.sleep(60); os._exit(0)
        made += 1
except OSError: pass
print(made, flush=True)
sys.stdin.read()
"""


class Held(Machine):
    """A system whose user may have a few hundred processes, as on many machines of several users."""

    def as_user(self, argv: list[str]) -> list[str]:
        return ["prlimit", "--nproc=480:480", "--", *super().as_user(argv)]


@pytest.mark.spec("CORE-180")
@pytest.mark.parametrize("mode", ["subordinate", "single"])
def test_a_fork_bomb_leaves_processes_to_the_user(mode: str) -> None:
    """Makes processes until the kernel refuses: it counts them for the user who started the system,
    who can still start programs, and so can the other domains."""
    settings = "[domains.work]\n[domains.peer]\n[domains.later]\nautostart = false\n"
    with machine(mode, settings, kind=Held) as system:
        bomb = subprocess.Popen(
            system.command(f"exec /usr/bin/python3 -c '{BOMB}'"), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=system.environment, cwd="/",
        )  # fmt: skip
        with bomb:
            assert bomb.stdout is not None
            assert 50 < int(bomb.stdout.readline()) <= 120
            assert limits(system)["processes"][0] == "120"
            assert system.shell("echo $(echo alive)", "peer").stdout == b"alive\n"
            done = sluice(system, "run", "later", "--", "sh", "-c", "echo $(echo started)")
            assert done.stdout == "started\n", done
            system.down()


@pytest.mark.spec("CORE-172", "CORE-180")
def test_what_nothing_holds_cannot_be_changed(inside: Machine) -> None:
    """Where no group counts processor time, to change it is refused and said at the start."""
    if limits(inside)["cpus"][1] != "nothing":
        assert sluice(inside, "limits", "work", "--cpus", "1").returncode == 0
        assert limits(inside)["cpus"][0] == "1"
        assert "nothing holds" not in inside.said()
        return
    done = sluice(inside, "limits", "work", "--cpus", "1")
    assert done.returncode == 125
    assert "cpus stays as it is: nothing holds it here" in done.stderr
    assert limits(inside)["cpus"] == ("2", "nothing")
    assert inside.said().count("work: nothing holds its limit of cpus here") == 1
