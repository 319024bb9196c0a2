"""qrexec-daemon: command line, start-up, sockets, handshakes, signals, restart of the agent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Iterator

import pytest
from tests.support.adminvm import (
    BIN,
    EXEC_CMDLINE,
    HELLO,
    SERVICE_CONNECT,
    TERMINATED,
    Closed,
    client_environment,
    exec_body,
    hello,
    message,
    trigger3,
    trigger4,
    wait_until,
)
from tests.support.qrexec_daemon import (
    UUID,
    DaemonHarness,
    accept,
    answer,
    connect,
    harness,
    read_policy_request,
)

LINKS = {"qrexec.42", "qrexec.src", f"qrexec.uuid:{UUID}"}


@pytest.fixture
def daemon() -> Iterator[DaemonHarness]:
    with harness() as it:
        yield it


def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [str(BIN / "qrexec-daemon"), *arguments],
        env=client_environment(),
        capture_output=True,
        timeout=20,
    )


@pytest.mark.spec("WIRE-020", "WIRE-021", "WIRE-022")
@pytest.mark.parametrize(
    "arguments",
    [
        ("42", "src"),
        ("--uuid=x", "42"),
        ("--uuid=x", "42", "a", "b", "c"),
        ("--help",),
        ("-h",),
        ("--uuid=x", "0", "src"),
        ("--uuid=x", "--", "-3", "src"),
        ("--uuid=x", "abc", "src"),
        ("--nonsense", "--uuid=x", "42", "src"),
    ],
)
def test_a_wrong_command_line_shows_usage(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert b"usage: qrexec-daemon" in done.stderr
    assert done.stdout == b""


@pytest.mark.spec("WIRE-023", "WIRE-024", "WIRE-025", "WIRE-032")
def test_sockets_appear_after_the_handshake_and_replace_what_was_there(
    daemon: DaemonHarness,
) -> None:
    for name in LINKS:
        (daemon.sockets / name).write_text("stale")
    daemon.listen()
    daemon.spawn()
    assert daemon.control is not None
    agent = daemon.keep(accept(daemon.control))
    assert agent.silent()
    assert all((daemon.sockets / name).is_file() for name in LINKS)
    assert agent.greet() == 4
    daemon.wait_for_sockets()
    status = os.lstat(daemon.sockets / "qrexec.42")
    assert stat.S_ISSOCK(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == 0o777
    assert os.readlink(daemon.sockets / "qrexec.src") == "qrexec.42"
    assert os.readlink(daemon.sockets / f"qrexec.uuid:{UUID}") == "qrexec.42"
    assert daemon.names() == LINKS


@pytest.mark.spec("WIRE-023")
def test_before_the_handshake_there_is_no_socket(daemon: DaemonHarness) -> None:
    daemon.listen()
    daemon.spawn()
    assert daemon.control is not None
    daemon.keep(accept(daemon.control)).silent()
    assert daemon.names() == set()


@pytest.mark.alone
@pytest.mark.spec("WIRE-026")
def test_an_agent_out_of_reach_ends_the_start(daemon: DaemonHarness) -> None:
    began = time.monotonic()
    daemon.spawn(QREXEC_STARTUP_TIMEOUT="1")
    assert daemon.ended() == 3
    assert 0.9 < time.monotonic() - began < 10


def test_an_agent_that_can_never_be_reached_ends_the_start_at_once(
    daemon: DaemonHarness,
) -> None:
    daemon.spawn(VCHAN_SOCKET_DIR=str(daemon.directory / "program"))  # not a directory
    assert daemon.ended() == 1


@pytest.mark.spec("WIRE-027")
@pytest.mark.parametrize("text", ["0", "-5", "abc"])
def test_a_timeout_that_is_not_positive_means_sixty(text: str) -> None:
    from sluice.adminvm.daemon_options import parse_arguments

    arguments = ["-u", "x", "42", "src"]
    assert parse_arguments(arguments, {"QREXEC_STARTUP_TIMEOUT": text}).startup_timeout == 60
    assert parse_arguments(arguments, {"QREXEC_STARTUP_TIMEOUT": "7"}).startup_timeout == 7


@pytest.mark.spec("WIRE-027")
def test_a_timeout_of_zero_does_not_end_the_start_at_once(daemon: DaemonHarness) -> None:
    process = daemon.spawn(QREXEC_STARTUP_TIMEOUT="0")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)


def find_daemon(daemon: DaemonHarness) -> int:
    """The process id of a daemon in the background, by its log file's owner."""
    log = daemon.directory / "qrexec.src.log"
    line = wait_until(lambda: log.exists() and log.read_text(), "a log line")
    return int(line.partition("qrexec-daemon[")[2].partition("]")[0])


