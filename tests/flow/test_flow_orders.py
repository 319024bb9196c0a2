"""Every order in which the things around one end of a call can end.

The rule of ``callstate`` is that only the set of what has happened counts. So each permutation is
played, event by event with everything settled in between, and all at once, and must end exactly
once, with the right status, without a descriptor left.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.flow import Call, Driver, count_fds, pattern

from sluice.wire import messages as m


def play(call: Call, driver: Driver, events: list[Callable[[], None]], settle: bool) -> None:
    """Let the events happen in this order."""
    for event in events:
        event()
        if settle:
            driver.quiet()
    driver.quiet()


def service_events(call: Call) -> dict[str, Callable[[], None]]:
    """What can end around the service side."""
    return {
        "remote eof": lambda: call.peer.send(m.DATA_STDIN),
        "stdout eof": call.stdout.close,
        "stderr eof": call.stderr.close,
        "exit": lambda: call.channel.process_exited(17),
        "peer gone": call.peer.close,
        "stdin reader gone": call.stdin.close,
    }


@pytest.mark.parametrize("settle", [True, False])
@pytest.mark.parametrize("transport", ["passed", "socket"])
@pytest.mark.spec("WIRE-193", "WIRE-198")
def test_service_side_ends_in_every_order(driver: Driver, transport: str, settle: bool) -> None:
    before = count_fds(collect=True)
    for order in permutations(
        ("remote eof", "stdout eof", "stderr eof", "exit", "peer gone", "stdin reader gone")
    ):
        call = Call(driver, caller=False, transport=transport, has_process=True)
        events = service_events(call)
        play(call, driver, [events[name] for name in order], settle)
        assert call.results == [17], order
        assert not call.fatals, order
        call.close()
        assert count_fds() == before, order


def test_service_side_ends_as_soon_as_it_can(driver: Driver) -> None:
    """Without the peer going away: with the last of stdout, stderr and exit, and not before."""
    for order in permutations(("stdout eof", "stderr eof", "exit", "remote eof")):
        call = Call(driver, caller=False, has_process=True)
        events = service_events(call)
        pending = {"stdout eof", "stderr eof", "exit"}
        for name in order:
            assert bool(call.results) == (not pending), order
            events[name]()
            driver.quiet()
            pending.discard(name)
        assert call.results == [17], order
        assert call.peer.exit_code() == 17 and call.peer.eof, order
        assert call.peer.messages[-1][0] == m.DATA_EXIT_CODE
        call.close()


@pytest.mark.parametrize("settle", [True, False])
@pytest.mark.spec("WIRE-194")
def test_socket_service_ends_in_every_order(driver: Driver, settle: bool) -> None:
    before = count_fds(collect=True)
    for order in permutations(("remote eof", "service eof", "service gone", "peer gone")):
        call = Call(driver, caller=False, stdin="socket", stdout="same", stderr=False)
        events = {
            "remote eof": lambda: call.peer.send(m.DATA_STDIN),  # noqa: B023
            "service eof": call.stdin.close_write,
            "service gone": call.stdin.close,
            "peer gone": call.peer.close,
        }
        play(call, driver, [events[name] for name in order], settle)
        assert call.results == [0], order
        call.close()
        assert count_fds() == before, order


CALLER = ("remote eof", "exit code", "peer gone", "stdin eof", "stdout reader gone")


def caller_events(call: Call) -> dict[str, Callable[[], None]]:
    """What can end around the caller side."""
    return {
        "remote eof": lambda: call.peer.send(m.DATA_STDOUT),
        "exit code": lambda: call.peer.send(m.DATA_EXIT_CODE, m.I32.pack(17)),
        "peer gone": call.peer.close,
        "stdin eof": call.stdout.close,
        "stdout reader gone": call.stdin.close,
        "local exit": lambda: call.channel.process_exited(5),
    }


def caller_status(order: tuple[str, ...], process: bool) -> int:
    """What the caller must end with: the code if it came before the peer went."""
    if order.index("exit code") < order.index("peer gone"):
        return 17
    return 255


@pytest.mark.parametrize("settle", [True, False])
@pytest.mark.parametrize("process", [True, False])
@pytest.mark.parametrize("transport", ["passed", "socket"])
@pytest.mark.spec("WIRE-199", "WIRE-202")
def test_caller_side_ends_in_every_order(
    driver: Driver, transport: str, process: bool, settle: bool
) -> None:
    before = count_fds(collect=True)
    for order in permutations((*CALLER, "local exit") if process else CALLER):
        call = Call(driver, caller=True, transport=transport, has_process=process)
        events = caller_events(call)
        play(call, driver, [events[name] for name in order], settle)
        assert call.results == [caller_status(order, process)], order
        assert not call.fatals, order
        call.close()
        assert count_fds() == before, order


@pytest.mark.spec("WIRE-199", "WIRE-200")
def test_caller_side_ends_as_soon_as_it_can(driver: Driver) -> None:
    """Without the peer going away: with the exit code and the end of output, and not before."""
    for order in permutations(("remote eof", "exit code", "stdin eof")):
        call = Call(driver, caller=True)
        events = caller_events(call)
        pending = {"remote eof", "exit code"}
        for name in order:
            assert bool(call.results) == (not pending), order
            events[name]()
            driver.quiet()
            pending.discard(name)
        assert call.results == [17], order
        assert [kind for kind, _ in call.peer.messages] == [m.HELLO, m.DATA_STDIN], order
        call.close()


# --- two ends joined --------------------------------------------------------------------------


class Joined:
    """A caller and a service side on one channel, the streams around them played."""

    def __init__(self, driver: Driver, transport: str) -> None:
        import os
        import socket

        from tests.support.flow import End

        from sluice.flow.channel import DataChannel
        from sluice.vchan.passed import make_pair

        if transport == "passed":
            first, second = make_pair()
        else:
            one, other = socket.socketpair()
            first = (one.fileno(), one.detach())
            second = (other.fileno(), other.detach())

        def taking() -> tuple[End, int]:
            read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
            return End(driver, read_fd), write_fd

        def giving() -> tuple[End, int]:
            read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
            return End(driver, -1, write_fd), read_fd

        self.results: dict[str, int] = {}
        self.fatals: list[str] = []
        self.stderr_seen = bytearray()
        self.caller_out, caller_in_fd = taking()
        self.caller_in, caller_out_fd = giving()
        self.service_in, service_in_fd = taking()
        self.service_out, service_out_fd = giving()
        self.service_err, service_err_fd = giving()
        self.ends = [
            self.caller_out,
            self.caller_in,
            self.service_in,
            self.service_out,
            self.service_err,
        ]
        self.caller = DataChannel(
            driver.loop,
            *first,
            caller=True,
            in_fd=caller_in_fd,
            out_fd=caller_out_fd,
            on_done=lambda status: self.results.__setitem__("caller", status),
            on_fatal=self.fatals.append,
            on_stderr=lambda piece: self.stderr_seen.extend(piece),
        )
        self.service = DataChannel(
            driver.loop,
            *second,
            caller=False,
            in_fd=service_in_fd,
            out_fd=service_out_fd,
            err_fd=service_err_fd,
            has_process=True,
            on_done=lambda status: self.results.__setitem__("service", status),
            on_fatal=self.fatals.append,
        )
        self.caller.start()
        self.service.start()

    def close(self) -> None:
        """Close whatever is left."""
        self.caller.close()
        self.service.close()
        for end in self.ends:
            end.close()


PIECES = st.lists(st.integers(1, 150_000) | st.integers(1, 700), max_size=6)


@settings(max_examples=60, deadline=None)
@given(up=PIECES, down=PIECES, err=PIECES, order=st.permutations(range(4)), data=st.data())
@pytest.mark.parametrize("transport", ["passed", "socket"])
def test_random_sizes_and_orders(
    transport: str,
    up: list[int],
    down: list[int],
    err: list[int],
    order: list[int],
    data: st.DataObject,
) -> None:
    """Whatever is written in whatever pieces arrives unchanged, both ways at once."""
    driver = Driver()
    call = Joined(driver, transport)
    streams = [
        (call.caller_in, up, bytearray()),
        (call.service_out, down, bytearray()),
        (call.service_err, err, bytearray()),
    ]
    turns = [index for index, (_, pieces, _) in enumerate(streams) for _ in pieces]
    turns = data.draw(st.permutations(turns))
    queues = [list(pieces) for _, pieces, _ in streams]
    for index in turns:
        end, _, written = streams[index]
        piece = pattern(queues[index].pop(0), len(written))
        written += piece
        end.write(piece)
        if data.draw(st.booleans()):
            driver.loop.run_once(0)
    endings = [
        call.caller_in.end,
        call.service_out.end,
        call.service_err.end,
        lambda: call.service.process_exited(33),
    ]
    driver.until(lambda: bytes(call.service_in.received) == streams[0][2])
    for index in order:
        endings[index]()
    driver.until(lambda: len(call.results) == 2)
    driver.until(lambda: call.caller_out.eof and call.service_in.eof)
    assert call.results == {"caller": 33, "service": 33}
    assert not call.fatals
    assert call.caller_out.received == streams[1][2]
    assert call.stderr_seen == streams[2][2]
    call.close()
    driver.close()
