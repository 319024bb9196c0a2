"""WIRE-235 to 239: qrexec-fork-server, and qvm-connect-tcp."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence

import pytest
from tests.support.agent import (
    BIN,
    CONNECT,
    DEADLINE,
    EXEC,
    EXIT,
    JUST,
    SELF,
    STDERR,
    STDIN,
    STDOUT,
    AgentUnderTest,
    Place,
    Wire,
    a_place,
    as_user,
    code,
    send_fds,
    streams,
    until,
)
from tests.support.ports import free_port

ME = SELF.encode()


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


class ForkServer:
    """A real fork server; it is in the background when the constructor returns."""

    def __init__(
        self, place: Place, path: str | None = None, prefix: Sequence[str] = (), **extra: str
    ) -> None:
        self.place = place
        self.path = path or str(place.path / "run" / "fs")
        done = subprocess.run(
            as_user([*prefix, str(BIN / "qrexec-fork-server"), self.path]),
            env=place.environment(**extra),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=DEADLINE,
            check=False,
        )
        assert done.returncode == 0
        place._closers.append(self.end)

    def processes(self) -> list[int]:
        """Return the processes that have our path, which nobody else has, on their command line.

        The socket does not tell: its peer is whoever listened, and that process has gone.
        """
        pids = [pid for pid in os.listdir("/proc") if pid.isdigit()]
        return [int(pid) for pid in pids if self.path in command_line(pid)]

    def end(self) -> None:
        """End the background process, by its id."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        until(lambda: not self.processes(), "the end of the fork server")

    def send(self, kind: int, text: bytes, size: int | None = None, port: int = 1024) -> Wire:
        connection = self.place.connect(self.path)
        length = len(text) if size is None else size
        connection.sendall(struct.pack("<iiiI", kind, 43, port, length) + text)
        return Wire(connection)

    def call(self, text: bytes, kind: int = EXEC) -> tuple[Wire, Wire]:
        listener = self.place.vchan_server(43, 42, 1024)
        request = self.send(kind, text + b"\0")
        connection = listener.accept()[0]
        self.place._closers.append(connection.close)
        wire = Wire(connection)
        wire.shake()
        return request, wire


@pytest.mark.spec("WIRE-235")
def test_it_accepts_when_it_returns(place: Place) -> None:
    server = ForkServer(place)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(server.path)
    connection.close()


def test_the_tester_ends_what_is_in_the_background(place: Place) -> None:
    server = ForkServer(place)
    assert len(server.processes()) == 1
    server.end()
    assert server.processes() == []


@pytest.mark.spec("WIRE-235")
def test_the_default_path_names_the_user(place: Place) -> None:
    # /var/run/qubes is not ours: what can be seen is the path it complains of.
    process = place.start("qrexec-fork-server", extra={"USER": "no/such/user"})
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert b"/var/run/qubes/qrexec-server.no/such/user.sock" in err


@pytest.mark.spec("WIRE-236")
def test_too_many_arguments(place: Place) -> None:
    process = place.start("qrexec-fork-server", "a", "b")
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1 and b"usage" in err


@pytest.mark.spec("WIRE-237")
@pytest.mark.parametrize(
    ("text", "size"),
    [
        (b"", 0),
        (b"true", 4),
        (b"true\0x\0", 7),
        (b"true\0", 0x80000000),
        (b"QUBESRPC s\0", None),
        (b"QUBESRPCx\0", None),
    ],
)
def test_requests_that_are_refused(place: Place, text: bytes, size: int | None) -> None:
    server = ForkServer(place)
    listener = place.vchan_server(43, 42, 1024)
    assert server.send(EXEC, text, size).ended()
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()


@pytest.mark.spec("WIRE-238")
def test_a_call(place: Place) -> None:
    server = ForkServer(place)
    request, wire = server.call(b"cat; echo err >&2; exit 6")
    wire.message(STDIN, b"data")
    assert wire.next() == (STDOUT, b"data")
    assert request.silent()
    wire.message(STDIN)
    messages = wire.rest()
    assert streams(messages, STDERR) == b"err\n" and code(messages) == 6
    assert request.ended()


@pytest.mark.spec("WIRE-238")
def test_just_exec_and_failures(place: Place) -> None:
    server = ForkServer(place)
    request, wire = server.call(b"true", JUST)
    assert wire.rest() == [(EXIT, bytes(4))]
    assert request.ended()
    request, wire = server.call(b"QUBESRPC test.None work")
    assert wire.rest() == [(STDOUT, b""), (STDERR, b""), (EXIT, struct.pack("<i", 127))]
    assert request.ended()
    request, wire = server.call(b"true", 0x202)
    assert wire.rest() == []
    assert request.ended()


