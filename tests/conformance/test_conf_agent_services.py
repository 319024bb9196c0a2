"""WIRE-160 to 184: finding, configuring and starting services, through the real agent."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.agent import (
    DEADLINE,
    EXIT,
    JUST,
    SELF,
    STDERR,
    STDIN,
    STDOUT,
    AgentUnderTest,
    Place,
    a_place,
    code,
    streams,
    until,
)

from sluice.service.address import tcp_address
from sluice.service.command import ServiceError

ME = SELF.encode()
PORTS = iter(range(2000, 60000))


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Place, AgentUnderTest]]:
    """One agent for all tests here: none of them changes its state."""
    with a_place() as made:
        extra = {"QREXEC_REMOTE_DOMAIN": "stale", "QREXEC_FOO": "stale"}
        yield made, AgentUnderTest(made, "-S", extra=extra)


@pytest.fixture
def place(shared: tuple[Place, AgentUnderTest]) -> Iterator[Place]:
    place = shared[0]
    yield place
    for directory in ("rpc", "rpc2", "conf"):
        for entry in (place.path / directory).iterdir():
            entry.unlink()


@pytest.fixture
def agent(shared: tuple[Place, AgentUnderTest], place: Place) -> AgentUnderTest:
    return shared[1]


def call(agent: AgentUnderTest, text: bytes) -> list[tuple[int, bytes]]:
    """Call a service without input."""
    return agent.run(ME + b":QUBESRPC " + text, port=next(PORTS))


def output(agent: AgentUnderTest, text: bytes) -> bytes:
    messages = call(agent, text)
    assert code(messages) == 0, messages
    return streams(messages, STDOUT)


def failed(messages: list[tuple[int, bytes]]) -> int:
    """Return the code of a failed start, whose whole sequence is fixed (13.6)."""
    assert messages[:2] == [(STDOUT, b""), (STDERR, b"")] and len(messages) == 3
    return code(messages)


# --- lookup -------------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-160")
def test_a_specific_entry_wins_over_an_earlier_general_one(
    place: Place, agent: AgentUnderTest
) -> None:
    place.service("test.S", "#!/bin/sh\necho general\n", "rpc")
    place.service("test.S+a", "#!/bin/sh\necho specific\n", "rpc2")
    assert output(agent, b"test.S+a work") == b"specific\n"
    assert output(agent, b"test.S+b work") == b"general\n"
    assert output(agent, b"test.S work") == b"general\n"


@pytest.mark.spec("WIRE-160")
def test_the_first_directory_wins(place: Place, agent: AgentUnderTest) -> None:
    place.service("test.S", "#!/bin/sh\necho first\n", "rpc")
    place.service("test.S", "#!/bin/sh\necho second\n", "rpc2")
    assert output(agent, b"test.S work") == b"first\n"


@pytest.mark.spec("WIRE-161")
def test_an_absent_argument_is_looked_up_as_an_empty_one(
    place: Place, agent: AgentUnderTest
) -> None:
    script = "#!/bin/sh\necho $(basename $0) $QREXEC_SERVICE_FULL_NAME\n"
    place.service("test.S", script)
    place.service("test.S+", script)
    assert output(agent, b"test.S work") == b"test.S+ test.S\n"
    assert output(agent, b"test.S+ work") == b"test.S+ test.S+\n"
    assert output(agent, b"test.S+x work") == b"test.S test.S+x\n"


@pytest.mark.spec("WIRE-162")
def test_long_names(place: Place, agent: AgentUnderTest) -> None:
    name = "s" * 250
    place.service(name, '#!/bin/sh\nprintf %s "$1" | wc -c\n')
    place.service(name + "+1234", "#!/bin/sh\necho specific\n")
    assert output(agent, name.encode() + b"+1234 work") == b"specific\n"
    assert output(agent, name.encode() + b"+12345 work") == b"5\n"
    assert output(agent, name.encode() + b"+" + b"1" * 9000 + b" work") == b"9000\n"
    assert failed(call(agent, b"s" * 255 + b" work")) == 127
    assert failed(call(agent, b"s" * 256 + b" work")) == 125


@pytest.mark.spec("WIRE-163")
def test_dangling_links(place: Place, agent: AgentUnderTest) -> None:
    (place.path / "rpc" / "test.S").symlink_to(place.path / "nowhere")
    assert failed(call(agent, b"test.S work")) == 127
    place.service("test.S", "#!/bin/sh\necho second\n", "rpc2")
    assert output(agent, b"test.S work") == b"second\n"
    (place.path / "rpc" / "file").write_text("")
    (place.path / "rpc" / "test.T").symlink_to(place.path / "rpc" / "file" / "below")
    place.service("test.T", "#!/bin/sh\necho second\n", "rpc2")
    assert failed(call(agent, b"test.T work")) == 125


@pytest.mark.spec("WIRE-164")
def test_a_file_that_is_not_executable(place: Place, agent: AgentUnderTest) -> None:
    place.service("test.S", "#!/bin/sh\necho hi\n", mode=0o644)
    assert failed(call(agent, b"test.S work")) == 125


@pytest.mark.spec("WIRE-165")
def test_programs_that_cannot_be_executed(place: Place, agent: AgentUnderTest) -> None:
    place.service("test.S", "#!/no/such/interpreter\n")
    place.service("test.T", "\x01\x02\x03garbage")
    assert code(call(agent, b"test.S work")) == 127
    assert code(call(agent, b"test.T work")) == 125
    (place.path / "rpc" / "test.D").symlink_to("/tmp")
    assert code(call(agent, b"test.D work")) == 125


# --- environment --------------------------------------------------------------------------------

LOOK = '#!/bin/sh\necho "$#|${1-none}|${QREXEC_SERVICE_ARGUMENT-unset}"\n'


@pytest.mark.spec("WIRE-166", "WIRE-167")
def test_the_argument(place: Place, agent: AgentUnderTest) -> None:
    place.service("test.S", LOOK)
    assert output(agent, b"test.S+a+b work") == b"1|a+b|a+b\n"
    assert output(agent, b"test.S+ work") == b"0|none|\n"
    assert output(agent, b"test.S work") == b"0|none|unset\n"
    assert output(agent, b"test.S+-e work") == b"1|-e|-e\n"


@pytest.mark.spec("WIRE-168")
def test_the_environment(place: Place, agent: AgentUnderTest) -> None:
    place.service("test.S", "#!/bin/sh\nenv | grep ^QREXEC | sort\n")
    pid = agent.process.pid
    path = place.environment()["QREXEC_SERVICE_PATH"]
    common = f"QREXEC_AGENT_PID={pid}\nQREXEC_REMOTE_DOMAIN=work\n"
    assert output(agent, b"test.S work").decode() == (
        f"{common}QREXEC_REQUESTED_TARGET_TYPE=\n"
        f"QREXEC_SERVICE_FULL_NAME=test.S\nQREXEC_SERVICE_PATH={path}\n"
    )
    assert output(agent, b"test.S+a work   name vault").decode() == (
        f"{common}QREXEC_REQUESTED_TARGET=vault\nQREXEC_REQUESTED_TARGET_TYPE=name\n"
        "QREXEC_SERVICE_ARGUMENT=a\n"
        f"QREXEC_SERVICE_FULL_NAME=test.S+a\nQREXEC_SERVICE_PATH={path}\n"
    )
    assert output(agent, b"test.S+a work keyword default").decode() == (
        f"{common}QREXEC_REQUESTED_TARGET_KEYWORD=default\nQREXEC_REQUESTED_TARGET_TYPE=keyword\n"
        "QREXEC_SERVICE_ARGUMENT=a\n"
        f"QREXEC_SERVICE_FULL_NAME=test.S+a\nQREXEC_SERVICE_PATH={path}\n"
    )


@pytest.mark.spec("WIRE-169")
@pytest.mark.parametrize("tail", [b"work name", b"work name vault more", b"work a b c d"])
def test_a_wrong_number_of_words(place: Place, agent: AgentUnderTest, tail: bytes) -> None:
    place.service("test.S", "#!/bin/sh\necho hi\n")
    assert code(call(agent, b"test.S " + tail)) == 125


@pytest.mark.spec("WIRE-170")
def test_the_kinds_of_the_standard_streams(place: Place, agent: AgentUnderTest) -> None:
    place.service(
        "test.S",
        "#!/bin/sh\n"
        'for fd in 0 1 2; do a=$(readlink /proc/$$/fd/$fd); echo "${a%%:*}"; done\n'
        "exec ls /proc/self/fd\n",
    )
    lines = output(agent, b"test.S work").decode().split()
    assert lines[:3] == ["socket", "socket", "pipe"]
    # 3 is what ls reads.
    assert lines[3:] == ["0", "1", "2", "3"]


# --- socket services ----------------------------------------------------------------------------


class Server:
    """A Unix or TCP server that tells what it was sent, answers, and half-closes."""

    def __init__(self, place: Place, address: str | tuple[str, int], answer: bytes = b"ok") -> None:
        family = socket.AF_UNIX
        if isinstance(address, tuple):
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.bind(address)
        if family == socket.AF_UNIX:
            Path(str(address)).chmod(0o777)
        self.socket.listen(5)
        self.socket.settimeout(DEADLINE)
        self.received: list[bytes] = []
        self._answer = answer
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        place._closers.append(self.socket.close)

    @property
    def port(self) -> int:
        port: int = self.socket.getsockname()[1]
        return port

    def _serve(self) -> None:
        while True:
            try:
                connection = self.socket.accept()[0]
            except OSError:
                return
            data = b""
            while piece := connection.recv(65536):
                data += piece
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(self._answer)
            connection.close()
            self.received.append(data)


def exchange(agent: AgentUnderTest, text: bytes, data: bytes) -> list[tuple[int, bytes]]:
    """Call a service with input."""
    port = next(PORTS)
    wire = agent.call(ME + b":QUBESRPC " + text, port=port)
    if data:
        # An empty message would be the end-of-file already.
        wire.message(STDIN, data)
    wire.message(STDIN)
    messages = wire.rest()
    agent.terminated(43, port)
    wire.close()
    return messages


@pytest.mark.spec("WIRE-171", "WIRE-173", "WIRE-194")
@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("descriptor", [b"test.S", b"test.S+", b"test.S+arg"])
def test_a_socket_service(
    place: Place, agent: AgentUnderTest, link: bool, descriptor: bytes
) -> None:
    path = place.path / ("run/server" if link else "rpc/test.S")
    path.unlink(missing_ok=True)
    server = Server(place, str(path))
    if link:
        (place.path / "rpc" / "test.S").symlink_to(path)
    messages = exchange(agent, descriptor + b" work  more", b"payload")
    assert messages == [(STDERR, b""), (STDOUT, b"ok"), (STDOUT, b""), (EXIT, bytes(4))]
    until(lambda: server.received, "the server's end")
    assert server.received == [descriptor + b" work  more\0payload"]
    server.socket.close()


@pytest.mark.spec("WIRE-172")
def test_the_descriptor_can_be_left_out(place: Place, agent: AgentUnderTest) -> None:
    server = Server(place, str(place.path / "rpc" / "test.S"))
    (place.path / "conf" / "test.S").write_text("skip-service-descriptor=true")
    assert code(exchange(agent, b"test.S work", b"payload")) == 0
    until(lambda: server.received, "the server's end")
    assert server.received == [b"payload"]
    server.socket.close()


@pytest.mark.spec("WIRE-174")
def test_a_socket_that_refuses(place: Place, agent: AgentUnderTest) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(place.path / "rpc" / "test.S"))
    stale.close()
    assert failed(call(agent, b"test.S work")) == 125
    messages = agent.run(ME + b":QUBESRPC test.S work", JUST, next(PORTS))
    assert messages == [(EXIT, struct.pack("<i", 125))]


def test_a_socket_whose_path_no_address_can_hold(place: Place, agent: AgentUnderTest) -> None:
    name = "s" * 150
    server = Server(place, str(place.path / "run" / "short"))
    (place.path / "run" / "short").rename(place.path / "rpc" / name)
    assert code(exchange(agent, name.encode() + b" work", b"")) == 0
    until(lambda: server.received, "the server's end")
    server.socket.close()


def test_just_exec_of_a_socket_service(place: Place, agent: AgentUnderTest) -> None:
    server = Server(place, str(place.path / "rpc" / "test.S"))
    messages = agent.run(ME + b":QUBESRPC test.S+a work", JUST, next(PORTS))
    assert messages == [(EXIT, bytes(4))]
    until(lambda: server.received, "the server's end")
    assert server.received == [b"test.S+a work\0"]
    server.socket.close()


@pytest.mark.spec("WIRE-195")
def test_exit_on_client_eof(place: Place, agent: AgentUnderTest) -> None:
    listener = place.listen("rpc/test.S")
    (place.path / "conf" / "test.S").write_text("exit-on-client-eof = true\n")
    wire = agent.call(ME + b":QUBESRPC test.S work", port=(port := next(PORTS)))
    connection = listener.accept()[0]
    wire.message(STDIN)
    assert wire.rest() == [(STDERR, b""), (STDOUT, b""), (EXIT, bytes(4))]
    agent.terminated(43, port)
    connection.close()
    listener.close()


@pytest.mark.spec("WIRE-196")
def test_exit_on_service_eof(place: Place, agent: AgentUnderTest) -> None:
    listener = place.listen("rpc/test.S")
    (place.path / "conf" / "test.S").write_text("exit-on-service-eof = true\n")
    wire = agent.call(ME + b":QUBESRPC test.S work", port=(port := next(PORTS)))
    connection = listener.accept()[0]
    connection.sendall(b"bye")
    connection.shutdown(socket.SHUT_WR)
    assert wire.rest() == [(STDERR, b""), (STDOUT, b"bye"), (STDOUT, b""), (EXIT, bytes(4))]
    agent.terminated(43, port)
    connection.close()
    listener.close()


# --- TCP services -------------------------------------------------------------------------------


def link(place: Place, target: str) -> None:
    (place.path / "rpc" / "test.T").symlink_to(target)


@pytest.mark.spec("WIRE-175")
@pytest.mark.parametrize("form", ["fixed", "port", "both"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_tcp_services(place: Place, agent: AgentUnderTest, form: str, host: str) -> None:
    try:
        server = Server(place, (host, 0))
    except OSError:
        pytest.skip(f"no {host} here")
    port = server.port
    (place.path / "conf" / "test.T").write_text("skip-service-descriptor=true\n")
    target, argument = {
        "fixed": (f"/dev/tcp/{host}/{port}", ""),
        "port": (f"/dev/tcp/{host}", f"+{port}"),
        "both": ("/dev/tcp", f"+{host.replace(':', '+')}+{port}"),
    }[form]
    link(place, target)
    messages = exchange(agent, f"test.T{argument} work".encode(), b"data")
    assert streams(messages, STDOUT) == b"ok" and code(messages) == 0
    until(lambda: server.received, "the server's end")
    assert server.received == [b"data"]
    server.socket.close()


@pytest.mark.spec("WIRE-175")
def test_a_tcp_service_gets_the_descriptor_and_an_empty_argument_is_none(
    place: Place, agent: AgentUnderTest
) -> None:
    server = Server(place, ("127.0.0.1", 0))
    link(place, f"/dev/tcp/127.0.0.1/{server.port}")
    assert code(exchange(agent, b"test.T+ work", b"data")) == 0
    until(lambda: server.received, "the server's end")
    assert server.received == [b"test.T+ work\0data"]
    server.socket.close()


@pytest.mark.spec("WIRE-176")
def test_an_underscore_is_refused_before_anybody_looks_at_the_host() -> None:
    """It could be part of an interface's name: fe80::1%eth_0."""
    with pytest.raises(ServiceError, match="underscore"):
        tcp_address(b"/dev/tcp", b"fe80++1%eth_0+80")
    assert tcp_address(b"/dev/tcp", b"fe80++1%eth0+80") == (b"fe80::1%eth0", 80)


