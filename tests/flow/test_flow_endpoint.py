"""Descriptors and their oddities: shared flags, terminals, files, descriptors 0 to 2."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.flow import Call, Driver, count_fds, pattern

from sluice.flow.endpoint import Endpoint, close_fd
from sluice.wire import messages as m

ROOT = Path(__file__).resolve().parents[2]


def test_flags_are_given_back(driver: Driver) -> None:
    one, other = socket.socketpair()
    with one, other:
        shared = os.dup(one.fileno())
        end = Endpoint(driver.loop, shared)
        assert not os.get_blocking(one.fileno())
        end.close()
        assert os.get_blocking(one.fileno())


def test_one_socket_on_two_descriptors(driver: Driver) -> None:
    """Closing the first must not make the second block; closing the last gives the flag back."""
    for order in ((0, 1), (1, 0)):
        one, other = socket.socketpair()
        with one, other:
            ends = [Endpoint(driver.loop, os.dup(one.fileno())) for _ in range(2)]
            ends[0].share_flags(ends[1])
            ends[order[0]].close()
            assert not os.get_blocking(one.fileno())
            ends[order[1]].close()
            assert os.get_blocking(one.fileno())


def test_a_program_on_one_socket_twice(driver: Driver) -> None:
    """As socat's EXEC starts it: stdin and stdout are the same socket.

    Its stdout ends first; reading its stdin must not make it block, or it misses its exit code.
    """
    ours, theirs = socket.socketpair()
    pid, call = spawn(driver, theirs.fileno(), theirs.fileno())
    theirs.close()
    call.peer.send(m.DATA_STDOUT, b"output")
    call.peer.send(m.DATA_STDOUT)
    ours.settimeout(30)
    assert ours.recv(100) == b"output"
    ours.sendall(b"input")
    driver.until(lambda: call.peer.stream(m.DATA_STDIN) == b"input")
    call.peer.send(m.DATA_EXIT_CODE, m.I32.pack(2))
    driver.until(lambda: call.peer.eof)
    assert status_of(pid) == 2
    ours.close()
    call.peer.close()


def test_a_descriptor_that_was_non_blocking_stays_so(driver: Driver) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        Endpoint(driver.loop, os.dup(one.fileno())).close()
        assert not os.get_blocking(one.fileno())


def test_files_are_always_ready(driver: Driver, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    end = Endpoint(driver.loop, os.open(path, os.O_RDONLY))
    seen: list[bytes] = []

    def read() -> None:
        seen.append(os.read(end.fd, 4))
        if not seen[-1]:
            end.close()

    end.on_read = read
    end.want_read(True)
    driver.until(lambda: end.closed)
    assert seen == [b"cont", b"ent", b""]


def test_an_unwanted_file_turns_nothing(driver: Driver, tmp_path: Path) -> None:
    end = Endpoint(driver.loop, os.open(tmp_path, os.O_RDONLY))
    end.close()
    path = tmp_path / "file"
    path.write_bytes(b"content")
    end = Endpoint(driver.loop, os.open(path, os.O_RDONLY))
    calls: list[int] = []
    end.on_read = lambda: calls.append(1)
    end.want_read(True)
    end.want_read(False)
    driver.quiet()
    assert not calls
    end.close()


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_devices_that_cannot_be_waited_for(driver: Driver, path: str) -> None:
    end = Endpoint(driver.loop, os.open(path, os.O_RDWR))
    calls: list[str] = []

    def ready(name: str) -> None:
        calls.append(name)
        end.want_read(False)
        end.want_write(False)

    end.want_hangup(True)
    end.on_write = lambda: ready("write")
    end.want_write(True)
    driver.until(lambda: calls)
    assert calls == ["write"]
    end.close()


def test_shutdown_twice_is_harmless(driver: Driver) -> None:
    one, other = socket.socketpair()
    end = Endpoint(driver.loop, one.detach())
    other.close()
    end.shutdown(reading=False)
    end.shutdown(reading=False)
    end.shutdown(reading=True)
    end.close()
    end.close()


def test_closing_a_standard_descriptor_keeps_its_number(driver: Driver) -> None:
    saved = os.dup(0)
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    try:
        os.dup2(write_fd, 0)
        os.close(write_fd)
        close_fd(0)
        assert os.read(read_fd, 1) == b""
        assert os.readlink("/proc/self/fd/0") == "/dev/null"
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(read_fd)


# --- a whole caller as a program, on the descriptors that a shell gives it -----------------------

PROGRAM = """
import os, sys
sys.path.insert(0, {src!r})
from sluice.flow.channel import DataChannel
from sluice.flow.reactor import Reactor
loop = Reactor()
results = []
def done(status):
    results.append(status)
    loop.stop()
channel = DataChannel(loop, int(sys.argv[1]), int(sys.argv[2]), caller=True, in_fd=1, out_fd=0,
                      on_done=done, on_fatal=lambda reason: done(99))
channel.start()
loop.run()
os._exit(results[0])
"""


def spawn(driver: Driver, stdin: int, stdout: int, stderr: int | None = None) -> tuple[int, Call]:
    """Start a caller with these standard descriptors; return its pid and the peer's side."""
    call = Call(driver, caller=False)
    call.close()
    from tests.support.flow import Peer

    from sluice.vchan.passed import make_pair

    own, peer = make_pair()
    actions: list[tuple[int, ...]] = [
        (os.POSIX_SPAWN_DUP2, stdin, 0),
        (os.POSIX_SPAWN_DUP2, stdout, 1),
        (os.POSIX_SPAWN_DUP2, own[0], 101),
        (os.POSIX_SPAWN_DUP2, own[1], 102),
    ]
    if stderr is not None:
        actions.append((os.POSIX_SPAWN_DUP2, stderr, 2))
    code = PROGRAM.format(src=str(ROOT / "src"))
    pid = os.posix_spawn(
        "/usr/bin/python3",
        ["python3", "-IS", "-c", code, "101", "102"],
        os.environ,
        file_actions=actions,
    )
    for fd in own:
        os.close(fd)
    call.peer = Peer(driver, *peer)
    call.peer.hello()
    return pid, call


