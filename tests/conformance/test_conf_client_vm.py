"""WIRE-204 to 220: qrexec-client-vm, with the tester as agent and as the call's other side."""

from __future__ import annotations

import array
import contextlib
import os
import pty
import re
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest
from tests.support.agent import (
    DEADLINE,
    EXIT,
    STDERR,
    STDIN,
    STDOUT,
    TRIGGER4,
    Place,
    Wire,
    a_place,
    send_fds,
    until,
)


class Caller:
    """One run of qrexec-client-vm."""

    def __init__(
        self,
        place: Place,
        *arguments: str,
        stdin: object = subprocess.PIPE,
        stdout: object = subprocess.PIPE,
        stderr: object = subprocess.PIPE,
        extra: dict[str, str] | None = None,
        listen: bool = True,
    ) -> None:
        self.place = place
        self.listener = place.listen("run/agent") if listen else None
        self.process = place.start(
            "qrexec-client-vm",
            "-a",
            str(place.agent_socket),
            *arguments,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            extra=extra,
        )
        self.trigger: Wire
        self.wire: Wire

    def accept(self) -> tuple[int, bytes]:
        """Take the request."""
        assert self.listener is not None
        connection = self.listener.accept()[0]
        connection.settimeout(DEADLINE)
        self.place._closers.append(connection.close)
        self.trigger = Wire(connection)
        message = self.trigger.next()
        assert message is not None
        return message

    def allow(self, *, handshake: bool = True) -> Wire:
        """Allow the call and join as the vchan client."""
        self.accept()
        self.trigger.send(struct.pack("<II", 43, 700))
        self.wire = self.place.vchan_client(42, 43, 700)
        if handshake:
            self.wire.shake()
        return self.wire

    def finish(self, status: int = 0, output: bytes = b"") -> None:
        """End the call from the service's side."""
        if output:
            self.wire.message(STDOUT, output)
        self.wire.message(STDOUT)
        self.wire.message(STDERR)
        self.wire.message(EXIT, struct.pack("<i", status))

    def end(self) -> tuple[int, bytes, bytes]:
        """Wait for the end; returns status, stdout and stderr."""
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out or b"", err or b""


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


def run(place: Place, *arguments: str) -> tuple[int, bytes, bytes]:
    """Run to the end without an agent."""
    process = place.start("qrexec-client-vm", *arguments, stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=DEADLINE)
    return process.returncode, out, err


@pytest.mark.spec("WIRE-204")
@pytest.mark.parametrize(
    "arguments",
    [[], ["vm"], ["--bogus", "vm", "s"], ["-b", "1", "vm", "s"], ["-x", "vm", "s"], ["-p"]],
)
def test_usage_errors(place: Place, arguments: list[str]) -> None:
    status, out, err = run(place, *arguments)
    assert status == 2 and out == b"" and b"usage" in err


@pytest.mark.spec("WIRE-204")
@pytest.mark.parametrize("option", ["-h", "--help", "--he"])
def test_help(place: Place, option: str) -> None:
    status, out, err = run(place, option)
    assert status == 0 and b"usage" in out and err == b""


@pytest.mark.spec("WIRE-205")
@pytest.mark.parametrize(
    "size",
    [
        *("abc", "1k", "99999999999", "-1", "", "08", "0x", "0x+5", "0o17", "1 ", "1_0", "0x1_0"),
        *("2147483648", "0x80000000", "١", "9" * 5000),
    ],
)
def test_bad_buffer_sizes(place: Place, size: str) -> None:
    status, out, err = run(place, f"--buffer-size={size}", "vm", "s")
    assert (status, out) == (1, b"") and b"invalid buffer size" in err


@pytest.mark.parametrize("size", ["0", "65536", "0x10000", "0200000", "2147483647"])
def test_good_buffer_sizes(place: Place, size: str) -> None:
    caller = Caller(place, "--buffer-size", size, "vm", "s")
    caller.accept()
    caller.trigger.close()
    assert caller.end()[0] == 126


@pytest.mark.spec("WIRE-206")
@pytest.mark.parametrize(
    "arguments",
    [
        ["-p", "a", "--prefix-data", "b", "vm", "s"],
        ["-s", "a", "--source-qube=b", "vm", "s"],
        ["--use-stdin-socket", "vm", "s", "/bin/true"],
        ["--use-stdin-socket", "vm", "s"],
        ["--use-stdin-socket", "--use-stdin-socket", "vm", "s"],
    ],
)
def test_options_that_may_not_be(place: Place, arguments: list[str]) -> None:
    status, out, err = run(place, *arguments)
    assert status == 2 and out == b"" and err