@pytest.fixture(scope="module")
def open_port() -> Iterator[int]:
    """A port of four digits at which somebody listens: a zero can stand before it."""
    for port in range(9999, 1024, -1):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
                listener.listen(64)
            except OSError:
                continue
            yield port
            return


@pytest.mark.spec("WIRE-176")
@pytest.mark.parametrize(
    ("target", "argument"),
    [
        ("/dev/tcp/", "+127.0.0.1+PORT"),
        ("/dev/tcp/127.0.0.1/0", ""),
        ("/dev/tcp/127.0.0.1/65536", ""),
        ("/dev/tcp/127.0.0.1/OVER", ""),
        ("/dev/tcp/127.0.0.1/0PORT", ""),
        ("/dev/tcp/127.0.0.1/PORTx", ""),
        ("/dev/tcp/127.0.0.1/+PORT", ""),
        ("/dev/tcp/127.0.0.1/", ""),
        ("/dev/tcp/127.0.0.1/PORT/", ""),
        ("/dev/tcp/localhost/PORT", ""),
        ("/dev/tcp//PORT", ""),
        ("/dev/tcp/127.0.0.1/PORT", "+PORT"),
        ("/dev/tcp/127.0.0.1", ""),
        ("/dev/tcp/127.0.0.1", "+"),
        ("/dev/tcp/127.0.0.1", "+0"),
        ("/dev/tcp/127.0.0.1", "+0PORT"),
        ("/dev/tcp/127.0.0.1", "+OVER"),
        ("/dev/tcp/127.0.0.1", "+123456"),
        ("/dev/tcp/localhost", "+PORT"),
        ("/dev/tcp", ""),
        ("/dev/tcp", "+"),
        ("/dev/tcp", "+PORT"),
        ("/dev/tcp", "+127.0.0.1"),
        ("/dev/tcp", "+localhost+PORT"),
        ("/dev/tcp", "+127.0.0_1+PORT"),
        ("/dev/tcp", "++PORT"),
    ],
)
def test_bad_tcp_addresses(
    place: Place, agent: AgentUnderTest, open_port: int, target: str, argument: str
) -> None:
    """Somebody listens where such an address would lead if it were taken for a good one."""

    def filled(text: str) -> str:
        return text.replace("PORT", str(open_port)).replace("OVER", str(65536 + open_port))

    target, argument = filled(target), filled(argument)
    link(place, target)
    assert failed(call(agent, f"test.T{argument} work".encode())) == 125


