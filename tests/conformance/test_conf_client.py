"""qrexec-client: every mode, with daemons, agents, domains and qubesd played by the test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.adminvm import (
    BIN,
    DEADLINE,
    EXEC_CMDLINE,
    HELLO,
    JUST_EXEC,
    SERVICE_CONNECT,
    Closed,
    Wire,
    exec_body,
    hello,
    message,
    short_directory,
    wait_until,
)
from tests.support.qrexec_daemon import accept, connect, listener, serve_local

STDIN, STDOUT, STDERR, EXIT = 0x190, 0x191, 0x192, 0x193
NIL = "uuid:00000000-0000-0000-0000-000000000000"


def code(status: int) -> bytes:
    """DATA_EXIT_CODE."""
    return message(EXIT, struct.pack("<i", status))


class World:
    """What surrounds one qrexec-client."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sockets = directory / "s"
        self.vchan = directory / "v"
        for path in (self.sockets, self.vchan, directory / "rpc", directory / "conf"):
            path.mkdir()
        self._open: list[socket.socket | Wire] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def client(
        self, *arguments: str, stdin: int = subprocess.PIPE, **more: object
    ) -> subprocess.Popen[bytes]:
        """Start the client."""
        process = subprocess.Popen(
            [str(BIN / "qrexec-client"), f"--socket-dir={self.sockets}", *arguments],
            env={
                "PATH": os.environ["PATH"],
                "VCHAN_SOCKET_DIR": str(self.vchan),
                "VCHAN_DOMAIN": "0",
                "QREXEC_SERVICE_PATH": str(self.directory / "rpc"),
                "QUBES_RPC_CONFIG_PATH": str(self.directory / "conf"),
                "SLUICE_QUBESD_SOCKET": str(self.directory / "qubesd.sock"),
            },
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._processes.append(process)
        return process

    def run(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run the client to its end."""
        process = self.client(*arguments, stdin=subprocess.DEVNULL)
        out, err = process.communicate(timeout=DEADLINE)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def daemon(self, name: str) -> socket.socket:
        """A daemon's socket."""
        sock = listener(self.sockets / f"qrexec.{name}")
        self._open.append(sock)
        return sock

    def accept(self, sock: socket.socket) -> Wire:
        """The next connection, closed at the end."""
        wire = accept(sock)
        self._open.append(wire)
        return wire

    def agent(self, port: int = 513, domain: int = 42) -> Wire:
        """Be the service side in the domain: connect to the client's vchan."""
        path = self.vchan / f"vchan.0.{domain}.{port}.sock"
        wire = wait_until(lambda: _try_connect(path), "the client's vchan server")
        assert isinstance(wire, Wire)
        self._open.append(wire)
        return wire

    def service(self, name: str, script: str) -> None:
        """A service of dom0."""
        path = self.directory / "rpc" / name
        path.write_text(script)
        path.chmod(0o755)

    def close(self) -> None:
        """End everything."""
        for thing in self._open:
            thing.close()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    stream.close()


def _try_connect(path: Path) -> Wire | None:
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
        return connect(path)
    return None


@pytest.fixture
def world() -> Iterator[World]:
    with short_directory() as directory:
        it = World(directory)
        try:
            yield it
        finally:
            it.close()


class Call:
    """A client in mode A, after its data channel is open."""

    def __init__(
        self,
        world: World,
        *options: str,
        stdin: int = subprocess.PIPE,
        kind: int = EXEC_CMDLINE,
        command: str = "user:cmd",
        sent: str = "",
    ) -> None:
        daemon = world.daemon("work")
        self.process = world.client("-d", "work", *options, command, stdin=stdin)
        self.session = world.accept(daemon)
        text = (sent or command).encode() + b"\0"
        assert serve_local(self.session) == (kind, 0, 0, text)
        self.session.send(message(kind, exec_body(42, 513)))
        self.data = world.agent()
        assert struct.unpack("<I", self.data.expect(HELLO)) == (4,)
        self.data.send(hello(4))

    def send(self, *messages: bytes) -> None:
        """Be the service side."""
        self.data.send(b"".join(messages))

    def finish(self) -> tuple[int, bytes, bytes]:
        """The client's end: status, stdout, stderr."""
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out, err


# --- command line -------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-221")
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("user:cmd",),
        ("-d", "work"),
        ("-d", "work", "-e", "-l", "x", "user:cmd"),
        ("-d", "work", "-e", "-c", "ID,src,5", "user:cmd"),
        ("-d", "work", "-l", "x", "-c", "ID,src,5", "user:cmd"),
        ("-d", "work", "-c", "ID", "user:cmd"),
        ("-d", "work", "-c", "ID,src", "user:cmd"),
        ("-d", "work", "-c", "ID,src,x5", "user:cmd"),
        ("-d", "work", "-c", "ID,src,-5", "user:cmd"),
        ("-d", "work", "-c", "ID,src,5x", "user:cmd"),
        ("-d", "work", "-c", "ID,src,2147483648", "user:cmd"),
        ("-d", "work", "-c", "ID,src,08", "user:cmd"),
        ("-d", "work", "-c", "ID,src,0o17", "user:cmd"),
        ("-d", "work", "-c", "ID,src,0x", "user:cmd"),
        ("-d", "work", "-c", "ID,src,0x0x5", "user:cmd"),
        ("-d", "work", "-c", "ID,src,0x+5", "user:cmd"),
        ("-d", "work", "-w", "0x 5", "user:cmd"),
        ("-d", "work", "-w", "5 ", "user:cmd"),
        ("-d", "work", "-w", "5_0", "user:cmd"),
        ("-d", "work", "-c", "I" * 32 + ",src,5", "user:cmd"),
        ("-d", "work", "-c", "ID,dom0,5", "user:cmd"),
        ("-d", "work", "-c", "ID,@adminvm,5", "user:cmd"),
        ("-d", "work", "-c", f"ID,{NIL},5", "user:cmd"),
        ("-d", "work", "-c", "ID,src,0", "user:cmd"),
        ("-d", "work", "-c", "ID,src,5", "-c", "ID,src,5", "user:cmd"),
        ("-d", "dom0", "-c", ",src,5", "QUBESRPC a b"),
        ("-d", "work", "-w", "x", "user:cmd"),
        ("-d", "work", "--nonsense", "user:cmd"),
        ("-d", "work", "-Z", "user:cmd"),
    ],
)
def test_wrong_command_lines(world: World, arguments: tuple[str, ...]) -> None:
    done = world.run(*arguments)
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr


@pytest.mark.spec("WIRE-221")
def test_other_command_lines(world: World) -> None:
    shown = world.run("--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith(b"usage: qrexec-client")
    assert world.run("-d", "work", "-p", "a", "-p", "b", "user:cmd").returncode == 2
    assert world.run("-d", "work", "--use-stdin-socket", "user:cmd").returncode == 2


# --- a command that ends with its caller ----------------------------------------------------------


@pytest.mark.spec("WIRE-255")
@pytest.mark.parametrize(
    ("command", "sent"),
    [
        ("user:cmd", "user:: hangup; cmd"),
        ("user:nogui:cmd", "user:nogui:: hangup; cmd"),
        ("user:QUBESRPC a.B dom0", "user:QUBESRPC a.B dom0"),
        ("user:nogui:QUBESRPC a.B dom0", "user:nogui:QUBESRPC a.B dom0"),
        ("nocolon", "nocolon"),
    ],
)
def test_hangup_marks_shell_commands(world: World, command: str, sent: str) -> None:
    call = Call(world, "--hangup", command=command, sent=sent)
    call.send(message(STDOUT), message(STDERR), code(0))
    assert call.finish() == (0, b"", b"")


@pytest.mark.spec("WIRE-255")
def test_with_hangup_output_that_nobody_takes_ends_it(world: World) -> None:
    call = Call(world, "--hangup", sent="user:: hangup; cmd")
    assert call.process.stdout is not None
    call.send(message(STDOUT, b"one"))
    assert call.process.stdout.read(3) == b"one"
    call.process.stdout.close()
    call.send(message(STDERR, b"x"))
    assert call.process.stderr is not None
    assert call.process.stderr.read(1) == b"x"  # nothing of its output was lost so far
    call.send(message(STDOUT, b"two"))
    assert call.process.wait(DEADLINE) == -signal.SIGPIPE


@pytest.mark.spec("WIRE-255", "WIRE-190")
def test_without_hangup_it_goes_on(world: World) -> None:
    call = Call(world)
    assert call.process.stdout is not None
    call.process.stdout.close()
    call.process.stdout = None
    call.send(message(STDOUT, b"two"), message(STDOUT), message(STDERR), code(7))
    assert call.process.wait(DEADLINE) == 7


@pytest.mark.spec("WIRE-222")
@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (("user:cmd", "more", "-d", "work", "-e"), JUST_EXEC, b"user:cmd\0"),
        (("-edwork", "user:cmd"), JUST_EXEC, b"user:cmd\0"),
        (("-d", "work", "--", "-e", "-d"), EXEC_CMDLINE, b"-e\0"),
        (("-d", "work", "--no-ex", "DEFAULT:a b  c"), EXEC_CMDLINE, b"DEFAULT:a b  c\0"),
    ],
)
def test_where_options_may_stand(
    world: World, arguments: tuple[str, ...], kind: int, text: bytes
) -> None:
    daemon = world.daemon("work")
    world.client(*arguments)
    assert serve_local(world.accept(daemon)) == (kind, 0, 0, text)


