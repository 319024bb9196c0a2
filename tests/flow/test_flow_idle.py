"""An idle call wakes nobody, and holds little."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import sys
import time

import pytest
from tests.support.flow import Call, Driver, End, pattern

from sluice.flow import endpoint, spare
from sluice.flow.pump import Pump
from sluice.flow.reactor import Reactor
from sluice.wire import messages as m


class CountingReactor(Reactor):
    """Counts how often the loop woke up."""

    rounds = 0

    def run_once(self, limit: float = -1) -> int:
        found = super().run_once(limit)
        self.rounds += 1
        return found


def idle_rounds(driver: Driver, seconds: float) -> int:
    """Let the loop run for so long and return how often it woke up, its own end not counted."""
    loop = driver.loop
    loop.rounds = 0
    loop.call_later(seconds, loop.stop)
    loop.run()
    # Two rounds are the timer's: the one that ends with it, and the one that serves it. On a slow
    # machine it may be due when the first begins.
    return max(int(loop.rounds) - 2, 0)


def busy_and_then_idle(driver: Driver) -> list[object]:
    """Make ends of calls of each kind which have passed something and have nothing to do now."""
    made: list[object] = []
    for caller in (True, False):
        for stdin in ("pipe", "socket"):
            call = Call(driver, caller=caller, stdin=stdin, stdout=stdin, has_process=True)
            kind = m.DATA_STDIN if caller else m.DATA_STDOUT
            data = pattern(300_000)
            call.stdout.write(data)
            call.peer.send(m.DATA_STDOUT, data[:65536])
            driver.until(lambda: call.peer.stream(kind) == data)  # noqa: B023
            driver.until(lambda: len(call.stdin.received) == 65536)  # noqa: B023
            made.append(call)
    # One whose input is full, one whose output is full, one without reader.
    full = Call(driver, caller=False, has_process=True)
    full.stdin.deafen()
    for _ in range(4):
        full.peer.send(m.DATA_STDIN, bytes(65536))
    deaf = Call(driver, caller=False, has_process=True)
    deaf.peer.deafen()
    deaf.stdout.write(bytes(1_000_000))
    gone = Call(driver, caller=True)
    gone.stdin.close()
    half = Call(driver, caller=False, stdin="socket", stdout="same", stderr=False)
    half.stdin.end()
    mute = Call(driver, caller=True)
    mute.peer.close_read()
    mute.stdout.write(b"x")
    driver.quiet()
    return [*made, full, deaf, gone, half, mute]


def test_no_wake_up_while_idle() -> None:
    driver = Driver()
    driver.loop = CountingReactor()
    calls = busy_and_then_idle(driver)
    assert idle_rounds(driver, 0.5) == 0
    assert all(not call.over for call in calls)  # type: ignore[attr-defined]
    for call in calls:
        call.close()  # type: ignore[attr-defined]
    driver.close()


@pytest.mark.soak
@pytest.mark.spec("WIRE-246")
def test_no_wake_up_in_ten_seconds() -> None:
    driver = Driver()
    driver.loop = CountingReactor()
    calls = busy_and_then_idle(driver)
    used = time.process_time()
    assert idle_rounds(driver, 10) == 0
    assert time.process_time() - used < 0.05
    for call in calls:
        call.close()  # type: ignore[attr-defined]
    driver.close()


def test_idle_pumps_wake_nobody() -> None:
    driver = Driver()
    driver.loop = CountingReactor()
    ends: list[End] = []
    pumps: list[Pump] = []
    for state in ("open", "paused", "full", "gone"):
        src, write_fd = os.pipe2(os.O_CLOEXEC)
        read_fd, dst = os.pipe2(os.O_CLOEXEC)
        writer, reader = End(driver, -1, write_fd), End(driver, read_fd)
        pump = Pump(driver.loop, src, dst, on_end=lambda pump: None)
        pump.start()
        if state == "paused":
            pump.pause()
        if state == "full":
            reader.deafen()
        if state == "gone":
            reader.close()
        elif state != "open":
            writer.write(bytes(1_000_000))
        ends += [writer, reader]
        pumps.append(pump)
    driver.quiet()
    assert idle_rounds(driver, 0.3) == 0
    for pump in pumps:
        pump.close()
    for end in ends:
        end.close()
    driver.close()


def test_idle_calls_hold_no_buffers(driver: Driver) -> None:
    calls = []
    for _ in range(20):
        call = Call(driver, caller=False, has_process=True)
        call.peer.send(m.DATA_STDIN, b"small")
        call.stdout.write(pattern(200_000))
        driver.until(lambda: len(call.peer.stream(m.DATA_STDOUT)) == 200_000)  # noqa: B023
        driver.until(lambda: call.stdin.received)  # noqa: B023
        calls.append(call)
    driver.quiet()
    assert len(spare._buffers) <= 4 and len(spare._pipes) <= 4
    for call in calls:
        assert sys.getsizeof(call.channel._receiver._framer._buffer) < 100
        assert call.channel._sender._buffer is None
        assert call.channel._sender._pipe is None
        call.close()


def test_a_pipe_that_carries_much_is_grown(driver: Driver) -> None:
    call = Call(driver, caller=False, has_process=True)
    before = fcntl.fcntl(call.peer.read_fd, fcntl.F_GETPIPE_SZ)
    data = pattern(3_000_000)
    call.stdout.write(data)
    driver.until(lambda: call.peer.stream(m.DATA_STDOUT) == data)
    after = fcntl.fcntl(call.peer.read_fd, fcntl.F_GETPIPE_SZ)
    assert before == 65536
    assert after in (before, 262144)
    if os.geteuid() == 0:
        assert after == 262144
    call.close()


def test_few_pipes_are_grown_at_one_time(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process takes of its user's pipe pages is bounded, and given back by closing."""
    monkeypatch.setattr(endpoint, "_GROWN_MOST", 3)
    monkeypatch.setattr(endpoint, "_grown_now", 0)
    ends = [endpoint.Endpoint(driver.loop, fd) for _ in range(3) for fd in os.pipe2(os.O_CLOEXEC)]
    for end in ends:
        end.grow()
        end.grow()
    sizes = [fcntl.fcntl(end.fd, fcntl.F_GETPIPE_SZ) for end in ends]
    assert sum(size > 65536 for size in sizes) <= 6
    assert endpoint._grown_now <= 3
    for end in ends:
        end.close()
        end.grow()
    assert endpoint._grown_now == 0