def test_a_link_to_a_tcp_link_is_no_tcp_service(place: Place, agent: AgentUnderTest) -> None:
    (place.path / "rpc2" / "there").symlink_to("/dev/tcp/127.0.0.1/80")
    link(place, str(place.path / "rpc2" / "there"))
    assert failed(call(agent, b"test.T work")) in (125, 127)


# --- configuration ------------------------------------------------------------------------------


def configured(place: Place, agent: AgentUnderTest, text: str | bytes) -> int:
    """Return the code of a call of a service with this configuration."""
    data = text.encode() if isinstance(text, str) else text
    (place.path / "conf" / "test.S").write_bytes(data)
    place.service("test.S", "#!/bin/sh\nexit 0\n")
    messages = call(agent, b"test.S work")
    if code(messages):
        failed(messages)
    return code(messages)


@pytest.mark.spec("WIRE-177")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "# comment\n",
        "\n\n#x\n\n",
        "wait-for-session=false\r\nskip-service-descriptor = true\r\n",
        "exit-on-client-eof\t = \t false \t # trailing\n",
        "wait-for-session=0",
        "wait-for-session=0#x",
        f"force-user = '{SELF}' # it's me",
    ],
)
def test_accepted_configurations(place: Place, agent: AgentUnderTest, text: str) -> None:
    assert configured(place, agent, text) == 0