@pytest.mark.spec("WIRE-225")
def test_the_time_for_the_domain_to_connect_is_ten_seconds() -> None:
    from sluice.adminvm.client_options import parse_arguments

    assert parse_arguments(["-d", "work", "user:cmd"]).timeout == 10
    assert parse_arguments(["-d", "work", "-w", "0x1F", "user:cmd"]).timeout == 31
    assert parse_arguments(["-d", "work", "-w", "017", "user:cmd"]).timeout == 15


# --- mode A -------------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-222", "WIRE-223", "WIRE-226")
def test_a_command_in_a_domain(world: World) -> None:
    call = Call(world)
    assert call.process.stdin is not None
    call.process.stdin.write(b"in")
    call.process.stdin.close()
    call.process.stdin = None
    assert call.data.receive() == (STDIN, b"in")
    assert call.data.receive() == (STDIN, b"")
    call.send(message(STDOUT, b"out"), message(STDERR, b"err"))
    call.send(message(STDOUT), message(STDERR), code(42))
    assert call.finish() == (42, b"out", b"err")


@pytest.mark.spec("WIRE-223")
def test_the_replied_domain_and_port_name_the_channel(world: World) -> None:
    daemon = world.daemon("work")
    process = world.client("-d", "work", "user:cmd")
    session = world.accept(daemon)
    serve_local(session)
    session.send(message(EXEC_CMDLINE, exec_body(77, 600)))
    data = world.agent(600, 77)
    data.expect(HELLO)
    data.send(hello(3) + message(STDOUT) + code(0))
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 0


@pytest.mark.spec("WIRE-222", "WIRE-228")
@pytest.mark.parametrize("status", [0, 127])
def test_just_execute(world: World, status: int) -> None:
    call = Call(world, "-e", kind=JUST_EXEC)
    call.send(code(status))
    assert call.data.receive() == (STDIN, b"")
    assert call.process.poll() is None
    call.data.close()
    assert call.finish()[0] == status


@pytest.mark.spec("WIRE-224")
def test_a_daemon_that_fails(world: World) -> None:
    assert world.run("-d", "nobody", "user:cmd").returncode == 125
    replies = [
        b"",
        message(JUST_EXEC, exec_body(42, 513)),
        message(EXEC_CMDLINE, exec_body(42, 513, b"x")),
        message(EXEC_CMDLINE, b"abc"),
    ]
    daemon = world.daemon("work")
    for reply in replies:
        process = world.client("-d", "work", "user:cmd")
        session = world.accept(daemon)
        serve_local(session)
        session.send(reply)
        session.close()
        process.communicate(timeout=DEADLINE)
        assert process.returncode == 125, reply
    for first in (hello(2), message(HELLO, bytes(5)), message(EXEC_CMDLINE, bytes(4)), b""):
        process = world.client("-d", "work", "-E", "user:cmd")
        session = world.accept(daemon)
        session.send(first)
        session.sock.shutdown(socket.SHUT_WR)
        assert session.at_end(5), first  # it does not answer
        process.communicate(timeout=DEADLINE)
        assert process.returncode == 125, first


