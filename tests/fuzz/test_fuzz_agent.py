"""What reaches the domain's programs from outside, at random: they answer or fail as they say.

Decoders raise their own errors and nothing else; the client and the agent end, or go on, whatever
a hostile agent or a hostile peer sends.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.conformance.test_conf_agent_passed import PassedAgent
from tests.support.agent import DEADLINE, SELF, Place, Wire, a_place, send_fds

from sluice.agent.caller import CallRequest
from sluice.agent.link import AgentLink, Connect, Execute, Opened, Refuse
from sluice.agent.log import LineSink
from sluice.agent.options import UsageError, parse_options
from sluice.errors import ConfigError, RemoteError
from sluice.flow.reactor import Reactor
from sluice.service.address import tcp_address
from sluice.service.command import ServiceError, parse_command
from sluice.service.configuration import parse_configuration
from sluice.service.start import service_environment
from sluice.wire.messages import FROM_DAEMON, HELLO, MessageReader, encode_hello

GRAMMAR = st.lists(
    st.sampled_from(
        [b"user", b":", b"nogui:", b"QUBESRPC", b" ", b"s", b"+", b"a", b"\0", b"\xff", b"name"]
    ),
    max_size=12,
).map(b"".join)


@given(GRAMMAR | st.binary(max_size=80), st.booleans())
@example(b"u:QUBESRPC s+ d", True)
def test_commands(text: bytes, with_user: bool) -> None:
    try:
        command = parse_command(text, with_user=with_user)
    except ServiceError as error:
        assert error.code == 125
        return
    assert b"\0" not in command.text + command.user
    if command.is_service:
        assert command.service and command.source and b" " not in command.descriptor
        assert command.descriptor.startswith(command.service)
        assert (command.argument is None) == (b"+" not in command.descriptor)
        assert command.lookup.startswith(command.service + b"+")
        try:
            environment = service_environment(command, {b"QREXEC_X": b"1", b"Y": b"2"})
        except ServiceError as error:
            assert error.code == 125
        else:
            assert b"QREXEC_X" not in environment and environment[b"Y"] == b"2"
            assert not any(b"\0" in value for value in environment.values())
    else:
        assert command.text.endswith(command.shell)


SETTINGS = st.lists(
    st.sampled_from(
        [
            *(b"wait-for-session", b"force-user", b"skip-service-descriptor", b"x"),
            *(b"=", b" ", b"\t", b"\n", b"\r\n", b"'", b"#", b"true", b"false", b"0", b"1", b"'u'"),
            *(b"[", b'"', b"\0", b"\xff", b"99999999999999999999"),
        ]
    ),
    max_size=20,
).map(b"".join)


@given(SETTINGS | st.binary(max_size=60))
def test_settings(data: bytes) -> None:
    try:
        found = parse_configuration(data, "f", lambda text: None)
    except ConfigError as error:
        assert error.file == "f" and error.line is not None
        assert 1 <= error.line <= data.count(b"\n") + 1
        assert str(error).isascii() and str(error).isprintable()
        return
    assert b"\0" not in data
    assert found.force_user is None or b"'" not in found.force_user
    assert found.force_user is None or not found.socket_only()


@given(
    st.sampled_from([b"/dev/tcp", b"/dev/tcp/1.2.3.4", b"/dev/tcp/::1/22", b"/dev/tcp/h/"])
    | st.binary(max_size=20).map(lambda rest: b"/dev/tcp/" + rest),
    st.none() | st.text(alphabet="0123456789+._-ab", max_size=20).map(str.encode),
)
def test_tcp_addresses(target: bytes, argument: bytes | None) -> None:
    try:
        host, port = tcp_address(target, argument)
    except ServiceError as error:
        assert error.code == 125
        return
    assert 1 <= port <= 65535 and isinstance(host, bytes)


@given(st.lists(st.text(alphabet="-=abhelp", max_size=8), max_size=6), st.booleans())
def test_options(words: list[str], early: bool) -> None:
    short = {"a": ("a", True), "h": ("help", False)}
    long = {"help": ("help", False), "apple": ("a", True), "bee": ("b", False)}
    try:
        options, rest = parse_options(words, short, long, stop_early=early)
    except UsageError:
        return
    assert all(key in ("a", "b", "help") for key, _ in options)
    assert len(rest) <= len(words)


@given(
    st.lists(
        st.tuples(st.sampled_from([HELLO, 0x200, 0x201, 0x202, 0x203, 0x300, 7]), st.binary())
        | st.tuples(st.just(0x203), st.binary(min_size=32, max_size=32)),
        max_size=5,
    ),
    st.booleans(),
)
def test_control_messages(messages: list[tuple[int, bytes]], greeted: bool) -> None:
    link = AgentLink()
    reader = MessageReader(link.lengths)
    if greeted:
        reader.feed(encode_hello())
    for kind, body in messages:
        reader.feed(struct.pack("<II", kind, len(body)) + body)
    try:
        while (message := reader.next()) is not None:
            event = link.receive(*message)
            reader.lengths = link.lengths
            assert isinstance(event, Opened | Execute | Connect | Refuse)
            if isinstance(event, Execute):
                assert b"\0" not in event.text
    except RemoteError:
        pass
    assert link.lengths in (FROM_DAEMON, {HELLO: (4, 4)})


@given(st.binary(min_size=160, max_size=400), st.integers(2, 4))
def test_triggers(body: bytes, version: int) -> None:
    link = AgentLink()
    link.version = version
    message = link.trigger("client", body)
    if message is None:
        assert version == 2 and link.abandon() == []
        return
    _, size = struct.unpack_from("<II", message)
    assert len(message) == size + 8
    assert link.abandon() == ["client"]


@given(st.lists(st.binary(max_size=3000), max_size=8))
def test_logged_lines(pieces: list[bytes]) -> None:
    written: list[str] = []
    sink = LineSink(Reactor(), b"tag\x1b", written.append)
    for piece in pieces:
        sink.feed(piece)
    sink.close()
    assert len(written) <= 202
    for line in written:
        assert line.startswith("tag\\x1b: ") and line.isascii() and line.isprintable()


# --- a hostile agent and a hostile peer, against the client's request -----------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=12), st.integers(0, 5)), max_size=4),
    st.booleans(),
)
def test_a_hostile_agent(sends: list[tuple[bytes, int]], reset: bool) -> None:
    """Whatever it answers, exactly one callback is called and no descriptor is left."""
    before = len(os.listdir("/proc/self/fd"))
    path = f"/tmp/s-fuzz-{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.environ["VCHAN_SOCKET_DIR"] = "/nowhere"
    try:
        listener.listen(1)
        loop = Reactor()
        calls: list[str] = []

        def opened(read_fd: int, write_fd: int) -> None:
            os.close(read_fd)
            os.close(write_fd)
            calls.append("open")

        request = CallRequest(
            loop,
            b"vm",
            b"s",
            agent_socket=path,
            on_open=opened,
            on_refused=lambda: calls.append("refused"),
            on_error=lambda text: calls.append("error"),
            timeout=DEADLINE,
        )
        loop.run_once(0)
        loop._run_due()
        connection = listener.accept()[0]
        if not reset:
            connection.recv(10000)
        for data, count in sends:
            fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
            send_fds(connection, data, fds)
            for fd in fds:
                os.close(fd)
        connection.close()
        while not calls:
            loop._run_due()
            loop.run_once(1)
        request.close()
        loop.close()
        assert len(calls) == 1
    finally:
        listener.close()
        os.unlink(path)
        del os.environ["VCHAN_SOCKET_DIR"]
    # Fewer, where the collector found what an earlier test left.
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.fixture(scope="module")
def agent() -> Iterator[PassedAgent]:
    with a_place() as place:
        yield PassedAgent(place)


NUMBERS = iter(range(1, 1 << 30))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.binary(max_size=30)
        | st.tuples(
            st.sampled_from([0x190, 0x191, 0x192, 0x193, 0x300, 0x777]),
            st.integers(0, 70000) | st.integers(0, 0xFFFFFFFF),
            st.binary(max_size=20),
        ).map(lambda m: struct.pack("<II", m[0], m[1]) + m[2]),
        max_size=6,
    ),
    st.booleans(),
)
def test_a_hostile_peer_of_a_service(agent: PassedAgent, sends: list[bytes], greeted: bool) -> None:
    """Its call ends, once; the agent goes on and keeps nothing of it."""
    number = next(NUMBERS)
    wire = agent.start(SELF.encode() + b":cat >/dev/null", number)
    try:
        if greeted:
            wire.hello()
        for data in sends:
            wire.send(data)
    except BrokenPipeError:
        pass
    wire.close()
    agent.terminated(number)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=300), st.booleans())
def test_a_hostile_local_client(agent: PassedAgent, data: bytes, framed: bool) -> None:
    """What is no request closes the client; the agent passes nothing on and goes on."""
    place: Place = agent.place
    client = Wire(place.connect(place.agent_socket))
    if framed:
        data = struct.pack("<II", 0x213, len(data)) + data
    try:
        client.send(data)
        assert isinstance(client.writer, socket.socket)
        client.writer.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, OSError):
        pass
    valid = framed and len(data) >= 8 + 161
    if valid:
        message = agent.control.next()
        assert message is not None and message[0] == 0x213
        agent.control.message(0x203, message[1][128:160])
    assert client.ended()
    client.close()