@pytest.mark.spec("WIRE-207")
def test_options_after_the_target_are_arguments(place: Place) -> None:
    caller = Caller(place, "vm", "-t")
    assert caller.accept()[1][160:] == b"-t\0"
    caller.trigger.close()
    assert caller.end()[0] == 126


@pytest.mark.spec("WIRE-207")
def test_two_dashes_end_the_options(place: Place) -> None:
    caller = Caller(place, "--", "-vm", "s")
    assert caller.accept()[1][64:68] == b"-vm\0"
    caller.trigger.close()
    assert caller.end()[0] == 126


@pytest.mark.spec("WIRE-208")
def test_no_agent(place: Place) -> None:
    caller = Caller(place, "vm", "s", listen=False)
    status, out, err = caller.end()
    assert status == 1 and out == b"" and str(place.agent_socket).encode() in err


@pytest.mark.spec("WIRE-209")
def test_the_request(place: Place) -> None:
    caller = Caller(place, "-s", "src", "$disp$vm", "test.S+$x")
    assert caller.accept() == (
        TRIGGER4,
        b"src".ljust(64, b"\0")
        + b"@disp@vm".ljust(64, b"\0")
        + b"SOCKET".ljust(32, b"\0")
        + b"test.S+$x\0",
    )
    assert caller.trigger.silent()
    caller.trigger.close()
    caller.end()


@pytest.mark.spec("WIRE-209")
def test_long_names_are_cut(place: Place) -> None:
    caller = Caller(place, "-s", "a" * 70, "b" * 70, "s")
    body = caller.accept()[1]
    assert body[:64] == b"a" * 63 + b"\0"
    assert body[64:128] == b"b" * 63 + b"\0"
    caller.trigger.close()
    caller.end()


@pytest.mark.spec("WIRE-210")
def test_refusal(place: Place) -> None:
    witness = place.path / "run" / "witness"
    caller = Caller(place, "vm", "s", "/bin/touch", str(witness))
    caller.accept()
    caller.trigger.close()
    assert caller.end() == (126, b"", b"Request refused\n")
    assert not witness.exists()


@pytest.mark.spec("WIRE-211")
def test_a_short_answer(place: Place) -> None:
    caller = Caller(place, "vm", "s")
    caller.accept()
    caller.trigger.send(b"abc")
    caller.trigger.close()
    status, _, err = caller.end()
    assert status == 1 and b"3 bytes" in err


def test_the_answer_may_come_in_pieces(place: Place) -> None:
    caller = Caller(place, "vm", "s")
    caller.accept()
    answer = struct.pack("<II", 43, 700)
    for byte in answer[:7]:
        caller.trigger.send(bytes([byte]))
    assert not (place.path / "vchan" / "vchan.42.43.700.sock").exists()
    caller.trigger.send(answer[7:])
    caller.wire = place.vchan_client(42, 43, 700)
    caller.wire.shake()
    caller.finish()
    assert caller.end()[0] == 0


@pytest.mark.spec("WIRE-212", "WIRE-214")
def test_it_says_hello_first_and_keeps_the_trigger_connection(place: Place) -> None:
    caller = Caller(place, "vm", "s")
    wire = caller.allow(handshake=False)
    wire.expect_hello()
    assert caller.trigger.silent()
    wire.hello()
    assert caller.process.stdin is not None
    caller.process.stdin.write(b"data")
    caller.process.stdin.flush()
    assert wire.next() == (STDIN, b"data")
    assert caller.trigger.silent()
    caller.finish(0, b"out")
    assert caller.trigger.ended()
    assert caller.end() == (0, b"out", b"")


@pytest.mark.spec("WIRE-213")
@pytest.mark.parametrize("greeting", [b"", struct.pack("<III", 0x300, 4, 1), b"\x00\x03\x00\x00"])
def test_a_failed_handshake(place: Place, greeting: bytes) -> None:
    caller = Caller(place, "vm", "s")
    wire = caller.allow(handshake=False)
    wire.send(greeting)
    wire.close()
    assert caller.end()[0] == 1


@pytest.mark.spec("WIRE-215")
@pytest.mark.parametrize(("remote", "status"), [(0, 0), (42, 42), (259, 3), (255, 255), (125, 125)])
def test_the_exit_status_is_the_remote_code(place: Place, remote: int, status: int) -> None:
    caller = Caller(place, "vm", "s")
    caller.allow()
    caller.finish(remote, b"x")
    assert caller.end() == (status, b"x", b"")