@pytest.mark.alone
@pytest.mark.spec("WIRE-225")
def test_a_domain_that_does_not_connect(world: World) -> None:
    daemon = world.daemon("work")
    began = time.monotonic()
    process = world.client("-d", "work", "-w", "1", "-E", "user:cmd")
    session = world.accept(daemon)
    serve_local(session)
    session.send(message(EXEC_CMDLINE, exec_body(42, 513)))
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 125
    assert 0.9 < time.monotonic() - began < 10


@pytest.mark.spec("WIRE-225")
def test_a_domain_that_has_the_channel_and_does_not_greet(world: World) -> None:
    """The daemon hands over the ends of two pipes (20), and nothing comes on them."""
    daemon = world.daemon("work")
    process = world.client("-d", "work", "-w", "1", "-E", "user:cmd")
    session = world.accept(daemon)
    serve_local(session)
    pipes = [*os.pipe(), *os.pipe()]
    try:
        reply = message(EXEC_CMDLINE, exec_body(42, 1024))
        socket.send_fds(session.sock, [reply], [pipes[0], pipes[3]])
        said = process.communicate(timeout=DEADLINE)[1]
    finally:
        for fd in pipes:
            os.close(fd)
    assert process.returncode == 125
    assert said == b"qrexec-client: data channel: no handshake in time\n"


@pytest.mark.spec("WIRE-225")
def test_no_limit_to_the_time_for_the_domain_to_connect(world: World) -> None:
    daemon = world.daemon("work")
    processes = {}
    for seconds, port in (("0", 513), ("1", 514)):
        processes[seconds] = world.client("-d", "work", "-w", seconds, "user:cmd")
        session = world.accept(daemon)
        serve_local(session)
        session.send(message(EXEC_CMDLINE, exec_body(42, port)))
    assert processes["1"].wait(DEADLINE) == 125
    data = world.agent(513)
    data.send(hello(4) + message(STDOUT) + code(3))
    assert processes["0"].wait(DEADLINE) == 3


@pytest.mark.spec("WIRE-226")
@pytest.mark.parametrize(
    ("options", "ending", "status"),
    [
        ((), message(STDOUT) + code(42), 42),
        (("-E",), message(STDOUT) + code(42), 0),
        (("--no-exit-code",), message(STDOUT) + code(42), 0),
        ((), message(STDOUT) + code(259), 3),
        ((), message(STDOUT, b"x"), 255),
        (("-E",), message(STDOUT, b"x"), 0),
        ((), message(0x1234), 1),
        (("-E",), message(0x1234), 1),
    ],
)
def test_exit_status(world: World, options: tuple[str, ...], ending: bytes, status: int) -> None:
    call = Call(world, *options, stdin=subprocess.DEVNULL)
    call.send(ending)
    call.data.sock.shutdown(socket.SHUT_WR)
    assert call.finish()[0] == status


@pytest.mark.spec("WIRE-224")
@pytest.mark.parametrize("answer", [hello(1), b"", message(STDOUT, b"x")])
def test_a_failed_data_handshake(world: World, answer: bytes) -> None:
    daemon = world.daemon("work")
    process = world.client("-d", "work", "-E", "user:cmd")
    session = world.accept(daemon)
    serve_local(session)
    session.send(message(EXEC_CMDLINE, exec_body(42, 513)))
    data = world.agent()
    data.expect(HELLO)
    data.send(answer)
    data.sock.shutdown(socket.SHUT_WR)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 125


@pytest.mark.spec("WIRE-227")
@pytest.mark.parametrize(("remote", "local", "status"), [(0, 0, 0), (0, 7, 7), (5, 7, 5)])
def test_a_local_command(world: World, remote: int, local: int, status: int) -> None:
    command = f'read x; echo "got $x from $QREXEC_REMOTE_DOMAIN"; exit {local}'
    call = Call(world, "-l", command)
    call.send(message(STDOUT, b"hello\n"), message(STDOUT))
    assert call.data.receive() == (STDIN, b"got hello from work\n")
    assert call.data.receive() == (STDIN, b"")
    call.send(code(remote))
    assert call.finish()[:2] == (status, b"")


@pytest.mark.spec("WIRE-227")
def test_a_local_service_that_cannot_run(world: World) -> None:
    daemon = world.daemon("work")
    for local, status in (("QUBESRPC no.Such work", 127), ("QUBESRPC", 125), ("QUBESRPCx", 125)):
        process = world.client("-d", "work", "-l", local, "user:cmd")
        session = world.accept(daemon)
        serve_local(session)
        session.send(message(EXEC_CMDLINE, exec_body(42, 513)))
        process.communicate(timeout=DEADLINE)
        assert process.returncode == status, local