@pytest.mark.spec("WIRE-178")
@pytest.mark.parametrize(
    "text",
    [
        " \n",
        "\t\n",
        " wait-for-session=0\n",
        "[section]\n",
        "# nul \0\n",
        "wait-for-session=0\0\n",
        "_key=0\n",
        "1key=0\n",
        "key\n",
        "=1\n",
        "k\u00e9y=1\n",
        "key:1\n",
    ],
)
def test_refused_lines(place: Place, agent: AgentUnderTest, text: str) -> None:
    # A NUL in a comment is an error too.
    assert configured(place, agent, text) == 125


@pytest.mark.spec("WIRE-179")
@pytest.mark.parametrize("value", ["true", "false", "0", "1"])
def test_wait_for_session_accepts(place: Place, agent: AgentUnderTest, value: str) -> None:
    assert configured(place, agent, f"wait-for-session={value}\n") == 0


@pytest.mark.spec("WIRE-179")
@pytest.mark.parametrize("value", ["2", "00", "01", '"a"', "True", "", "'true'", "-1", "1 1"])
def test_wait_for_session_rejects(place: Place, agent: AgentUnderTest, value: str) -> None:
    assert configured(place, agent, f"wait-for-session={value}\n") == 125


@pytest.mark.spec("WIRE-180")
@pytest.mark.parametrize(
    "key", ["skip-service-descriptor", "exit-on-client-eof", "exit-on-service-eof"]
)
def test_other_booleans(place: Place, agent: AgentUnderTest, key: str) -> None:
    assert configured(place, agent, f"{key}=true\n") == 0
    assert configured(place, agent, f"{key}=false\n") == 0
    for value in ("0", "1", "'true'", "yes"):
        assert configured(place, agent, f"{key}={value}\n") == 125


