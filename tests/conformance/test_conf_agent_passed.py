"""WIRE-240, 242 to 244, 248, 251, 252: the agent on an inherited control channel."""

from __future__ import annotations

import array
import contextlib
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest
from tests.support.agent import (
    BIN,
    CONNECT,
    DEADLINE,
    EXEC,
    JUST,
    REFUSED,
    SELF,
    STDERR,
    STDOUT,
    TERMINATED,
    TRIGGER4,
    Place,
    Wire,
    a_place,
    as_user,
    code,
    send_fds,
    streams,
    trigger_body,
    until,
)

ME = SELF.encode()


class PassedAgent:
    """An agent with an inherited control channel; the tester is its AdminVM."""

    def __init__(
        self, place: Place, prefix: list[str] | None = None, stderr: int = subprocess.PIPE
    ) -> None:
        self.place = place
        ours, theirs = socket.socketpair()
        self.socket = ours
        self.control = Wire(ours)
        command = [str(BIN / "qrexec-agent"), "-a", str(place.agent_socket), "-S"]
        self.process = subprocess.Popen(
            as_user((prefix or []) + command),
            env=place.environment(SLUICE_CONTROL_FD=str(theirs.fileno())),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=stderr,
        )
        place._processes.append(self.process)
        place._closers.append(ours.close)
        theirs.close()
        self.control.expect_hello()
        self.control.hello()
        until(place.agent_socket.exists, "the trigger socket")

    def send(self, kind: int, domain: int, port: int, text: bytes, fds: list[int]) -> None:
        body = struct.pack("<II", domain, port) + text + b"\0"
        send_fds(self.socket, struct.pack("<II", kind, len(body)) + body, fds)

    def call(self, text: bytes, number: int = 1, kind: int = EXEC) -> Wire:
        """Start a command over two pipes, doing the handshake."""
        wire = self.start(text, number, kind)
        wire.shake()
        return wire

    def start(self, text: bytes, number: int = 1, kind: int = EXEC) -> Wire:
        theirs_read, ours_write = os.pipe()
        ours_read, theirs_write = os.pipe()
        self.send(kind, 43, number, text, [theirs_read, theirs_write])
        os.close(theirs_read)
        os.close(theirs_write)
        wire = Wire(ours_read, ours_write)
        self.place._closers.append(wire.close)
        return wire

    def terminated(self, number: int) -> None:
        assert self.control.next() == (TERMINATED, struct.pack("<II", 43, number))

    def descriptors(self) -> int:
        """Count the agent's open descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


@pytest.mark.spec("WIRE-240")
def test_the_agent_ends_with_its_channel(place: Place) -> None:
    agent = PassedAgent(place)
    agent.call(ME + b":exec sleep 1000").close()
    agent.control.close()
    assert agent.process.wait(DEADLINE) == 0
    assert not place.agent_socket.exists()


@pytest.mark.sandbox
@pytest.mark.spec("WIRE-240")
def test_the_agent_is_process_1_and_reaps_orphans(place: Place) -> None:
    """In a pid namespace of its own: everything that is left behind is reaped, and ends with it."""
    probe = subprocess.run(
        as_user(["unshare", "-Urpf", "--mount-proc", "true"]), capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip("no user namespaces here")
    prefix = ["unshare", "-Urpf", "--mount-proc", "--kill-child"]
    agent = PassedAgent(place, prefix)
    # Orphans that have ended must not stay behind as zombies.
    script = (
        b"root:echo $QREXEC_AGENT_PID; sh -c 'sleep 0 & exec true'; "
        b"for i in $(seq 200); do "
        b"z=$(grep -l '^State:.Z' /proc/[0-9]*/status); [ -z \"$z\" ] && break; sleep 0.1; done; "
        b'echo "zombies:$z"'
    )
    messages = agent.call(script).rest()
    assert streams(messages, STDOUT) == b"1\nzombies:\n", messages
    agent.terminated(1)
    agent.call(b"root:exec sleep 1000", 2)
    agent.control.close()
    assert agent.process.wait(DEADLINE) == 0


@pytest.mark.spec("WIRE-242", "WIRE-251")
def test_a_call_over_two_pipes(place: Place) -> None:
    agent = PassedAgent(place)
    wire = agent.call(ME + b":cat; echo err >&2; exit 3", 1_000_000)
    wire.message(0x190, b"hello")
    wire.message(0x190)
    messages = wire.rest()
    assert streams(messages, STDOUT) == b"hello"
    assert streams(messages, STDERR) == b"err\n"
    assert code(messages) == 3
    agent.terminated(1_000_000)
    assert agent.control.silent()


@pytest.mark.spec("WIRE-242", "WIRE-244")
def test_the_trigger_sockets_answer_carries_the_descriptors(place: Place) -> None:
    agent = PassedAgent(place)
    client = place.connect(place.agent_socket)
    Wire(client).message(TRIGGER4, trigger_body(b"test.Add\0"))
    message = agent.control.next()
    assert message is not None and message[0] == TRIGGER4
    ident = message[1][128:160]
    one_read, one_write = os.pipe()
    other_read, other_write = os.pipe()
    before = agent.descriptors()
    agent.send(CONNECT, 43, 70000, ident[:-1], [one_read, other_write])
    os.close(one_read)
    os.close(other_write)
    data, ancillary, flags, _ = client.recvmsg(8, socket.CMSG_SPACE(4 * 4))
    assert data == struct.pack("<II", 43, 70000) and not flags & socket.MSG_CTRUNC
    numbers = array.array("i", ancillary[0][2])
    assert len(numbers) == 2
    os.write(one_write, b"in")
    assert os.read(numbers[0], 10) == b"in"
    os.write(numbers[1], b"out")
    assert os.read(other_read, 10) == b"out"
    until(lambda: agent.descriptors() <= before, "the agent's copies closed")
    client.close()
    agent.terminated(70000)
    for fd in (*numbers, one_write, other_read):
        os.close(fd)


@pytest.mark.spec("WIRE-243")
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("kind", [EXEC, JUST, CONNECT])
def test_a_wrong_number_of_descriptors_ends_that_call_only(
    place: Place, kind: int, count: int
) -> None:
    agent = PassedAgent(place)
    before = agent.descriptors()
    text = ME + b":true"
    if kind == CONNECT:
        client = place.connect(place.agent_socket)
        Wire(client).message(TRIGGER4, trigger_body(b"test.Add\0"))
        message = agent.control.next()
        assert message is not None
        text = message[1][128:159]
    given = [os.open("/dev/null", os.O_RDWR) for _ in range(count)]
    agent.send(kind, 43, 5, text, given)
    for fd in given:
        os.close(fd)
    agent.terminated(5)
    if kind == CONNECT:
        assert client.recv(8) == b""
    until(lambda: agent.descriptors() <= before, "nothing left open")
    messages = agent.call(ME + b":echo fine", 6).rest()
    assert streams(messages, STDOUT) == b"fine\n"
    agent.terminated(6)


@pytest.mark.spec("WIRE-252")
def test_no_descriptor_is_left_of_calls_that_are_over(place: Place) -> None:
    agent = PassedAgent(place)
    agent.call(ME + b":true", 1).rest()
    agent.terminated(1)
    before = agent.descriptors()
    for number in range(2, 12):
        wire = agent.call(ME + b":cat", number)
        if number % 2:
            wire.message(0x190)
            wire.rest()
        wire.close()
        agent.terminated(number)
    # Some of the first call's may still have been open then: fewer is right too.
    until(lambda: agent.descriptors() <= before, "all descriptors closed")


@pytest.mark.spec("WIRE-137", "WIRE-251")
def test_a_peer_that_breaks_the_protocol_ends_its_call_once(place: Place) -> None:
    agent = PassedAgent(place)
    wire = agent.start(ME + b":sleep 1000", 1)
    wire.hello(1)
    agent.terminated(1)
    wire = agent.call(ME + b":echo x; exec sleep 1000", 2)
    wire.message(0x777)
    agent.terminated(2)
    assert agent.control.silent()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a user id that nobody else has")
@pytest.mark.spec("WIRE-248")
def test_a_client_that_cannot_be_given_descriptors_disturbs_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The user's allowance of in-flight descriptors is used up: one call fails, others go on."""
    user = 60000 + os.getpid() % 1000
    ids = [f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"]
    monkeypatch.setattr("tests.support.agent.give", lambda path: os.chown(path, user, user))
    monkeypatch.setattr(f"{__name__}.as_user", lambda words: ["setpriv", *ids, *words])
    with a_place() as place:
        agent = PassedAgent(place)
        client = place.connect(place.agent_socket)
        Wire(client).message(TRIGGER4, trigger_body(b"test.Add\0"))
        message = agent.control.next()
        assert message is not None
        helper = subprocess.Popen(
            as_user(["/usr/bin/python3", "-c", HOARDER]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        place._processes.append(helper)
        assert helper.stdout is not None
        assert helper.stdout.readline() == b"full\n"
        # This client is out of luck ...
        pipes = os.pipe()
        agent.send(CONNECT, 43, 9, message[1][128:159], list(pipes))
        for fd in pipes:
            os.close(fd)
        agent.terminated(9)
        assert client.recv(8) == b""
        # ... while calls into the domain go on: the AdminVM sends their descriptors, not we.
        messages = agent.call(b"%d:echo fine" % user, 10).rest()
        assert streams(messages, STDOUT) == b"fine\n"
        agent.terminated(10)


HOARDER = """
import array, errno, os, resource, socket, sys
limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
null = os.open("/dev/null", os.O_RDONLY)
one, other = socket.socketpair()
pairs = [(one, other)]
full = False
while not full:
    try:
        pairs[-1][0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS,
            array.array("i", [null] * 200))], socket.MSG_DONTWAIT)
    except BlockingIOError:
        pairs.append(socket.socketpair())
    except OSError as error:
        assert error.errno == errno.ETOOMANYREFS, error
        full = True
print("full", flush=True)
sys.stdin.read()
"""


@pytest.mark.spec("WIRE-152")
def test_refusal_over_passed(place: Place) -> None:
    agent = PassedAgent(place)
    client = place.connect(place.agent_socket)
    Wire(client).message(TRIGGER4, trigger_body(b"test.Add\0"))
    message = agent.control.next()
    assert message is not None
    agent.control.message(REFUSED, message[1][128:160])
    assert client.recv(8) == b""


def test_stderr_of_services_is_logged_with_the_calls_identity(place: Place) -> None:
    place.service("test.Noisy", "#!/bin/sh\nprintf 'a\\033[31mb\\nlast' >&2\n")
    agent = PassedAgent(place)
    messages = agent.call(ME + b":QUBESRPC test.Noisy+x work", 1).rest()
    assert streams(messages, STDERR) == b"a\x1b[31mb\nlast"
    agent.terminated(1)
    agent.control.close()
    agent.process.send_signal(signal.SIGTERM)
    assert agent.process.stderr is not None
    logged = agent.process.stderr.read().decode().splitlines()
    assert "test.Noisy+x-work: a\\x1b[31mb" in logged
    assert "test.Noisy+x-work: last" in logged


def test_a_flood_of_stderr_is_folded(place: Place) -> None:
    place.service("test.Flood", "#!/bin/sh\nyes line | head -n 5000 >&2\n")
    agent = PassedAgent(place)
    messages = agent.call(ME + b":QUBESRPC test.Flood work", 1, JUST).rest()
    assert code(messages) == 0
    agent.terminated(1)
    assert agent.process.stderr is not None
    lines = []
    while True:
        lines.append(agent.process.stderr.readline().decode())
        if "left out" in lines[-1]:
            break
    assert len(lines) < 1000


def test_an_agent_out_of_descriptors_goes_on(place: Place) -> None:
    """Calls that cannot be served fail, each with its report; the others and the agent live on."""
    agent = PassedAgent(place, ["prlimit", "--nofile=60:60", "--"], subprocess.DEVNULL)
    place.service("test.Wait", "#!/bin/sh\nexec cat\n")
    wires = {}
    for number in range(1, 41):
        kind = JUST if number % 5 == 0 else EXEC
        wires[number] = agent.start(ME + b":QUBESRPC test.Wait work", number, kind)
        with contextlib.suppress(BrokenPipeError):
            wires[number].hello()
    served = 0
    for wire in wires.values():
        with contextlib.suppress(BrokenPipeError):
            wire.message(0x190, b"x")
            wire.message(0x190)
        served += (STDOUT, b"x") in wire.rest()
        wire.close()
    assert 5 <= served < 40
    ended = set()
    for _ in wires:
        message = agent.control.next()
        assert message is not None and message[0] == TERMINATED
        ended.add(struct.unpack("<II", message[1])[1])
    assert ended == set(wires)
    messages = agent.call(ME + b":echo fine", 99).rest()
    assert streams(messages, STDOUT) == b"fine\n"


def test_a_log_that_nobody_reads_stops_nothing(place: Place) -> None:
    agent = PassedAgent(place)
    place.service("test.Loud", "#!/bin/sh\nyes $(printf %0900d 1) | head -n 190 >&2\n")
    for number in (1, 2, 3):
        messages = agent.call(ME + b":QUBESRPC test.Loud work", number).rest()
        assert len(streams(messages, STDERR)) == 190 * 901 and code(messages) == 0
        agent.terminated(number)
