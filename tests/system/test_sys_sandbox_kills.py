"""Whatever is killed, at a random moment and under load: nothing of it remains, and the next start
is a clean one. Ten rounds each; five hundred with ``make soak``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.sandbox import Machine, machine, wait_for
from tests.support.system import descendants

pytestmark = [pytest.mark.sandbox, pytest.mark.timeout(3000), pytest.mark.xdist_group("sandbox")]

MODE = "ranges" if os.geteuid() == 0 else "single"
SETTINGS = """
[domains.a]
[domains.b]
[domains.b.files]
"/usr/local/etc/qubes-rpc/test.Echo" = "echo"
"""
# Without autostart, so that the callers do not bring back what was killed.
POLICY = "test.Echo * a b allow autostart=no\n"
FILES = {"echo": "#!/bin/sh\nexec cat\n"}
# Calls that come and go, and one that moves data, until something ends them.
LOAD = (
    "(while qrexec-client-vm b test.Echo </dev/null; do :; done) & "
    "(while :; do head -c 3000000 /dev/zero; sleep 0.01; done) "
    "| qrexec-client-vm b test.Echo >/dev/null"
)

few = pytest.param(10, id="few")
many = pytest.param(500, id="many", marks=pytest.mark.soak)
rounds = pytest.mark.parametrize("count", [few, many])


@pytest.fixture
def system() -> Iterator[Machine]:
    """Two domains that run."""
    with machine(MODE, SETTINGS, POLICY, FILES) as made:
        yield made


class Load:
    """Keeps domain ``a`` calling domain ``b`` for as long as they live."""

    def __init__(self, system: Machine) -> None:
        self.process = subprocess.Popen(
            system.command(LOAD, "a"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=system.environment,
            cwd="/",
        )

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def alive(pids: list[int]) -> list[int]:
    """Return which of the processes still run; those that only wait to be reaped do not."""
    left = []
    for pid in pids:
        try:
            if ") Z " not in Path(f"/proc/{pid}/stat").read_text():
                left.append(pid)
        except OSError:
            continue
    return left


def works(system: Machine) -> None:
    """Make a call from a to b."""
    done = system.shell("echo works | qrexec-client-vm b test.Echo", "a", seconds=20)
    assert done.stdout == b"works\n", (done, system.said()[-2000:])


def state(system: Machine, name: str) -> object:
    from sluice.adminvm.api import request

    return request(system.root / "run/control.sock", "state", name=name)


def start(system: Machine, name: str) -> None:
    from sluice.adminvm.api import request

    request(system.root / "run/control.sock", "start", name=name)


def groups(system: Machine) -> list[Path]:
    """Return the control groups of the system's domains."""
    label = hashlib.sha256(os.fsencode(system.root / "state")).hexdigest()[:12]
    return [path for path in Path("/sys/fs/cgroup").glob(f"**/sluice-{label}/*") if path.is_dir()]


@rounds
@pytest.mark.spec("CORE-173", "CORE-175")
def test_the_adminvm_is_killed(system: Machine, count: int) -> None:
    random.seed(count)
    for _ in range(count):
        load = Load(system)
        time.sleep(random.uniform(0.0, 0.15))
        assert system.process is not None
        processes = descendants(system.process.pid)
        assert len(processes) >= 4  # two bubblewraps, two agents
        system.process.send_signal(signal.SIGKILL)
        system.process.wait()
        wait_for(lambda found=processes: alive(found) == [], 2.0)
        load.end()
        system.log.close()
        mounts = Path("/proc/self/mounts").read_text()
        assert str(system.root) not in mounts
        system.up()
        works(system)
        assert len(groups(system)) in (0, 2 * 3)


@rounds
@pytest.mark.parametrize("victim", ["agent", "bubblewrap", "service"])
@pytest.mark.spec("CORE-173")
def test_something_of_a_domain_is_killed(system: Machine, victim: str, count: int) -> None:
    random.seed(count)
    for _ in range(count):
        load = Load(system)
        time.sleep(random.uniform(0.02, 0.1))
        agent = system.agent_pid("b")
        below = descendants(agent)
        parent = int(Path(f"/proc/{agent}/stat").read_text().rsplit(")", 1)[1].split()[1])
        targets = {"agent": [agent], "bubblewrap": [parent], "service": below[-1:]}[victim]
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):  # the service may just have ended
                os.kill(pid, signal.SIGKILL)
        if victim == "service":
            assert state(system, "b") == "Running"
        else:
            wait_for(lambda found=[agent, parent, *below]: alive(found) == [], 2.0)
            wait_for(lambda: state(system, "b") == "Halted", 2.0)
            start(system, "b")
        load.end()
        works(system)