@pytest.mark.spec("WIRE-215")
@pytest.mark.parametrize(
    ("remote", "local", "status"),
    [(0, "exit 5", 5), (9, "exit 5", 9), (0, "exit 0", 0), (0, "kill -9 $$", 137)],
)
def test_the_exit_status_with_a_program(place: Place, remote: int, local: str, status: int) -> None:
    caller = Caller(place, "vm", "s", "/bin/sh", "-c", local)
    caller.allow()
    caller.finish(remote)
    assert caller.end()[0] == status


@pytest.mark.spec("WIRE-202")
def test_a_lost_channel(place: Place) -> None:
    caller = Caller(place, "vm", "s")
    wire = caller.allow()
    wire.message(STDOUT, b"some")
    wire.close()
    lost = b"qrexec-client-vm: the connection was lost before the exit status of s came\n"
    assert caller.end() == (255, b"some", lost)


@pytest.mark.parametrize(
    ("remote", "text"),
    [
        (127, b"status 127: the target has no service test.S+a\\x1b"),
        (125, b"status 125: the target could not start test.S+a\\x1b; its log says why"),
        (126, b""),
        (255, b""),
        (1, b""),
    ],
)
@pytest.mark.parametrize("program", [[], ["/bin/cat"]])
def test_a_failed_start_is_told_in_one_line(
    place: Place, remote: int, text: bytes, program: list[str]
) -> None:
    caller = Caller(place, "vm", "test.S+a\x1b", *program)
    caller.allow()
    caller.finish(remote)
    line = b"qrexec-client-vm: " + text + b"\n" if text else b""
    assert caller.end() == (remote, b"", line)


def test_behind_a_proxy_it_may_be_the_service_that_is_missing(place: Place) -> None:
    caller = Caller(place, "vm", "qrexec-proxy+chain+vault+test.S")
    caller.allow()
    caller.finish(127)
    assert caller.end()[2] == (
        b"qrexec-client-vm: status 127: the target has no service qrexec-proxy+chain+vault+test.S,"
        b" or what the proxy called has not\n"
    )


@pytest.mark.parametrize("remote", [125, 127])
@pytest.mark.parametrize("kind", [STDOUT, STDERR])
def test_a_service_that_spoke_was_there(place: Place, remote: int, kind: int) -> None:
    """Then the status is its own, and what it wrote is all that is shown."""
    caller = Caller(place, "vm", "s")
    caller.allow().message(kind, b"x")
    caller.finish(remote)
    out, err = (b"x", b"") if kind == STDOUT else (b"", b"x")
    assert caller.end() == (remote, out, err)


def test_the_program_talks_to_the_service(place: Place) -> None:
    caller = Caller(place, "vm", "s", "/bin/sh", "-c", "read a; echo got $a; cat >/dev/null")
    wire = caller.allow()
    wire.message(STDOUT, b"question\n")
    assert wire.next() == (STDIN, b"got question\n")
    caller.finish()
    assert caller.end()[0] == 0


@pytest.mark.spec("WIRE-216")
@pytest.mark.parametrize("stderr_too", [False, True])
def test_the_programs_environment(place: Place, stderr_too: bool) -> None:
    script = (
        'echo "to stdout" >&$SAVED_FD_1; cat <&$SAVED_FD_0 >&$SAVED_FD_1; '
        'echo "2=${SAVED_FD_2-unset} pid=$QREXEC_AGENT_PID 0=$0" >&$SAVED_FD_1; '
        'if [ -n "$SAVED_FD_2" ]; then echo err >&$SAVED_FD_2; fi'
    )
    # The program itself is found by its exact path; its argv[0] is the base name.
    program = place.service("prog", '#!/bin/sh\nexec sh -c "$1" "$0"\n')
    extra = {"PASS_LOCAL_STDERR": "1"} if stderr_too else {}
    caller = Caller(place, "vm", "s", "/bin/sh", "-c", script, extra=extra)
    wire = caller.allow()
    assert caller.process.stdin is not None
    caller.process.stdin.write(b"from stdin\n")
    caller.process.stdin.close()
    caller.process.stdin = None
    # Nothing of the saved descriptors travels: the service hears only the end of the program.
    assert wire.next() == (STDIN, b"")
    caller.finish()
    status, out, err = caller.end()
    assert status == 0 and program.exists()
    lines = out.decode().splitlines()
    assert lines[:2] == ["to stdout", "from stdin"]
    match = re.fullmatch(r"2=(\w+) pid=(\d+) 0=sh", lines[2])
    assert match is not None and int(match[2]) == caller.process.pid
    assert (match[1] != "unset") == stderr_too
    assert err == (b"err\n" if stderr_too else b"")