@pytest.mark.spec("WIRE-227")
def test_a_local_service(world: World) -> None:
    world.service("test.Local", '#!/bin/sh\necho "$QREXEC_REMOTE_DOMAIN $1"; cat >&2\n')
    call = Call(world, "-l", "QUBESRPC test.Local+arg work")
    assert call.data.receive() == (STDIN, b"work arg\n")
    call.send(message(STDOUT, b"for stderr"), message(STDOUT), code(0))
    assert call.finish() == (0, b"", b"for stderr")


@pytest.mark.spec("WIRE-222")
@pytest.mark.parametrize(
    ("options", "out", "err"),
    [
        ((), b"a\x1bb\n", b"c\x1bd"),
        (("-t",), b"a_b\n", b"c\x1bd"),
        (("-T",), b"a\x1bb\n", b"c_d"),
        (("-tT",), b"a_b\n", b"c_d"),
    ],
)
def test_prefix_and_filters(world: World, options: tuple[str, ...], out: bytes, err: bytes) -> None:
    call = Call(world, "-p", "prefix", *options, stdin=subprocess.DEVNULL)
    assert call.data.receive() == (STDIN, b"prefix")
    call.send(message(STDOUT, b"a\x1bb\n"), message(STDERR, b"c\x1bd"), message(STDOUT), code(0))
    assert call.finish() == (0, out, err)


@pytest.mark.spec("WIRE-222")
def test_stdin_as_a_socket(world: World) -> None:
    ours, theirs = socket.socketpair()
    wire = Wire(ours)
    call = Call(world, "--use-stdin-socket", stdin=theirs.fileno())
    theirs.close()
    wire.send(b"to the service")
    assert call.data.receive() == (STDIN, b"to the service")
    call.send(message(STDOUT, b"from it"), message(STDOUT))
    assert wire.exactly(7) == b"from it"
    assert wire.at_end()
    wire.send(b"more")
    assert call.data.receive() == (STDIN, b"more")
    call.send(code(0))
    assert call.finish()[:2] == (0, b"")
    wire.close()


@pytest.mark.spec("WIRE-234")
def test_kill_at_the_end(world: World) -> None:
    qubesd = listener(world.directory / "qubesd.sock")
    world._open.append(qubesd)
    call = Call(world, "-EWk", stdin=subprocess.DEVNULL)
    call.send(message(STDOUT), code(3))
    conn = world.accept(qubesd)
    assert conn.exactly(30) == b"admin.vm.Kill+ dom0 name work\0"
    assert conn.at_end()
    conn.send(b"2\0QubesVMNotStartedError\0\0\0")
    conn.close()
    assert call.finish()[0] == 0


@pytest.mark.spec("WIRE-234")
def test_kill_after_a_failed_connection(world: World) -> None:
    qubesd = listener(world.directory / "qubesd.sock")
    world._open.append(qubesd)
    process = world.client("-k", "-d", "nobody", "user:cmd")
    conn = world.accept(qubesd)
    assert conn.exactly(32) == b"admin.vm.Kill+ dom0 name nobody\0"
    conn.close()
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 125


@pytest.mark.spec("WIRE-234")
@pytest.mark.parametrize("mode", ["fatal error", "B", "C", "D"])
def test_no_kill_after_a_fatal_error_and_in_other_modes(world: World, mode: str) -> None:
    qubesd = listener(world.directory / "qubesd.sock")
    world._open.append(qubesd)
    if mode == "fatal error":
        call = Call(world, "-k", stdin=subprocess.DEVNULL)
        call.send(message(0x1234))
        assert call.finish()[0] == 1
    elif mode == "B":
        assert world.run("-k", "-d", "nobody", "-c", "ID,src,41", "user:x").returncode == 137
    elif mode == "C":
        assert world.run("-k", "-d", "dom0", "-c", "ID,src,41", "QUBESRPC a b").returncode == 125
    else:
        assert world.run("-k", "-d", "dom0", "DEFAULT:QUBESRPC no.Such b").returncode == 127
    qubesd.settimeout(0.1)
    with pytest.raises(TimeoutError):
        qubesd.accept()


