"""The service side with real commands, and real processes that vanish."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from tests.support.flow import Driver, Peer, no_leak, pattern

from sluice.flow.channel import DataChannel
from sluice.vchan.passed import make_pair
from sluice.wire import messages as m

ROOT = Path(__file__).resolve().parents[2]


class Service:
    """A command of the shell behind the service side, its caller played by the test."""

    def __init__(self, driver: Driver, command: str, **options: object) -> None:
        self.driver = driver
        self.results: list[int] = []
        self.fatals: list[str] = []
        self.pid = -1
        self.command = command
        own, peer = make_pair()
        self.peer = Peer(driver, *peer)
        self.channel = DataChannel(
            driver.loop,
            *own,
            caller=False,
            on_done=self.results.append,
            on_fatal=self.fatals.append,
            on_open=self._begin,
            **options,  # type: ignore[arg-type]
        )
        self.channel.start()
        self.peer.hello()

    def _begin(self) -> None:
        stdin, service_in = socket.socketpair()
        stdout, service_out = socket.socketpair()
        stderr, service_err = os.pipe2(os.O_CLOEXEC)
        self.pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", self.command],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, service_in.fileno(), 0),
                (os.POSIX_SPAWN_DUP2, service_out.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, service_err, 2),
            ],
            setsigdef=[signal.SIGPIPE],
            setsid=True,
        )
        service_in.close()
        service_out.close()
        os.close(service_err)
        self.pidfd = os.pidfd_open(self.pid)
        self.driver.loop.add_reader(self.pidfd, self._reap)
        self.channel.attach(stdin.detach(), stdout.detach(), stderr, has_process=True)

    def _reap(self) -> None:
        self.driver.loop.remove_reader(self.pidfd)
        os.close(self.pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = -1
        self.channel.process_exited(status if status >= 0 else 128 - status)

    def finish(self) -> int:
        """Wait for the result and check that the peer saw it."""
        self.driver.until(lambda: self.results or self.fatals)
        assert not self.fatals
        self.driver.until(lambda: self.peer.eof)
        self.peer.close()
        return self.results[0]


@pytest.mark.parametrize(
    ("command", "status", "out", "err"),
    [
        ("exit 0", 0, b"", b""),
        ("exit 42", 42, b"", b""),
        ("echo out; echo err >&2; exit 3", 3, b"out\n", b"err\n"),
        ("exec 0<&-; echo out", 0, b"out\n", b""),
        ("exec 1>&-; echo err >&2; exit 7", 7, b"", b"err\n"),
        ("exec 0<&- 1>&- 2>&-; exit 9", 9, b"", b""),
        ("kill -9 $$", 137, b"", b""),
        ("kill -TERM $$", 143, b"", b""),
        ("head -c 1000000 /dev/zero", 0, bytes(1_000_000), b""),
        ("(sleep 0.2; echo late) & exit 4", 4, b"late\n", b""),
    ],
)
@pytest.mark.spec("WIRE-191", "WIRE-193", "WIRE-246")
def test_commands(driver: Driver, command: str, status: int, out: bytes, err: bytes) -> None:
    with no_leak():
        service = Service(driver, command)
        peer = service.peer
        driver.until(lambda: peer.exit_code() is not None)
        assert peer.stream(m.DATA_STDOUT) == out
        assert peer.stream(m.DATA_STDERR) == err
        assert peer.exit_code() == status
        assert service.finish() == status


def test_cat(driver: Driver) -> None:
    data = pattern(2_000_000)
    with no_leak():
        service = Service(driver, "cat")
        for start in range(0, len(data), 65536):
            service.peer.send(m.DATA_STDIN, data[start : start + 65536])
        service.peer.send(m.DATA_STDIN)
        driver.until(lambda: service.peer.exit_code() is not None)
        assert service.peer.stream(m.DATA_STDOUT) == data
        assert service.finish() == 0


@pytest.mark.spec("WIRE-198")
@pytest.mark.parametrize("busy", [False, True])
def test_a_caller_that_vanishes_ends_a_service_that_heeds_its_streams(
    driver: Driver, busy: bool
) -> None:
    """cat ends at its end-of-file, yes at its broken pipe; neither is signalled by us."""
    with no_leak():
        service = Service(driver, "yes" if busy else "cat; exit 21")
        driver.until(lambda: service.peer.messages if not busy else service.peer.received)
        service.peer.close()
        driver.until(lambda: service.results or service.fatals)
        # A writer that waits for room just then is told of a reset: yes(1) complains, ends with 1.
        assert service.results[0] in ((128 + signal.SIGPIPE, 1) if busy else (21,))


@pytest.mark.spec("WIRE-198")
def test_a_service_that_does_not_heed_them_is_waited_for(driver: Driver, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with no_leak():
        service = Service(driver, f"trap '' PIPE; read x <{fifo}; exit 5")
        driver.until(lambda: service.pid > 0)
        service.peer.close()
        driver.quiet()
        assert not service.results
        os.kill(service.pid, 0)
        fifo.write_text("\n")
        driver.until(lambda: service.results)
        assert service.results == [5]


CALLER = """
import os, sys
sys.path.insert(0, {src!r})
from sluice.flow.channel import DataChannel
from sluice.flow.reactor import Reactor
loop = Reactor()
results = []
def done(status):
    results.append(status)
    loop.stop()
