"""Daemon and agent go and come back in every order; calls work again, nothing is left behind."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator

import pytest
from tests.support.agent import DEADLINE, Place, System, a_place, until


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as made:
        made.service("test.Echo", "#!/bin/sh\nexec cat\n")
        yield made


def works(system: System) -> bool:
    return system.client("test.Echo", b"x")[:2] == (0, b"x")


def end(process: subprocess.Popen[bytes], how: int) -> None:
    process.send_signal(how)
    process.wait(DEADLINE)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("agent_first", [True, False])
def test_either_may_start_first_and_the_daemon_may_be_restarted(
    place: Place, how: int, agent_first: bool
) -> None:
    system = System(place, start=False)
    starts = [system.start_agent, system.start_daemon]
    started = [start() for start in (starts if agent_first else starts[::-1])]
    system.ready()
    assert works(system)
    daemon = started[1 if agent_first else 0]
    for _ in range(2):
        end(daemon, how)
        (system.sockets / "qrexec.domX").unlink(missing_ok=True)
        until(lambda: not place.agent_socket.exists(), "the agent's noticing")
        daemon = system.start_daemon()
        system.ready()
        assert works(system)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_agent_may_be_restarted(place: Place, how: int) -> None:
    """The daemon takes its sockets away while there is no agent, and comes back with it."""
    system = System(place, start=False)
    agent = system.start_agent()
    system.start_daemon()
    system.ready()
    for _ in range(2):
        assert works(system)
        end(agent, how)
        until(lambda: not (system.sockets / "qrexec.domX").exists(), "the daemon's noticing")
        agent = system.start_agent()
        system.ready()
        assert works(system)


def test_both_may_be_restarted_in_either_order(place: Place) -> None:
    system = System(place, start=False)
    for agent_first in (True, False):
        agent, daemon = system.start_agent(), system.start_daemon()
        system.ready()
        assert works(system)
        for process in (agent, daemon) if agent_first else (daemon, agent):
            end(process, signal.SIGTERM)
        assert not place.agent_socket.exists()
        (system.sockets / "qrexec.domX").unlink(missing_ok=True)