@pytest.mark.spec("WIRE-222")
def test_the_session_stays_open_for_the_whole_call(world: World) -> None:
    call = Call(world, stdin=subprocess.DEVNULL)
    assert call.session.silent()
    call.send(message(STDOUT), code(0))
    call.finish()
    assert call.session.at_end()


# --- mode B -------------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-229")
def test_a_call_is_connected_to_a_domain(world: World) -> None:
    target, source = world.daemon("work"), world.daemon("41")
    process = world.client("-d", "work", "-c", "SOCKET7,src,41", "user:QUBESRPC a+ src")
    session = world.accept(target)
    assert serve_local(session) == (EXEC_CMDLINE, 41, 0, b"user:QUBESRPC a+ src\0")
    session.send(message(EXEC_CMDLINE, exec_body(42, 515)))
    own = world.accept(source)
    assert serve_local(own) == (SERVICE_CONNECT, 42, 515, b"SOCKET7".ljust(32, b"\0"))
    assert process.wait(DEADLINE) == 0
    assert session.at_end()


@pytest.mark.spec("WIRE-230")
def test_a_call_that_cannot_be_connected(world: World) -> None:
    assert world.run("-d", "nobody", "-c", "ID,src,41", "user:x").returncode == 137
    assert world.run("-d", "@dispvm:x", "-c", "ID,src,41", "user:x").returncode == 137
    target = world.daemon("work")
    process = world.client("-d", "work", "-c", "ID,src,41", "user:x")
    session = world.accept(target)
    serve_local(session)
    session.send(message(EXEC_CMDLINE, exec_body(42, 515)))
    assert process.wait(DEADLINE) == 137  # the source's daemon is not there


@pytest.mark.spec("WIRE-230")
def test_waiting_for_the_end_of_a_call(world: World) -> None:
    target, source = world.daemon("work"), world.daemon("41")
    process = world.client("-W", "-d", "work", "-c", "ID,src,41", "user:x")
    session = world.accept(target)
    serve_local(session)
    session.send(message(EXEC_CMDLINE, exec_body(42, 515)))
    serve_local(world.accept(source))
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    session.close()
    assert process.wait(DEADLINE) == 0


# --- mode C -------------------------------------------------------------------------------------


def dom0_call(
    world: World, *options: str, script: str | None
) -> tuple[subprocess.Popen[bytes], Wire]:
    """A client in mode C, and the caller's end of its data channel, not yet shaken hands."""
    if script is not None:
        world.service("test.Svc", script)
    source = world.daemon("41")
    text = "QUBESRPC test.Svc+a src name dom0"
    process = world.client(*options, "-d", "dom0", "-c", "ID,src,41", text)
    session = world.accept(source)
    assert serve_local(session) == (SERVICE_CONNECT, 0, 0, b"ID".ljust(32, b"\0"))
    listening = listener(world.vchan / "vchan.41.0.514.sock")
    session.send(message(SERVICE_CONNECT, exec_body(41, 514)))
    data = world.accept(listening)
    listening.close()
    return process, data


@pytest.mark.spec("WIRE-231")
@pytest.mark.parametrize(
    ("options", "script", "status"),
    [
        ((), '#!/bin/sh\necho "$QREXEC_REMOTE_DOMAIN $1"; exit 9\n', 9),
        (("-E",), "#!/bin/sh\nexit 9\n", 0),
        ((), None, 127),
        (("-E",), None, 127),
    ],
)
def test_a_call_is_answered_by_dom0(
    world: World, options: tuple[str, ...], script: str | None, status: int
) -> None:
    process, data = dom0_call(world, *options, script=script)
    assert data.silent()
    data.send(hello(4))
    data.expect(HELLO)
    messages = []
    with contextlib.suppress(Closed):
        while True:
            messages.append(data.receive())
    assert messages[0] == (STDERR, b"")
    seen = 9 if script is not None else 127
    assert messages[-2:] == [(STDOUT, b""), (EXIT, struct.pack("<i", seen))]
    if script is not None and not options:
        assert (STDOUT, b"src a\n") in messages
    assert process.wait(DEADLINE) == status