DataChannel(loop, 101, 102, caller=True, in_fd=1, out_fd=0,
            on_done=done, on_fatal=lambda reason: done(99)).start()
loop.run()
os._exit(results[0])
"""


@pytest.mark.spec("WIRE-202")
@pytest.mark.parametrize("inside", [False, True])
def test_a_service_side_that_vanishes_ends_the_caller(driver: Driver, inside: bool) -> None:
    """A killed process leaves end-of-file on its pipes: 255, or 1 inside a message."""
    with no_leak():
        own, other = make_pair()
        stdin, hold = os.pipe2(os.O_CLOEXEC)
        out, stdout = os.pipe2(os.O_CLOEXEC)
        pid = os.posix_spawn(
            "/usr/bin/python3",
            ["python3", "-IS", "-c", CALLER.format(src=str(ROOT / "src"))],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, stdin, 0),
                (os.POSIX_SPAWN_DUP2, stdout, 1),
                (os.POSIX_SPAWN_DUP2, own[0], 101),
                (os.POSIX_SPAWN_DUP2, own[1], 102),
            ],
        )
        for fd in (*own, stdin, stdout):
            os.close(fd)
        peer = Peer(driver, *other)
        peer.hello()
        peer.send(m.DATA_STDOUT, b"output")
        driver.until(lambda: peer.messages)
        assert os.read(out, 100) == b"output"
        if inside:
            peer.write(m.HEADER.pack(m.DATA_STDOUT, 100) + b"half")
        peer.close()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == (99 if inside else 255)
        os.close(hold)
        os.close(out)


@pytest.mark.soak
@pytest.mark.spec("WIRE-246")
def test_a_gigabyte_each_way_in_constant_memory(driver: Driver) -> None:
    import resource

    from tests.flow.test_flow_orders import Joined

    call = Joined(driver, "passed")
    for end in (call.caller_in, call.service_out):
        end.write(pattern(1 << 20))
    driver.until(lambda: len(call.caller_out.received) == len(call.service_in.received) == 1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    block = pattern(1 << 20)
    for _ in range(1024):
        call.caller_out.received.clear()
        call.service_in.received.clear()
        call.caller_in.write(block)
        call.service_out.write(block)
        driver.until(
            lambda: len(call.caller_out.received) == len(call.service_in.received) == len(block)
        )
        assert call.caller_out.received == call.service_in.received == block
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8192
    call.close()