@pytest.mark.spec("WIRE-216")
def test_no_other_descriptor_reaches_the_program(place: Place) -> None:
    caller = Caller(place, "vm", "s", "/bin/sh", "-c", "ls /proc/$$/fd >&$SAVED_FD_1")
    caller.allow()
    caller.finish()
    status, out, _ = caller.end()
    assert status == 0
    assert len(out.split()) <= 7, out


@pytest.mark.spec("WIRE-217")
@pytest.mark.parametrize(("remote", "status"), [(0, 255), (7, 7)])
def test_a_program_that_cannot_be_executed(place: Place, remote: int, status: int) -> None:
    caller = Caller(place, "vm", "s", "sh")
    caller.allow()
    caller.finish(remote)
    assert caller.end()[0] == status


@pytest.mark.spec("WIRE-217")
def test_that_it_cannot_be_executed_may_find_no_reader(place: Place) -> None:
    read, write = os.pipe()
    os.close(read)
    caller = Caller(place, "vm", "s", "/no/such", stderr=write)
    os.close(write)
    caller.allow()
    caller.finish()
    assert caller.end()[0] == 255


RAW = bytes(range(256))
SAFE = bytes(b if 0x20 <= b <= 0x7E or b in (7, 8, 9, 10, 13) else 0x5F for b in RAW)


@pytest.mark.spec("WIRE-218")
@pytest.mark.parametrize(
    ("options", "out", "err"),
    [
        ([], RAW, RAW),
        (["-t"], SAFE, RAW),
        (["-T"], RAW, SAFE),
        (["-tT"], SAFE, SAFE),
        (["-t", "--no-filter-escape-chars-stdout"], RAW, RAW),
        (["--no-filter-escape-chars-stdout", "--filter-escape-chars-stdout"], SAFE, RAW),
        (["-T", "--no-filter-escape-chars-stderr"], RAW, RAW),
    ],
)
def test_filters(place: Place, options: list[str], out: bytes, err: bytes) -> None:
    caller = Caller(place, *options, "vm", "s")
    wire = caller.allow()
    wire.message(STDOUT, RAW)
    wire.message(STDERR, RAW)
    caller.finish()
    assert caller.end() == (0, out, err)


@pytest.mark.spec("WIRE-218")
def test_a_terminal_is_filtered_by_default(place: Place) -> None:
    main, secondary = pty.openpty()
    caller = Caller(place, "vm", "s", stdout=secondary, stderr=secondary)
    os.close(secondary)
    wire = caller.allow()
    wire.message(STDERR, b"e\x1b]0;evil\x07")
    wire.message(STDOUT, b"o\x1b[31m")
    caller.finish()
    assert caller.process.wait(DEADLINE) == 0
    shown = b""
    # What was written in two pieces may be read in two; the end of a terminal is an error.
    with contextlib.suppress(OSError):
        while piece := os.read(main, 1000):
            shown += piece
    os.close(main)
    assert sorted(shown.replace(b"\r", b"")) == sorted(b"e_]0;evil\x07o_[31m")


@pytest.mark.spec("WIRE-218")
def test_with_a_program_its_stdin_is_filtered_on_demand(place: Place) -> None:
    caller = Caller(place, "-t", "vm", "s", "/bin/sh", "-c", "cat >&$SAVED_FD_1")
    caller.allow()
    caller.finish(0, b"a\x1bb")
    assert caller.end()[1] == b"a_b"


@pytest.mark.spec("WIRE-219")
@pytest.mark.parametrize("service_first", [True, False])
def test_stdin_socket_half_closes(place: Place, service_first: bool) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE)
    caller = Caller(place, "--use-stdin-socket", "vm", "s", stdin=theirs, stdout=None)
    theirs.close()
    wire = caller.allow()
    if service_first:
        wire.message(STDOUT, b"last")
        wire.message(STDOUT)
        assert ours.recv(10) == b"last" and ours.recv(10) == b""
        ours.sendall(b"still")
        assert wire.next() == (STDIN, b"still")
        ours.shutdown(socket.SHUT_WR)
        assert wire.next() == (STDIN, b"")
    else:
        ours.sendall(b"first")
        ours.shutdown(socket.SHUT_WR)
        assert wire.next() == (STDIN, b"first")
        assert wire.next() == (STDIN, b"")
        wire.message(STDOUT, b"still")
        assert ours.recv(10) == b"still"
        wire.message(STDOUT)
        assert ours.recv(10) == b""
    wire.message(EXIT, struct.pack("<i", 6))
    assert caller.process.wait(DEADLINE) == 6
    ours.close()