@pytest.mark.spec("WIRE-231")
@pytest.mark.parametrize("options", [(), ("-E",)])
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (hello(1), 125),
        (message(STDIN, b"x"), 125),
        (b"", 125),
        (hello(4) + message(0x1234), 1),
        (hello(4) + struct.pack("<II", STDIN, 65537), 1),
    ],
)
def test_a_caller_that_breaks_the_protocol(
    world: World, options: tuple[str, ...], sent: bytes, status: int
) -> None:
    """A handshake that fails is a failed connection (4.4), what comes later a fatal error."""
    process, data = dom0_call(world, *options, script="#!/bin/sh\ncat\n")
    data.send(sent)
    data.sock.shutdown(socket.SHUT_WR)
    assert process.wait(DEADLINE) == status


@pytest.mark.spec("WIRE-231")
def test_a_caller_that_does_not_appear(world: World) -> None:
    world.service("test.Svc", "#!/bin/sh\nsleep 60\n")
    source = world.daemon("41")
    text = "QUBESRPC test.Svc+a src name dom0"
    process = world.client("-w", "1", "-E", "-d", "dom0", "-c", "ID,src,41", text)
    session = world.accept(source)
    serve_local(session)
    session.send(message(SERVICE_CONNECT, exec_body(41, 514)))
    assert process.wait(DEADLINE) == 125


# --- mode D -------------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-232")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("QUBESRPC test.Svc dom0",), 125),
        (("user:QUBESRPC test.Svc dom0",), 125),
        (("DEFAULT:echo hi",), 125),
        (("DEFAULT:QUBESRPC no.Such dom0",), 127),
        (("DEFAULT:QUBESRPC test.Plain dom0",), 125),
        (("-l", "x", "DEFAULT:QUBESRPC test.Svc dom0"), 125),
        (("DEFAULT:QUBESRPC test.Svc dom0",), 6),
        (("-eEk", "-t", "DEFAULT:QUBESRPC test.Svc dom0"), 6),
    ],
)
def test_a_service_in_our_place(world: World, arguments: tuple[str, ...], status: int) -> None:
    world.service("test.Svc", "#!/bin/sh\ncat; exit 6\n")
    world.service("test.Plain", "text")
    (world.directory / "rpc" / "test.Plain").chmod(0o644)
    process = world.client("-d", "dom0", *arguments)
    out, err = process.communicate(b"in \x1b", timeout=DEADLINE)
    assert process.returncode == status
    if status == 6:
        assert (out, err) == (b"in \x1b", b"")


@pytest.mark.spec("WIRE-232")
def test_a_service_in_our_place_dies_of_a_broken_pipe(world: World) -> None:
    """The interpreter ignores SIGPIPE; what takes its place must not inherit that."""
    world.service("test.Svc", "#!/bin/sh\ngrep SigIgn /proc/self/status\n")
    done = world.run("-d", "dom0", "DEFAULT:QUBESRPC test.Svc dom0")
    assert int(done.stdout.split()[1], 16) & 1 << 12 == 0


@pytest.mark.spec("WIRE-233")
def test_the_requested_target_in_mode_d(world: World) -> None:
    world.service(
        "test.Svc",
        "#!/bin/sh\n"
        'echo "$QREXEC_REQUESTED_TARGET_TYPE|$QREXEC_REQUESTED_TARGET|'
        '$QREXEC_REQUESTED_TARGET_KEYWORD|$QREXEC_REMOTE_DOMAIN"\n',
    )
    cases = {"keyword adminvm": b"keyword||adminvm|work\n", "name dom0": b"name|dom0||work\n"}
    for requested, expected in cases.items():
        done = world.run("-d", NIL, f"DEFAULT:QUBESRPC test.Svc work {requested}")
        assert done.stdout == expected


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
@pytest.mark.parametrize("program", ["qrexec-client -d work x", "qrexec-daemon -D -u x 42 src"])
def test_a_closed_descriptor_is_refused(program: str, closed: str) -> None:
    """A program without 0, 1 or 2 would give these numbers to something else."""
    name = program.partition(" ")[0]
    script = f"QREXEC_STARTUP_TIMEOUT=1 exec {BIN}/{program} --socket-dir=/tmp {closed}"
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, timeout=DEADLINE)
    if name == "qrexec-daemon" and closed == "<&-":
        assert done.returncode == 3  # it puts /dev/null there itself (6.2)
        return
    assert done.returncode == 125
    if closed != "2>&-":
        assert done.stderr == f"{name}: descriptor 0, 1 or 2 is closed\n".encode()


