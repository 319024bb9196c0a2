"""How many calls one agent, or one fork server, serves at once, and with which limits (7.2, 8)."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conformance.test_conf_agent_forkserver import ForkServer
from tests.support.agent import (
    DEADLINE,
    EXEC,
    JUST,
    SELF,
    STDIN,
    STDOUT,
    AgentUnderTest,
    Place,
    Wire,
    a_place,
    code,
    streams,
    until,
)

ME = SELF.encode()
LIMITS = b"ulimit -Sn; ulimit -Hn"
CALLS = 24  # of four descriptors and more each


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


def limited(soft: int, hard: int) -> list[str]:
    return ["prlimit", f"--nofile={soft}:{hard}", "--"]


def begun(wire: Wire) -> Wire:
    """Wait until the command of a call runs."""
    assert wire.next() == (STDOUT, b"begun\n")
    return wire


def test_an_agent_serves_more_calls_than_its_soft_limit_would_allow(place: Place) -> None:
    agent = AgentUnderTest(place, "-S", prefix=limited(64, 4096))
    command = ME + b":echo begun; read -r line; " + LIMITS
    calls = [begun(agent.call(command, port=1024 + number)) for number in range(CALLS)]
    for wire in calls:
        wire.message(STDIN, b"go on\n")
        messages = wire.rest()
        # What is started has the limits that the agent was given.
        assert streams(messages, STDOUT) == b"64\n4096\n" and code(messages) == 0


def test_what_starts_without_streams_has_the_old_limit_too(place: Place) -> None:
    agent = AgentUnderTest(place, "-S", prefix=limited(64, 4096))
    out = place.path / "run" / "out"
    command = ME + b":(" + LIMITS + b") >%s.new; mv %s.new %s" % ((bytes(out),) * 3)
    agent.run(command, JUST)
    until(out.exists, "the command's output")
    assert out.read_text() == "64\n4096\n"


def test_the_agents_own_limit_is_raised_within_the_hard_one(place: Place) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for hard, ours in ((300, 300), (16384, 16384), (19000, 16384)):
        if os.geteuid() != 0 and most != resource.RLIM_INFINITY and hard > most:
            continue
        agent = AgentUnderTest(place, "-S", prefix=limited(64, hard))
        assert open_files(agent.process.pid) == (ours, hard)
        agent.process.terminate()
        assert agent.process.wait(DEADLINE) == 0


def open_files(pid: int) -> tuple[int, int]:
    """Return the soft and the hard limit of descriptors of a process."""
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith("Max open files"):
            return int(line.split()[3]), int(line.split()[4])
    raise AssertionError("no such limit")


def test_a_fork_server_serves_more_calls_than_its_soft_limit_would_allow(place: Place) -> None:
    server = ForkServer(place, prefix=limited(64, 4096))
    calls = []
    for number in range(CALLS):
        calls.append(fork_call(server, b"echo begun; read -r line; " + LIMITS, 1024 + number))
    for request, wire in calls:
        wire.message(STDIN, b"go on\n")
        assert streams(wire.rest(), STDOUT) == b"64\n4096\n"
        assert request.ended()


def fork_call(server: ForkServer, text: bytes, port: int) -> tuple[Wire, Wire]:
    """Send a request to a fork server and wait until its command runs."""
    listener = server.place.vchan_server(43, 42, port)
    request = server.send(EXEC, text + b"\0", port=port)
    connection = listener.accept()[0]
    server.place._closers.append(connection.close)
    wire = Wire(connection)
    wire.shake()
    return request, begun(wire)


def test_a_fork_server_without_descriptors_goes_on(place: Place) -> None:
    """Its calls live on, and it accepts again as soon as there are descriptors."""
    server = ForkServer(place, prefix=limited(40, 40))
    request, wire = fork_call(server, b"echo begun; cat", 1024)
    idle = [Wire(place.connect(server.path)) for _ in range(60)]
    # More than it can take: some wait in the queue of the socket.
    wire.message(STDIN, b"still there")
    assert wire.next() == (STDOUT, b"still there")
    for connection in idle:
        connection.close()
    other, second = fork_call(server, b"echo begun; cat", 1025)
    second.message(STDIN)
    assert code(second.rest()) == 0 and other.ended()
    wire.message(STDIN)
    assert code(wire.rest()) == 0 and request.ended()
