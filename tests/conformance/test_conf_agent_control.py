"""WIRE-122 to 128 and 7.7: the agent's control channel, its start, its end, its next daemon."""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
from collections.abc import Iterator

import pytest
from tests.support.agent import (
    CONNECT,
    DEADLINE,
    EXEC,
    HELLO,
    REFUSED,
    SELF,
    STDIN,
    STDOUT,
    TRIGGER4,
    AgentUnderTest,
    Place,
    Wire,
    a_place,
    code,
    streams,
    until,
)

ME = SELF.encode()


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


@pytest.mark.spec("WIRE-122", "WIRE-123")
def test_hello_first_then_the_trigger_socket(place: Place) -> None:
    agent = AgentUnderTest(place, handshake=False)
    agent.control.expect_hello(4)
    assert agent.control.silent()
    assert not place.agent_socket.exists()
    agent.control.hello()
    until(place.agent_socket.exists, "the trigger socket")
    assert stat.S_IMODE(place.agent_socket.stat().st_mode) == 0o777
    assert stat.S_ISSOCK(place.agent_socket.stat().st_mode)


@pytest.mark.spec("WIRE-122")
def test_a_newer_daemon_is_served_with_our_version(place: Place) -> None:
    agent = AgentUnderTest(place, version=0xFFFFFFFF)
    assert code(agent.run(ME + b":true")) == 0


@pytest.mark.spec("WIRE-124")
@pytest.mark.parametrize(
    "greeting",
    [
        struct.pack("<III", HELLO, 4, 1),
        struct.pack("<III", HELLO, 4, 0),
        struct.pack("<IIII", HELLO, 8, 4, 4),
        struct.pack("<III", STDIN, 4, 4),
        b"",
        struct.pack("<II", HELLO, 4) + b"\4",
    ],
)
def test_a_failed_handshake_ends_the_agent(place: Place, greeting: bytes) -> None:
    agent = AgentUnderTest(place, handshake=False)
    agent.control.send(greeting)
    if len(greeting) < 12:
        agent.control.close()
    assert agent.process.wait(DEADLINE) == 1
    assert not place.agent_socket.exists()


@pytest.mark.spec("WIRE-125")
@pytest.mark.parametrize(
    "message",
    [
        struct.pack("<II", 0x777, 0),
        struct.pack("<III", HELLO, 4, 4),
        struct.pack("<II", TRIGGER4, 200) + bytes(200),
        struct.pack("<II", STDOUT, 1) + b"x",
        struct.pack("<II", REFUSED, 31) + bytes(31),
        struct.pack("<II", REFUSED, 33) + bytes(33),
        struct.pack("<II", EXEC, 8) + bytes(8),
        struct.pack("<II", CONNECT, 8) + bytes(8),
        struct.pack("<II", EXEC, 0xFFFFFFFF),
    ],
)
def test_a_daemon_out_of_step_ends_the_agent(place: Place, message: bytes) -> None:
    agent = AgentUnderTest(place)
    agent.control.send(message)
    assert agent.process.wait(DEADLINE) == 1
    assert not place.agent_socket.exists()


@pytest.mark.spec("WIRE-126")
@pytest.mark.parametrize("option", ["-h", "--help", "--bogus", "-x", "--no-fork-server=1", "-a"])
def test_usage(place: Place, option: str) -> None:
    process = place.start("qrexec-agent", option)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 2 and b"usage" in err


@pytest.mark.spec("WIRE-127")
def test_sigterm(place: Place) -> None:
    agent = AgentUnderTest(place)
    wire = agent.call(ME + b":sleep 1000")
    agent.process.terminate()
    assert agent.process.wait(DEADLINE) == 0
    assert not place.agent_socket.exists()
    assert agent.control.ended()
    assert wire.ended()


@pytest.mark.spec("WIRE-127")
def test_sigterm_before_a_daemon_came(place: Place) -> None:
    process = place.start("qrexec-agent", "-a", str(place.agent_socket))
    until((place.path / "vchan" / "vchan.42.0.512.sock").exists, "the control socket")
    process.terminate()
    assert process.wait(DEADLINE) == 0


@pytest.mark.spec("WIRE-128")
@pytest.mark.parametrize("abstract", [False, True])
def test_readiness_is_announced_after_the_handshake(place: Place, abstract: bool) -> None:
    name = f"{'@' if abstract else ''}{place.path}/run/notify"
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind("\0" + name[1:] if abstract else name)
    if not abstract:
        os.chmod(name, 0o777)
    receiver.settimeout(DEADLINE)
    agent = AgentUnderTest(place, handshake=False, extra={"NOTIFY_SOCKET": name})
    agent.control.expect_hello()
    receiver.setblocking(False)
    with pytest.raises(BlockingIOError):
        receiver.recv(100)
    receiver.settimeout(DEADLINE)
    agent.control.hello()
    assert receiver.recv(100) == b"READY=1"
    until(place.agent_socket.exists, "the trigger socket")
    messages = agent.run(ME + b":echo ${NOTIFY_SOCKET-unset}")
    assert streams(messages, STDOUT) == b"unset\n"
    receiver.close()