@pytest.mark.spec("WIRE-181")
@pytest.mark.parametrize(
    "value",
    ["0", "true", '"USER"', "USER", "'USER", "'''USER'''", "'USER' b", "'USER''b'", "'USER\""],
)
def test_force_user_rejects(place: Place, agent: AgentUnderTest, value: str) -> None:
    """The user that such a value would mean is one as whom the agent could run things."""
    assert configured(place, agent, f"force-user={value.replace('USER', SELF)}\n") == 125
    assert configured(place, agent, f"force-user='{SELF}'\n") == 0


@pytest.mark.spec("WIRE-181", "WIRE-139")
def test_force_user_replaces_the_user(place: Place, agent: AgentUnderTest) -> None:
    place.service("test.S", "#!/bin/sh\necho hi\n")
    (place.path / "conf" / "test.S").write_text(f"force-user='{SELF}'\n")
    messages = agent.run(b"somebody:QUBESRPC test.S work", port=next(PORTS))
    assert streams(messages, STDOUT) == b"hi\n"
    (place.path / "conf" / "test.S").write_text("force-user='somebody'\n")
    assert failed(call(agent, b"test.S work")) == 125


@pytest.mark.spec("WIRE-182")
@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("wait-for-session=0\nwait-for-session=0\n", 125),
        ("unknown=1\nunknown='x'\nother.key-2_=true\n", 0),
        ("unknown=maybe\n", 125),
        ("unknown=\n", 125),
        ("unknown=9223372036854775807\n", 0),
        ("unknown=9223372036854775808\n", 125),
        ("Wait-For-Session=7\n", 0),
    ],
)
def test_duplicate_and_unknown_keys(
    place: Place, agent: AgentUnderTest, text: str, status: int
) -> None:
    assert configured(place, agent, text) == status