@pytest.mark.spec("WIRE-028")
def test_the_parent_leaves_when_the_sockets_exist(daemon: DaemonHarness) -> None:
    log = daemon.directory / "qrexec.src.log"
    log.write_text("of an earlier run\n" * 100)
    daemon.listen()
    process = daemon.spawn(direct=False)
    assert daemon.control is not None
    agent = daemon.keep(accept(daemon.control))
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    agent.greet()
    assert daemon.ended() == 0
    assert daemon.names() == LINKS
    pid = find_daemon(daemon)
    assert os.getsid(pid) == pid
    streams = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)]
    assert streams == ["/dev/null", str(log), str(log)]
    assert "earlier" not in log.read_text()
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not daemon.names(), "the end of the daemon")
    os.close(pidfd)


@pytest.mark.spec("WIRE-028")
def test_the_parent_tells_of_a_failed_start(daemon: DaemonHarness) -> None:
    daemon.listen()
    daemon.spawn(direct=False)
    assert daemon.control is not None
    daemon.keep(accept(daemon.control)).send(hello(1))
    assert daemon.ended() == 1


@pytest.mark.spec("WIRE-028")
def test_a_new_log_is_for_its_group_too(daemon: DaemonHarness) -> None:
    daemon.listen()
    daemon.spawn(direct=False)
    daemon.greet()
    assert daemon.ended() == 0
    assert stat.S_IMODE(os.stat(daemon.directory / "qrexec.src.log").st_mode) == 0o660
    os.kill(find_daemon(daemon), signal.SIGTERM)
    wait_until(lambda: not daemon.names(), "the end of the daemon")


@pytest.mark.alone
@pytest.mark.spec("WIRE-026")
@pytest.mark.parametrize("quiet", [False, True])
def test_the_parent_passes_the_timeout_on_and_shows_dots(
    daemon: DaemonHarness, quiet: bool
) -> None:
    more = ["-q"] * quiet
    process = daemon.spawn(*more, "42", "src", direct=False, QREXEC_STARTUP_TIMEOUT="2")
    assert daemon.ended() == 3
    assert process.stderr is not None
    assert (process.stderr.read()[:1] == b".") is not quiet


@pytest.mark.spec("WIRE-029")
def test_nowait_leaves_at_once(daemon: DaemonHarness) -> None:
    daemon.spawn(direct=False, QREXEC_STARTUP_NOWAIT="")
    assert daemon.ended() == 0
    assert daemon.names() == set()
    # The child waits without limit: an agent that comes now is served.
    daemon.listen()
    agent = daemon.greet()
    client = daemon.request(b"user:x\0")
    client.expect(EXEC_CMDLINE)
    agent.expect(EXEC_CMDLINE)
    os.kill(find_daemon(daemon), signal.SIGTERM)
    wait_until(lambda: not daemon.names(), "the end of the daemon")