@pytest.mark.spec("WIRE-232")
@pytest.mark.parametrize(("prefix", "waits"), [("", True), ("nogui:", False)])
def test_nogui_in_dom0_skips_waiting_only(world: World, prefix: str, waits: bool) -> None:
    mark = world.directory / "waited"
    world.service("qubes.WaitForSession", f"#!/bin/sh\n: >{mark}\n")
    world.service("test.Svc", "#!/bin/sh\nexit 6\n")
    config = world.directory / "conf" / "test.Svc"
    config.write_text("wait-for-session = 1\n")
    text = f"DEFAULT:{prefix}QUBESRPC test.Svc dom0"
    assert world.run("-d", "dom0", text).returncode == 6
    assert mark.exists() == waits
    # Other mistakes in the configuration count in both cases.
    config.write_text("force-user = oops\n")
    assert world.run("-d", "dom0", text).returncode == 125


# --- what it says -------------------------------------------------------------------------------


def test_what_is_said_of_a_daemon_that_cannot_be_asked(world: World) -> None:
    sockets = os.fsencode(world.sockets)
    none = b"qrexec-client: nobody: does not run, or not with a daemon here: "
    none += sockets + b"/qrexec.nobody: No such file or directory\n"
    assert world.run("-d", "nobody", "user:cmd").stderr == none
    daemon = world.daemon("work")
    for options in ((), ("-c", "ID,src,41")):
        process = world.client("-d", "work", *options, "user:cmd")
        session = world.accept(daemon)
        serve_local(session)
        session.close()
        said = process.communicate(timeout=DEADLINE)[1]
        text = b"qrexec-client: work: its daemon closed the connection; its log says why\n"
        assert said == text


def test_a_place_for_vchans_that_is_missing(world: World) -> None:
    world.vchan.rmdir()
    daemon = world.daemon("work")
    process = world.client("-d", "work", "-E", "user:cmd")
    session = world.accept(daemon)
    serve_local(session)
    session.send(message(EXEC_CMDLINE, exec_body(42, 513)))
    said = process.communicate(timeout=DEADLINE)[1]
    assert process.returncode == 125
    path = os.fsencode(world.vchan) + b"/vchan.0.42.513.sock"
    assert said == b"qrexec-client: " + path + b": No such file or directory\n"


@pytest.mark.parametrize(
    ("ending", "status", "text"),
    [
        (code(127), 127, b"status 127: work has no service test.S+a"),
        (code(125), 125, b"status 125: work could not start test.S+a; its log says why"),
        (
            message(STDERR, b"") + code(127),
            127,
            b"status 127: work has no service test.S+a",
        ),
        (message(STDERR, b"sh: no\n") + code(127), 127, b""),
        (message(STDOUT, b"x") + code(125), 125, b""),
        (code(126), 126, b""),
        (b"", 255, b"the connection was lost before the exit status of test.S+a came"),
    ],
)
def test_what_is_said_of_a_call_that_fails_without_a_word(
    world: World, ending: bytes, status: int, text: bytes
) -> None:
    daemon = world.daemon("work")
    process = world.client("-d", "work", "user:QUBESRPC test.S+a dom0", stdin=subprocess.DEVNULL)
    session = world.accept(daemon)
    serve_local(session)
    session.send(message(EXEC_CMDLINE, exec_body(42, 513)))
    data = world.agent()
    data.send(hello(4) + message(STDOUT) * (b"x" not in ending) + ending)
    data.sock.shutdown(socket.SHUT_WR)
    said = process.communicate(timeout=DEADLINE)[1]
    assert process.returncode == status
    own = b"".join(line for line in said.splitlines(True) if line.startswith(b"qrexec-client"))
    assert own == (b"qrexec-client: " + text + b"\n" if text else b"")


def test_a_stderr_that_takes_nothing_changes_no_status(world: World) -> None:
    script = f"exec {BIN / 'qrexec-client'} --socket-dir={world.sockets} -d nobody x 2>/dev/full"
    assert subprocess.run(["/bin/sh", "-c", script], timeout=DEADLINE).returncode == 125