@pytest.mark.spec("WIRE-183")
@pytest.mark.parametrize(
    "key", ["skip-service-descriptor", "exit-on-client-eof", "exit-on-service-eof"]
)
@pytest.mark.parametrize("first", [True, False])
def test_conflicts(place: Place, agent: AgentUnderTest, key: str, first: bool) -> None:
    lines = [f"force-user='{SELF}'", f"{key}=true"]
    assert configured(place, agent, "\n".join(lines if first else lines[::-1])) == 125
    assert configured(place, agent, f"force-user='{SELF}'\n{key}=false\n") == 0


@pytest.mark.spec("WIRE-184")
def test_links_among_configurations(place: Place, agent: AgentUnderTest) -> None:
    place.service("test.S", "#!/bin/sh\n")
    entry = place.path / "conf" / "test.S"
    entry.symlink_to(place.path / "nowhere")
    assert code(call(agent, b"test.S work")) == 0
    entry.unlink()
    (place.path / "rpc" / "file").write_text("")
    entry.symlink_to(place.path / "rpc" / "file" / "below")
    assert failed(call(agent, b"test.S work")) == 125


@pytest.mark.spec("WIRE-184")
def test_a_configuration_that_cannot_be_read(place: Place, agent: AgentUnderTest) -> None:
    place.service("test.S", "#!/bin/sh\n")
    (place.path / "conf" / "test.S").mkdir()
    try:
        assert failed(call(agent, b"test.S work")) == 125
    finally:
        (place.path / "conf" / "test.S").rmdir()