@pytest.mark.spec("WIRE-220")
def test_stdout_closed_by_its_reader(place: Place) -> None:
    read, write = os.pipe()
    caller = Caller(place, "vm", "s", stdout=write)
    os.close(write)
    wire = caller.allow()
    os.close(read)
    for _ in range(20):
        wire.message(STDOUT, b"x" * 60000)
    caller.finish(4)
    assert caller.end()[0] == 4


def test_prefix_data_comes_first(place: Place) -> None:
    caller = Caller(place, "-p", "PREFIX", "vm", "s")
    wire = caller.allow()
    assert wire.next() == (STDIN, b"PREFIX")
    caller.finish()
    assert caller.end()[0] == 0


@pytest.mark.spec("WIRE-197")
@pytest.mark.parametrize("early", [True, False])
def test_sigusr1_of_the_program_moves_its_output(place: Place, early: bool) -> None:
    """Output comes over the socket that is the program's stdin from then on."""
    wait = "" if early else "read line; "
    script = f"{wait}kill -USR1 $QREXEC_AGENT_PID; echo moved >&0; exec >&-; sleep 0"
    caller = Caller(place, "vm", "s", "/bin/sh", "-c", script)
    wire = caller.allow()
    if not early:
        wire.message(STDOUT, b"go\n")
    assert wire.next() == (STDIN, b"moved\n")
    caller.finish()
    assert caller.end()[0] == 0


def test_over_passed_the_descriptors_come_with_the_answer(place: Place) -> None:
    caller = Caller(place, "vm", "s")
    caller.accept()
    one_read, one_write = os.pipe()
    other_read, other_write = os.pipe()
    assert isinstance(caller.trigger.reader, socket.socket)
    send_fds(caller.trigger.reader, struct.pack("<II", 43, 70000), [one_read, other_write])
    os.close(one_read)
    os.close(other_write)
    caller.wire = Wire(other_read, one_write)
    caller.wire.shake()
    assert not list((place.path / "vchan").iterdir())
    caller.finish(3, b"out")
    assert caller.end()[:2] == (3, b"out")
    caller.wire.close()


@pytest.mark.spec("WIRE-243")
@pytest.mark.parametrize("count", [1, 3])
def test_a_wrong_number_of_descriptors_is_an_error(place: Place, count: int) -> None:
    caller = Caller(place, "vm", "s")
    caller.accept()
    given = [os.open("/dev/null", os.O_RDWR) for _ in range(count)]
    assert isinstance(caller.trigger.reader, socket.socket)
    send_fds(caller.trigger.reader, struct.pack("<II", 43, 1), given)
    for fd in given:
        os.close(fd)
    assert caller.end()[0] == 1
    assert array.array("i", given)


def test_closed_standard_descriptors_are_refused(place: Place) -> None:
    process = place.start("qrexec-client-vm", "vm", "s", stdin=None, close_fds=True)
    process.kill()
    process.wait(DEADLINE)
    result = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" <&-', "sh", str(process.args[-3]), "vm", "s"],  # type: ignore[index]
        check=False,
        capture_output=True,
        timeout=DEADLINE,
    )
    assert result.returncode == 125


def test_the_agent_may_close_before_reading_the_request(place: Place) -> None:
    """A long request that nobody reads: the close is still taken as refusal."""
    caller = Caller(place, "vm", "s" * 60000)
    assert caller.listener is not None
    connection = caller.listener.accept()[0]
    until(lambda: connection.recv(10, socket.MSG_PEEK), "the request's begin")
    connection.close()
    assert caller.end()[0] == 126


def test_an_interrupt_ends_it_without_a_word(place: Place) -> None:
    caller = Caller(place, "vm", "s")
    caller.allow()
    caller.process.send_signal(signal.SIGINT)
    assert caller.end() == (-signal.SIGINT, b"", b"")
    assert caller.trigger.ended()