def test_being_refused_more_room_is_normal(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refuse(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETPIPE_SZ:
            refused.append(fd)
            raise PermissionError(1, "Operation not permitted")
        return real(fd, command, argument)

    refused: list[int] = []
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    call = Call(driver, caller=False, has_process=True)
    data = pattern(3_000_000)
    call.stdout.write(data)
    driver.until(lambda: call.peer.stream(m.DATA_STDOUT) == data)
    assert refused
    call.close()


def test_out_of_descriptors_only_copies(driver: Driver) -> None:
    """Without a pipe to splice through, large payloads are copied."""
    call = Call(driver, caller=False, has_process=True)
    while spare._pipes:
        spare.return_pipe(spare._pipes.pop(), False)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    fillers = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        while True:
            try:
                fillers.append(os.dup(0))
            except OSError:
                break
        data = pattern(500_000)
        call.stdout.write(data)
        driver.until(lambda: call.peer.stream(m.DATA_STDOUT) == data)
        assert call.channel._sender.spliced == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)
    call.close()


def test_large_payloads_are_spliced_both_ways(driver: Driver) -> None:
    for transport in ("passed", "socket"):
        call = Call(driver, caller=False, has_process=True, transport=transport)
        data = pattern(2_000_000)
        call.stdout.write(data)
        driver.until(lambda: call.peer.stream(m.DATA_STDOUT) == data)  # noqa: B023
        for start in range(0, len(data), 65536):
            call.peer.send(m.DATA_STDIN, data[start : start + 65536])
        driver.until(lambda: len(call.stdin.received) == len(data))  # noqa: B023
        assert call.channel._sender.spliced > len(data) // 2
        assert call.channel._receiver.spliced > len(data) // 2
        call.close()


def test_small_messages_are_written_together(driver: Driver) -> None:
    """A socket, where every write is a packet of its own kind, shows how many writes there were."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    call = Call(driver, caller=False, has_process=True, late=True, on_open=lambda: None)
    call.peer.write(m.encode(m.DATA_STDIN, b"x" * 100) * 100)
    call.channel.attach(ours.detach(), call.streams[1], call.streams[2], has_process=True)
    driver.quiet()
    theirs.setblocking(False)
    assert theirs.recv(1 << 20) == b"x" * 10_000
    theirs.close()
    os.close(call.streams[0])
    call.close()
