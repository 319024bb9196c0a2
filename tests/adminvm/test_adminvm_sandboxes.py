"""The whole system on real sandboxes, ended by SIGTERM while it works."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator

import pytest
from tests.support.adminvm import wait_until
from tests.support.processes import alive
from tests.support.system import System, descendants, make_system

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
"""
POLICY = "test.Wait * a b allow\ntest.Wait * a dom0 allow\ntest.Wait * b a deny\n"
FILES = {"wait": "#!/bin/sh\ntrap '' TERM INT HUP\nexec cat\n"}


@pytest.fixture
def system() -> Iterator[System]:
    with make_system(SYSTEM, POLICY, FILES) as made:
        rpc = made.root / "config" / "rpc"
        rpc.mkdir()
        (rpc / "test.Wait").write_text("#!/bin/sh\ntrap '' TERM INT HUP\nsleep 1000\n")
        (rpc / "test.Wait").chmod(0o755)
        yield made


@pytest.mark.alone
def test_sigterm_under_load_takes_everything_away_soon(system: System) -> None:
    count = 40
    with system.up() as running:
        running.start(
            "a",
            f"for i in $(seq {count}); do sleep 1000 | qrexec-client-vm b test.Wait & done; "
            "for i in 1 2 3 4 5; do qrexec-client-vm dom0 test.Wait </dev/null & done; wait",
        )

        def calls() -> int:
            answer = system.sluice("ls", "--json")
            if answer.returncode:
                return 0
            return sum(entry["calls"] for entry in json.loads(answer.stdout))

        # Each call between the domains counts in both; the shell in `a` is a call too.
        wait_until(lambda: calls() >= 2 * count + 5 + 1, "all calls", 40)
        below = descendants(running.pid)
        assert len(below) > count
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
        assert time.monotonic() - began < 10
        wait_until(lambda: not any(alive(pid) for pid in below), "the end of all processes")
    records = [
        json.loads(line)
        for line in (system.root / "state/log/audit.jsonl").read_text().splitlines()
    ]
    assert sum(record["service"] == "test.Wait" for record in records) == count + 5
    assert {record["cause"] for record in records} == {"the AdminVM stops"}
    # Nothing is in the way of a new start.
    with system.up() as running:
        assert running.run("a", "echo again") == (0, "again\n")
