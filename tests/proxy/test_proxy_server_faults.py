"""The resident form: whoever is killed, nothing hangs or is left, each call has one record."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.support.processes import alive
from tests.support.proxy import eventually
from tests.support.proxy_server import Resident, left_over, resident

# Writes without end and reads what comes back, as a source that copies does.
_SOURCE = """
import os, select
os.set_blocking(1, False)
poll = select.poll()
poll.register(0, select.POLLIN)
poll.register(1, select.POLLOUT)
piece = b"0123456789abcdef" * 256
while True:
    for fd, events in poll.poll():
        if fd == 0 and not os.read(0, 65536):
            raise SystemExit
        if fd == 1:
            try:
                os.write(1, piece)
            except BlockingIOError:
                pass
"""
_THROUGH = """
import os
while data := os.read(0, 65536):
    os.write(1, data)
"""
ROLES = ("source", "target", "launcher", "server", "filter", "worker")
CHAINS = {"filter": "outside", "worker": "plugin"}
PLUGINS = Path(__file__).parent / "legacy/plugins"


class Trial:
    """One call under load: its source, launcher, far end and, in one chain, an outside filter."""

    def __init__(self, server: Resident, chain: str) -> None:
        self.server = server
        self.pids = len(server.qube.pids())
        to_launcher, from_launcher = os.pipe(), os.pipe()
        self.launcher = server.launch(
            f"{chain}+vault+mirror", stdin=to_launcher[0], stdout=from_launcher[1]
        )
        self.source = subprocess.Popen(
            ["/usr/bin/python3", "-IS", "-c", _SOURCE],
            stdin=from_launcher[0], stdout=to_launcher[1], stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (*to_launcher, *from_launcher):
            os.close(fd)

    def victim(self, role: str) -> int | None:
        """Return whom to kill; None where he is not there yet, or any more."""
        if role == "source":
            return self.source.pid
        if role == "launcher":
            return self.launcher.pid
        if role == "server":
            return self.server.process.pid
        if role == "target":
            pids = self.server.qube.pids()[self.pids :]
            return pids[0] if pids else None
        mark = "/through" if role == "filter" else "sluice-proxy-worker"
        return next(iter(children(self.server, mark)), None)

    def finish(self) -> None:
        """See that source and launcher end, each in time."""
        assert self.launcher.wait(30) in (0, 125, 126, -9)
        self.launcher.stderr.close()
        self.source.wait(30)


def children(server: Resident, mark: str) -> list[int]:
    """Return the server's processes that run something, known by a part of the command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                line = (entry / "cmdline").read_bytes()
                parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            except OSError:
                continue
            ours = int(parent) == server.process.pid or str(server.directory).encode() in line
            if ours and mark.encode() in line:
                found.append(int(entry.name))
    return found


def outside(server: Resident) -> list[int]:
    """Return the processes of outside filters and of chains with plugins."""
    return children(server, "/through") + children(server, "sluice-proxy-worker")


@pytest.fixture
def server() -> Iterator[Resident]:
    with resident(start=False) as made:
        settings = f'max_calls_source = 256\nlegacy_plugins = ["{PLUGINS}"]\n'
        made.qube.configure("", settings)
        through = made.directory / "through.py"
        through.write_text(_THROUGH)
        made.qube.chain("look", "{ use = 'byte-limit', src2dst = '10G' }")
        program = f"['/usr/bin/python3', '-IS', '{through}']"
        made.qube.chain("outside", f"{{ use = 'program', src2dst = {program}, confine = false }}")
        made.qube.chain("plugin", "'caesar'", "{ use = 'byte-limit', src2dst = '10G' }")
        yield made


def recorded(server: Resident, known: set[str]) -> set[str]:
    """Return the calls that have a record, without those known already."""
    return {str(record["id"]) for record in server.qube.records()} - known


def kill_some(server: Resident, role: str, count: int, seed: int) -> None:
    """Kill one role of so many calls, each at a random moment, and look what is left."""
    chance = random.Random(seed)
    chain = CHAINS.get(role, "look")
    server.start()
    before = server.descriptors()
    known: set[str] = set()
    for _ in range(count):
        trial = Trial(server, chain)
        time.sleep(chance.random() * 0.06)
        if role == "server":
            # Not before there is a call: of that there can be no record.
            eventually(server.calls)
        pid = trial.victim(role) or eventually(partial(trial.victim, role))
        os.kill(pid, signal.SIGKILL)
        if role == "server":
            server.process.wait()
        trial.finish()
        if role != "server":
            # Whatever the launcher still handed over is a call by now, or over.
            eventually(lambda: not server.calls(), what="calls left")
        eventually(
            lambda: not left_over(server.qube) and not outside(server), what="processes left"
        )
        if role == "server":
            # It writes the records of the calls that it was killed in when it is back.
            server.start()
        # A launcher that was killed before it handed its call over has made none.
        called = role != "launcher" or len(server.qube.pids()) > trial.pids
        fresh = recorded(server, known)
        if called and not fresh:
            fresh = eventually(partial(recorded, server, known))
        assert len(fresh) == 1 or not (fresh or called)
        known |= fresh
        assert server.process.poll() is None
    eventually(lambda: not server.calls())
    eventually(lambda: server.descriptors() <= before + 8, what="descriptors left")
    assert server.call("look+vault+mirror", b"still here").stdout == b"still here"
    assert len(server.qube.records()) == len(known) + 1
    assert role == "launcher" or len(known) == count
    assert not list(server.directory.rglob("*.call*")), "files left"


@pytest.mark.spec("PROXY-024", "PROXY-052")
@pytest.mark.parametrize("role", ROLES)
def test_kill_at_a_random_moment(server: Resident, role: str) -> None:
    kill_some(server, role, 2, seed=ROLES.index(role))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("role", ROLES)
def test_kill_at_random_moments_for_long(server: Resident, role: str) -> None:
    kill_some(server, role, 200, seed=random.SystemRandom().randrange(1 << 30))