@pytest.mark.spec("WIRE-238")
def test_over_passed_the_request_brings_the_descriptors(place: Place) -> None:
    server = ForkServer(place)
    one_read, one_write = os.pipe()
    other_read, other_write = os.pipe()
    connection = place.connect(server.path)
    text = b"cat\0"
    request = struct.pack("<iiiI", EXEC, 43, 70000, len(text)) + text
    send_fds(connection, request, [one_read, other_write])
    os.close(one_read)
    os.close(other_write)
    wire = Wire(other_read, one_write)
    wire.shake()
    wire.message(STDIN, b"x")
    wire.message(STDIN)
    messages = wire.rest()
    assert streams(messages, STDOUT) == b"x" and code(messages) == 0
    assert Wire(connection).ended()
    wire.close()


@pytest.mark.spec("WIRE-239")
def test_services_without_a_shell_commands_with_ours(place: Place) -> None:
    shell = place.service("shell", '#!/bin/sh\necho "shell:$1:$2"\n', "run")
    place.service("test.S", "#!/bin/sh\necho $PPID\n")
    server = ForkServer(place, SHELL=str(shell))
    _, wire = server.call(b"some command")
    assert streams(wire.rest(), STDOUT) == b"shell:-c:some command\n"
    _, wire = server.call(b"QUBESRPC test.S work")
    parent = int(streams(wire.rest(), STDOUT))
    _, wire = server.call(b"QUBESRPC test.S work")
    assert int(streams(wire.rest(), STDOUT)) == parent


def test_the_agent_and_the_fork_server_together(place: Place) -> None:
    ForkServer(place, str(place.path / "run" / f"fork.{SELF}"), MARK="of the session")
    place.service("test.S", '#!/bin/sh\necho "$MARK $QREXEC_REMOTE_DOMAIN"\n')
    agent = AgentUnderTest(place)
    messages = agent.run(ME + b":QUBESRPC test.S work")
    assert streams(messages, STDOUT) == b"of the session work\n"


# --- qvm-connect-tcp ----------------------------------------------------------------------------


def test_connect_tcp_makes_a_call_of_each_connection(place: Place) -> None:
    agent = AgentUnderTest(place)
    local = free_port()
    place.start("qvm-connect-tcp", "-f", "-a", str(place.agent_socket), f"{local}:vault:22")
    for number in (514, 515):
        connection = connect_tcp(local)
        message = agent.control.next()
        assert message is not None
        assert message[1][64:128].rstrip(b"\0") == b"vault"
        assert message[1][160:] == b"qubes.ConnectTCP+22\0"
        agent.control.message(CONNECT, struct.pack("<II", 43, number) + message[1][128:160])
        wire = place.vchan_client(42, 43, number)
        wire.shake()
        connection.sendall(b"ping")
        assert wire.next() == (STDIN, b"ping")
        wire.message(STDOUT, b"pong")
        assert connection.recv(10) == b"pong"
        connection.shutdown(socket.SHUT_WR)
        assert wire.next() == (STDIN, b"")
        wire.message(STDOUT, b"more")
        wire.message(STDOUT)
        wire.message(STDERR)
        wire.message(EXIT, bytes(4))
        assert connection.recv(10) == b"more" and connection.recv(10) == b""
        connection.close()
        agent.terminated(43, number)


def connect_tcp(port: int) -> socket.socket:
    import select
    import time

    end = time.monotonic() + DEADLINE
    while True:
        connection = socket.socket()
        connection.settimeout(DEADLINE)
        try:
            connection.connect(("127.0.0.1", port))
        except ConnectionRefusedError:
            connection.close()
            assert time.monotonic() < end
            select.select([], [], [], 0.01)
        else:
            return connection


def test_connect_tcp_closes_what_is_refused(place: Place) -> None:
    local = free_port()
    process = place.start("qvm-connect-tcp", "-f", "-a", "/nowhere", f"{local}::22")
    connection = connect_tcp(local)
    assert connection.recv(10) == b""
    connection.close()
    assert process.poll() is None


@pytest.mark.parametrize("word", ["", "x", "a:b:c:d", "1:vm:0", "0:vm:1", "vm:80x", "vm:70000"])
def test_connect_tcp_usage(place: Place, word: str) -> None:
    process = place.start("qvm-connect-tcp", word)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 2 and b"usage" in err


def test_connect_tcp_goes_into_the_background_when_it_listens(place: Place) -> None:
    local = free_port()
    word = f"{local}:vault:22"
    process = place.start("qvm-connect-tcp", "-a", "/nowhere", word, stdout=subprocess.PIPE)
    # Nothing keeps the output open, so that a shell or a call goes on at once.
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (0, b"", b"")
    connection = socket.create_connection(("127.0.0.1", local), DEADLINE)
    assert connection.recv(10) == b""
    connection.close()
    ours = [pid for pid in os.listdir("/proc") if pid.isdigit() and word in command_line(pid)]
    assert len(ours) == 1
    os.kill(int(ours[0]), signal.SIGKILL)


def command_line(pid: str) -> list[str]:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read().split("\0")
    except OSError:
        return []