def test_settings_for_an_argument(place: Place, agent: AgentUnderTest) -> None:
    place.service("test.S", "#!/bin/sh\n")
    (place.path / "conf" / "test.S").write_text("broken")
    (place.path / "conf" / "test.S+fine").write_text("")
    assert code(call(agent, b"test.S+fine work")) == 0
    assert failed(call(agent, b"test.S+other work")) == 125


def test_settings_for_sockets_are_ignored_for_programs(place: Place, agent: AgentUnderTest) -> None:
    place.service("test.S", "#!/bin/sh\ncat; sleep 0\necho more\n")
    (place.path / "conf" / "test.S").write_text(
        "skip-service-descriptor=true\nexit-on-client-eof=true\nexit-on-service-eof=true\n"
    )
    messages = exchange(agent, b"test.S work", b"in")
    assert streams(messages, STDOUT) == b"inmore\n" and code(messages) == 0


@pytest.mark.spec("WIRE-190", "WIRE-191")
def test_a_service_that_closes_stdin(place: Place, agent: AgentUnderTest) -> None:
    place.service(
        "test.S",
        "#!/bin/sh\nexec <&-; echo closed; read x <%s; echo more\n"
        % (fifo := place.path / "run" / "go"),
    )
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    wire = agent.call(ME + b":QUBESRPC test.S work", port=(port := next(PORTS)))
    assert wire.next() == (STDOUT, b"closed\n")
    for _ in range(30):
        wire.message(STDIN, b"x" * 30000)
    wire.message(STDIN)
    fifo.write_text("\n")
    messages = wire.rest()
    assert streams(messages, STDOUT) == b"more\n" and code(messages) == 0
    agent.terminated(43, port)
    fifo.unlink()


@pytest.mark.spec("WIRE-192")
def test_a_service_that_does_not_read_yet(place: Place, agent: AgentUnderTest) -> None:
    fifo = place.path / "run" / "go"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    place.service("test.S", f"#!/bin/sh\nread x <{fifo}; echo out; read x <{fifo}; wc -c\n")
    wire = agent.call(ME + b":QUBESRPC test.S work", port=(port := next(PORTS)))

    def feed() -> None:
        for _ in range(8):
            wire.message(STDIN, b"x" * 32768)
        wire.message(STDIN)

    thread = threading.Thread(target=feed)
    thread.start()
    fifo.write_text("\n")
    assert wire.next() == (STDOUT, b"out\n")
    fifo.write_text("\n")
    messages = wire.rest()
    thread.join(DEADLINE)
    assert streams(messages, STDOUT).strip() == b"262144" and code(messages) == 0
    agent.terminated(43, port)
    fifo.unlink()


@pytest.mark.spec("WIRE-193")
def test_a_service_that_closes_stdout(place: Place, agent: AgentUnderTest) -> None:
    place.service("test.S", "#!/bin/sh\necho x; exec >&-; read y; exit 9\n")
    wire = agent.call(ME + b":QUBESRPC test.S work", port=(port := next(PORTS)))
    assert wire.next() == (STDOUT, b"x\n")
    assert wire.next() == (STDOUT, b"")
    assert wire.silent()
    wire.message(STDIN, b"\n")
    assert wire.rest() == [(STDERR, b""), (EXIT, struct.pack("<i", 9))]
    agent.terminated(43, port)
