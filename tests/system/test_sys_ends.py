"""Ends: whatever is killed, nothing of it is left, the others go on, and a new start works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.processes import alive
from tests.support.system import Running, System, descendants, make_system

pytestmark = [pytest.mark.sandbox]

SYSTEM = """
[system]
kind = "bubblewrap"
[domains.a]
autostart = true
[domains.b]
autostart = true
[domains.b.files]
"/usr/local/etc/qubes-rpc/test.Wait" = "wait"
"/usr/local/etc/qubes-rpc/test.Echo" = "echo"
"""
POLICY = "test.Wait * a b allow\ntest.Echo * a b allow\n"
FILES = {
    "wait": "#!/bin/sh\necho ready\nexec cat\n",
    "echo": "#!/bin/sh\nexec cat\n",
}


@pytest.fixture
def system() -> Iterator[System]:
    with make_system(SYSTEM, POLICY, FILES) as made:
        yield made


def waiting_call(running: Running) -> subprocess.Popen[bytes]:
    """Begin a call from a to b that lasts, and return it once the service has answered."""
    call = running.start("a", "qrexec-client-vm b test.Wait; echo status $?")
    assert call.stdout is not None
    assert call.stdout.readline() == b"ready\n"
    return call


def gone(pids: list[int], within: float) -> list[int]:
    """Return which of the processes are still there after ``within`` seconds at most."""
    end = time.monotonic() + within
    left = pids
    while left and time.monotonic() < end:
        left = [pid for pid in left if alive(pid)]
        time.sleep(0.01)
    return left


def test_the_adminvm_killed_takes_all_domains_with_it(system: System) -> None:
    with system.up() as running:
        call = waiting_call(running)
        below = descendants(running.pid)
        assert len(below) >= 3, "two agents and a service at the least"
        mounts = Path("/proc/self/mountinfo").read_text().count(str(system.root))
        os.kill(running.pid, signal.SIGKILL)
        assert not gone(below, 30.0)
        killed = system.sluice("log", "--json").stdout
        assert "test.Wait" not in killed, "a record is written when a call has ended"
        call.wait(timeout=30)
    assert Path("/proc/self/mountinfo").read_text().count(str(system.root)) == mounts == 0
    with system.up() as running:
        assert running.run("a", "echo hello | qrexec-client-vm b test.Echo") == (0, "hello\n")
        records = [json.loads(line) for line in system.sluice("log", "--json").stdout.splitlines()]
        cut = [r for r in records if r["service"] == "test.Wait"]
        assert [(r["source"], r["decision"], r["cause"]) for r in cut] == [
            ("a", "allow", "the AdminVM was killed")
        ]


@pytest.mark.spec("PROXY-024")
def test_a_domain_killed_ends_the_calls_of_others_to_it(system: System) -> None:
    with system.up() as running:
        call = waiting_call(running)
        assert system.sluice("stop", "--kill", "b").returncode == 0
        out, _ = call.communicate(timeout=60)
        assert out.startswith(b"status ") and out != b"status 0\n"
        assert running.run("a", "echo still here") == (0, "still here\n")
        # The next call starts the domain again.
        assert running.run("a", "echo again | qrexec-client-vm b test.Echo") == (0, "again\n")


def test_what_domains_kept_can_be_deleted_when_the_system_is_down(system: System) -> None:
    with system.up() as running:
        assert running.run("a", "mkdir -p deep/er; echo kept > deep/er/file; chmod 0 deep") == (
            0,
            "",
        )
        refused = system.sluice("wipe", "a", "--yes")
        assert refused.returncode != 0 and "runs here already" in refused.stderr
    place = system.root / "state" / "appvms"
    unknown = system.sluice("wipe", "c", "--yes")
    assert unknown.returncode != 0 and "known: a, b" in unknown.stderr
    asked = system.sluice("wipe", "a", input="n\n")
    assert asked.returncode != 0 and (place / "a").exists()
    assert system.sluice("wipe", "a", "--yes").returncode == 0
    assert not (place / "a").exists() and (place / "b").exists()
    with system.up() as running:
        assert running.run("a", "ls deep 2>/dev/null; echo fresh") == (0, "fresh\n")