def status_of(pid: int) -> int:
    """Reap a process and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_stdin_from_dev_null_and_stdout_to_a_file(driver: Driver, tmp_path: Path) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    out = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    pid, call = spawn(driver, null, out)
    os.close(null)
    os.close(out)
    driver.until(lambda: call.peer.ended(m.DATA_STDIN))
    data = pattern(200_000)
    for start in range(0, len(data), 65536):
        call.peer.send(m.DATA_STDOUT, data[start : start + 65536])
    call.peer.send(m.DATA_STDOUT)
    call.peer.send(m.DATA_EXIT_CODE, m.I32.pack(11))
    driver.until(lambda: call.peer.eof)
    assert status_of(pid) == 11
    assert (tmp_path / "out").read_bytes() == data
    call.peer.close()


def test_stdout_opened_for_appending(driver: Driver, tmp_path: Path) -> None:
    """Such a file refuses to be spliced into."""
    (tmp_path / "out").write_bytes(b"before ")
    null = os.open("/dev/null", os.O_RDONLY)
    out = os.open(tmp_path / "out", os.O_WRONLY | os.O_APPEND)
    pid, call = spawn(driver, null, out)
    os.close(null)
    os.close(out)
    data = pattern(300_000)
    for start in range(0, len(data), 65536):
        call.peer.send(m.DATA_STDOUT, data[start : start + 65536])
    call.peer.send(m.DATA_STDOUT)
    call.peer.send(m.DATA_EXIT_CODE, bytes(4))
    driver.until(lambda: call.peer.eof)
    assert status_of(pid) == 0
    assert (tmp_path / "out").read_bytes() == b"before " + data
    call.peer.close()


def test_stdin_from_a_large_file(driver: Driver, tmp_path: Path) -> None:
    data = pattern(1_000_000)
    (tmp_path / "in").write_bytes(data)
    source = os.open(tmp_path / "in", os.O_RDONLY)
    null = os.open("/dev/null", os.O_WRONLY)
    pid, call = spawn(driver, source, null)
    os.close(source)
    os.close(null)
    driver.until(lambda: call.peer.ended(m.DATA_STDIN))
    assert call.peer.stream(m.DATA_STDIN) == data
    call.peer.send(m.DATA_STDOUT)
    call.peer.send(m.DATA_EXIT_CODE, bytes(4))
    driver.until(lambda: call.peer.eof)
    assert status_of(pid) == 0
    call.peer.close()


def test_a_terminal_keeps_its_flags_even_when_we_are_killed(driver: Driver) -> None:
    master, slave = pty.openpty()
    pid, call = spawn(driver, slave, slave, slave)
    driver.until(lambda: call.peer.messages)
    os.write(master, b"typed\n")
    driver.until(lambda: call.peer.stream(m.DATA_STDIN) == b"typed\n")
    call.peer.send(m.DATA_STDOUT, b"shown\n")
    os.set_blocking(master, False)
    seen = bytearray()

    def shown() -> bool:
        with contextlib.suppress(BlockingIOError):
            seen.extend(os.read(master, 4096))
        return b"shown" in seen

    driver.loop.add_reader(master, lambda: None)
    driver.until(shown)
    driver.loop.remove_reader(master)
    assert os.get_blocking(slave)
    os.kill(pid, signal.SIGKILL)
    assert status_of(pid) == -signal.SIGKILL
    assert os.get_blocking(slave)
    os.close(master)
    os.close(slave)
    call.peer.close()


def test_pipes_shared_with_others_keep_their_flags(driver: Driver) -> None:
    stdin, stdout = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
    pid, call = spawn(driver, stdin[0], stdout[1])
    driver.until(lambda: call.peer.messages)
    os.write(stdin[1], b"x")
    driver.until(lambda: call.peer.stream(m.DATA_STDIN) == b"x")
    assert os.get_blocking(stdin[0]) and os.get_blocking(stdout[1])
    call.peer.send(m.DATA_STDOUT)
    os.close(stdout[1])
    # Our end of stdout is closed as soon as the remote one has ended.
    assert os.read(stdout[0], 1) == b""
    call.peer.send(m.DATA_EXIT_CODE, m.I32.pack(1))
    driver.until(lambda: call.peer.eof)
    assert status_of(pid) == 1
    for fd in (stdin[0], stdin[1], stdout[0]):
        os.close(fd)
    call.peer.close()


def test_the_tests_leave_nothing_open(driver: Driver) -> None:
    before = count_fds(collect=True)
    pid, call = spawn(driver, 0, 1)
    os.kill(pid, signal.SIGKILL)
    status_of(pid)
    call.peer.close()
    assert count_fds() == before


def test_small_programs_import_little() -> None:
    """The modules of the data path load nothing that the small programs do not have anyway."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); before = set(sys.modules)\n"
        "import sluice.flow.channel, sluice.flow.reactor, sluice.flow.pump\n"
        "import sluice.vchan.passed, sluice.vchan.socketdir\n"
        "print(*sorted(n for n in set(sys.modules) - before if not n.startswith('sluice')))"
    )
    output = subprocess.run(
        ["/usr/bin/python3", "-IS", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    allowed = {"__future__", "os", "os.path", "posixpath", "genericpath", "stat", "struct"}
    allowed |= {"abc", "_collections_abc", *sys.builtin_module_names}
    assert set(output) <= allowed