def test_the_next_daemon_finds_the_agent_and_its_calls(place: Place) -> None:
    """7.7: the daemon goes and comes back; a call lives on, its end is reported to the new one."""
    agent = AgentUnderTest(place)
    wire = agent.call(ME + b":cat; exit 4")
    client, _ = agent.trigger(b"test.Add\0")
    agent.control.close()
    assert client.ended()
    until(lambda: not place.agent_socket.exists(), "the trigger socket removed")
    wire.message(STDIN, b"still there")
    wire.message(STDIN)
    messages = wire.rest()
    assert streams(messages, STDOUT) == b"still there" and code(messages) == 4
    agent.control = place.vchan_client(42, 0, 512)
    agent.control.expect_hello()
    agent.control.hello()
    agent.terminated(43, 1024)
    until(place.agent_socket.exists, "the trigger socket")
    assert code(agent.run(ME + b":exit 6")) == 6
    client, ident = agent.trigger(b"test.Add\0")
    agent.control.message(REFUSED, ident)
    assert client.ended()


def test_an_end_of_a_call_after_the_next_daemon_came(place: Place) -> None:
    agent = AgentUnderTest(place)
    wire = agent.call(ME + b":cat; exit 4")
    agent.control.close()
    until(lambda: not place.agent_socket.exists(), "the trigger socket removed")
    agent.control = place.vchan_client(42, 0, 512)
    agent.control.expect_hello()
    agent.control.hello()
    until(place.agent_socket.exists, "the trigger socket")
    wire.message(STDIN)
    assert code(wire.rest()) == 4
    agent.terminated(43, 1024)


@pytest.mark.spec("WIRE-007", "WIRE-008")
def test_messages_in_fragments_and_in_one_piece(place: Place) -> None:
    agent = AgentUnderTest(place)
    one = place.vchan_server(43, 42, 1024)
    other = place.vchan_server(43, 42, 1025)
    first = struct.pack("<IIII", EXEC, 8 + len(ME) + 6, 43, 1024) + ME + b":true\0"
    second = struct.pack("<IIII", EXEC, 8 + len(ME) + 6, 43, 1025) + ME + b":true\0"
    for byte in first[:-3]:
        agent.control.send(bytes([byte]))
    agent.control.send(first[-3:] + second)
    ends = set()
    for listener in (one, other):
        connection = listener.accept()[0]
        wire = Wire(connection)
        wire.shake()
        assert code(wire.rest()) == 0
        connection.close()
        message = agent.control.next()
        assert message is not None
        ends.add(message[1])
    assert ends == {struct.pack("<II", 43, 1024), struct.pack("<II", 43, 1025)}


def test_a_command_line_longer_than_a_ring(place: Place) -> None:
    agent = AgentUnderTest(place)
    word = b"x" * 60000
    messages = agent.run(ME + b":printf %s " + word)
    assert streams(messages, STDOUT) == word


def test_a_stand_alone_agent_out_of_descriptors_goes_on(place: Place) -> None:
    """Calls that cannot be served end, each with its report; the agent lives on."""
    agent = AgentUnderTest(place, "-S", prefix=["prlimit", "--nofile=40:40", "--"])
    place.service("test.Loud", "#!/bin/sh\necho x >&2\nexec cat\n")
    ports = range(2000, 2030)
    listeners = {}
    for port in ports:
        listeners[port] = agent.request(EXEC, 43, port, ME + b":QUBESRPC test.Loud work")
    ended = set()
    connections = []
    while len(ended) < len(ports):
        ready = select.select([agent.control.reader, *listeners.values()], [], [], DEADLINE)[0]
        assert ready
        for sock in ready:
            if sock is agent.control.reader:
                message = agent.control.next()
                assert message is not None
                ended.add(struct.unpack("<II", message[1])[1])
            else:
                connection = sock.accept()[0]
                connections.append(connection)
                # Hello, no input, and nothing more from our side.
                connection.sendall(struct.pack("<IIIII", HELLO, 4, 4, STDIN, 0))
    assert ended == set(ports)
    for connection in connections:
        connection.close()
    assert code(agent.run(ME + b":exit 3", port=3000)) == 3