@pytest.mark.spec("WIRE-030")
def test_sigterm_removes_the_sockets(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    client = daemon.local()
    assert daemon.process is not None
    daemon.process.terminate()
    assert daemon.ended() == 0
    assert daemon.names() == set()
    assert agent.at_end()
    assert client.at_end()


@pytest.mark.spec("WIRE-030")
def test_what_was_accepted_before_sigterm_still_reaches_the_agent(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    daemon.request(b"user:last words\0").expect(EXEC_CMDLINE)
    assert daemon.process is not None
    daemon.process.terminate()
    assert daemon.ended() == 0
    assert agent.expect(EXEC_CMDLINE)[8:] == b"user:last words\0"
    assert agent.at_end()


@pytest.mark.alone
@pytest.mark.spec("WIRE-030")
def test_what_the_agent_has_not_read_at_sigterm_reaches_it(daemon: DaemonHarness) -> None:
    """More than the kernel holds for it: the daemon waits a moment for an agent that reads."""
    agent = daemon.start()
    text = b"u:" + b"x" * 65000 + b"\0"
    clients = [daemon.local() for _ in range(12)]
    for client in clients:
        client.send(message(EXEC_CMDLINE, exec_body(0, 0, text)))
    assert any(client.silent(0.3) for client in clients)
    assert daemon.process is not None
    daemon.process.terminate()
    received = 0
    with contextlib.suppress(Closed):
        while True:
            assert agent.expect(EXEC_CMDLINE)[8:] == text
            received += 1
    assert daemon.ended() == 0
    # Exactly those that were answered: not one was taken and then lost.
    answered = [client for client in clients if not client.at_end()]
    assert received == len(answered) > 3


@pytest.mark.spec("WIRE-031")
@pytest.mark.parametrize("user", ["user", "alice"])
def test_the_default_user(daemon: DaemonHarness, user: str) -> None:
    agent = daemon.start(4, "42", "src", *([] if user == "user" else [user]))
    daemon.request(b"DEFAULT:x\0").expect(EXEC_CMDLINE)
    assert agent.expect(EXEC_CMDLINE)[8:] == user.encode() + b":x\0"


@pytest.mark.spec("WIRE-033", "WIRE-035")
@pytest.mark.parametrize(("offered", "answered"), [(2, 2), (3, 3), (4, 4), (0xFFFFFFFF, 4)])
def test_the_agents_hello_is_answered(daemon: DaemonHarness, offered: int, answered: int) -> None:
    daemon.listen()
    daemon.spawn()
    assert daemon.control is not None
    agent = daemon.keep(accept(daemon.control))
    assert agent.greet(offered) == answered
    daemon.wait_for_sockets()
    if offered > 4:
        agent.send(trigger4(service=b""))
        assert agent.receive()[0] == 0x203


@pytest.mark.spec("WIRE-034", "WIRE-036")
@pytest.mark.parametrize(
    "first",
    [
        hello(0),
        hello(1),
        trigger4(),
        message(HELLO, b"\4\0\0\0\0"),
        message(HELLO, b"\4\0\0"),
        message(HELLO),
    ],
)
def test_a_bad_first_message_of_the_agent_ends_the_daemon(
    daemon: DaemonHarness, first: bytes
) -> None:
    daemon.listen()
    daemon.spawn()
    assert daemon.control is not None
    agent = daemon.keep(accept(daemon.control))
    agent.send(first)
    assert agent.at_end(5)
    assert daemon.ended() == 1
    assert daemon.names() == set()


@pytest.mark.spec("WIRE-037", "WIRE-038")
def test_local_handshakes(daemon: DaemonHarness) -> None:
    daemon.start()
    for version in (3, 9):
        client = daemon.local(version=version)
        client.send(message(EXEC_CMDLINE, exec_body(0, 0, b"user:x\0")))
        client.expect(EXEC_CMDLINE)
    old = daemon.local(version=2)
    with contextlib.suppress(BrokenPipeError):
        old.send(message(EXEC_CMDLINE, exec_body(0, 0, b"user:x\0")))
    assert old.at_end(5)
    assert daemon.alive()


@pytest.mark.spec("WIRE-039")
@pytest.mark.parametrize(
    "first", [message(EXEC_CMDLINE, exec_body(0, 0, b"x\0")), message(HELLO, b"\3\0\0\0\0")]
)
def test_a_local_client_that_does_not_greet_is_dropped(daemon: DaemonHarness, first: bytes) -> None:
    daemon.start()
    client = daemon.local(version=None)
    client.send(first)
    assert client.at_end(5)
    assert daemon.alive()


@pytest.mark.spec("WIRE-117", "WIRE-118", "WIRE-119")
def test_the_agent_restarts(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    waiting, port = daemon.allocated()
    idle = daemon.local()
    assert port == 513
    daemon.listen()
    agent.close()
    assert waiting.at_end()
    assert idle.at_end()
    wait_until(lambda: not daemon.names(), "the removal of the sockets")
    assert daemon.process is not None
    assert daemon.process.poll() is None
    agent = daemon.greet()
    assert daemon.names() == LINKS
    _, port = daemon.allocated()
    assert port == 514
    assert agent.expect(EXEC_CMDLINE)[:8] == struct.pack("<II", 0, 514)
    # A port from before is free once the new agent reports its end.
    agent.send(message(TERMINATED, exec_body(0, 513)))
    wait_until(lambda: daemon.allocated()[1] == 513, "the port to be free")


@pytest.mark.spec("WIRE-120")
def test_a_new_agent_may_speak_another_version(daemon: DaemonHarness) -> None:
    agent = daemon.start(4)
    policy = daemon.policy()
    daemon.listen()
    agent.close()
    agent = daemon.greet(3)
    agent.send(trigger3(b"dst", b"test.S", b"I"))
    assert b"requested_source" not in answer(policy, b"result=deny")
    assert agent.expect(0x203) == b"I".ljust(32, b"\0")
    agent.send(trigger4())
    assert agent.at_end()
    assert daemon.ended() == 1


@pytest.mark.spec("WIRE-117")
def test_calls_from_before_a_restart_are_forgotten(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    agent.send(trigger4(ident=b"OLD"))
    held = daemon.keep(accept(policy))
    read_policy_request(held)
    daemon.listen()
    agent.close()
    agent = daemon.greet()
    client = daemon.request(b"OLD\0", 43, 514, SERVICE_CONNECT)
    assert client.at_end()
    assert held.at_end()
    assert agent.silent()


@pytest.mark.spec("WIRE-121")
def test_sigterm_while_waiting_for_the_agent(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    assert daemon.control is not None
    daemon.control.close()
    os.unlink(daemon.vchan / "vchan.42.0.512.sock")
    agent.close()
    wait_until(lambda: not daemon.names(), "the removal of the sockets")
    assert daemon.process is not None
    daemon.process.terminate()
    assert daemon.ended() == -signal.SIGTERM


def test_a_socket_directory_that_is_missing(daemon: DaemonHarness) -> None:
    os.rmdir(daemon.sockets)
    daemon.spawn()
    assert daemon.ended() == 1


def test_the_listener_of_a_dead_client_is_not_confused(daemon: DaemonHarness) -> None:
    """A client that connects and leaves at once does no harm."""
    daemon.start()
    for _ in range(20):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(daemon.sockets / "qrexec.42"))
        sock.close()
    connect(daemon.sockets / "qrexec.src").close()
    assert daemon.alive()
