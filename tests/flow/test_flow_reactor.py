"""The little event loop."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest

from sluice.flow.reactor import Reactor


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor()
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[list[int]]:
    ends = list(os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
    yield ends
    for fd in ends:
        if fd >= 0:
            os.close(fd)


def shut(ends: list[int], index: int) -> None:
    os.close(ends[index])
    ends[index] = -1


def test_readers_and_writers(reactor: Reactor, pipe: list[int]) -> None:
    seen: list[object] = []
    reactor.add_reader(pipe[0], seen.append, "readable")
    reactor.run_once(0)
    assert seen == []
    reactor.add_writer(pipe[1], seen.append, "writable")
    reactor.run_once(0)
    assert seen == ["writable"]
    assert reactor.remove_writer(pipe[1])
    assert not reactor.remove_writer(pipe[1])
    os.write(pipe[1], b"x")
    reactor.run_once(0)
    reactor.run_once(0)
    assert seen == ["writable", "readable", "readable"]
    assert reactor.remove_reader(pipe[0])
    assert not reactor.remove_reader(pipe[0])
    assert not reactor.remove_hangup(pipe[0])
    assert reactor.run_once(0) == 0


def test_a_reader_can_be_replaced(reactor: Reactor, pipe: list[int]) -> None:
    seen: list[int] = []
    reactor.add_reader(pipe[0], seen.append, 1)
    reactor.add_reader(pipe[0], seen.append, 2)
    os.write(pipe[1], b"x")
    reactor.run_once(0)
    assert seen == [2]


def test_both_directions_of_one_socket(reactor: Reactor) -> None:
    one, other = socket.socketpair()
    with one, other:
        seen: list[str] = []
        reactor.add_reader(one.fileno(), seen.append, "r")
        reactor.add_writer(one.fileno(), seen.append, "w")
        other.send(b"x")
        reactor.run_once(0)
        assert seen == ["r", "w"]
        reactor.remove_reader(one.fileno())
        reactor.run_once(0)
        assert seen == ["r", "w", "w"]


def test_hangup_of_a_pipe_without_reader(reactor: Reactor, pipe: list[int]) -> None:
    seen: list[str] = []
    reactor.add_hangup(pipe[1], seen.append, "gone")
    reactor.run_once(0)
    assert not seen
    shut(pipe, 0)
    reactor.run_once(0)
    # Once: a hang-up stays, and would be told for ever.
    assert reactor.run_once(0) == 0
    assert seen == ["gone"]


def test_hangup_beside_a_reader(reactor: Reactor) -> None:
    one, other = socket.socketpair()
    with one, other:
        seen: list[str] = []
        reactor.add_reader(one.fileno(), seen.append, "r")
        reactor.add_hangup(one.fileno(), seen.append, "gone")
        other.close()
        reactor.run_once(0)
        reactor.run_once(0)
        assert seen == ["r", "gone", "r"]
        assert reactor.remove_reader(one.fileno())


def test_a_callback_may_remove_the_next_one(reactor: Reactor) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    seen: list[int] = []

    def read(index: int) -> None:
        seen.append(index)
        for one, _ in pairs:
            reactor.remove_reader(one.fileno())

    for index, (one, other) in enumerate(pairs):
        reactor.add_reader(one.fileno(), read, index)
        other.send(b"x")
    reactor.run_once(0)
    assert len(seen) == 1
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_a_number_given_out_again_in_the_same_round_hears_nothing_old(reactor: Reactor) -> None:
    """Both are readable at once; the first callback closes the other, whose number is reused."""
    first, second = socket.socketpair(), socket.socketpair()
    healthy = os.pipe2(os.O_CLOEXEC)
    swapped: list[int] = []
    seen: list[str] = []

    def swap(victim: socket.socket) -> None:
        number = victim.fileno()
        reactor.remove_reader(number)
        victim.close()
        os.dup2(healthy[1], number)
        swapped.append(number)
        reactor.add_hangup(number, seen.append, "stale")

    reactor.add_reader(first[0].fileno(), swap, second[0])
    reactor.add_reader(second[0].fileno(), swap, first[0])
    for sock in (first[1], second[1]):
        sock.close()
    reactor.run_once(0)
    assert len(swapped) == 1
    assert seen == []
    reactor.remove_hangup(swapped[0])
    for fd in (*healthy, *swapped):
        os.close(fd)
    for sock in (first[0], second[0]):
        sock.close()


def test_a_descriptor_closed_behind_its_back_can_be_watched_again(reactor: Reactor) -> None:
    first = os.pipe2(os.O_CLOEXEC)
    reactor.add_reader(first[0], lambda: None)
    os.close(first[0])
    second = os.pipe2(os.O_CLOEXEC)
    assert second[0] == first[0]
    seen: list[int] = []
    reactor.add_writer(second[0], seen.append, 0)
    reactor.remove_writer(second[0])
    reactor.remove_reader(second[0])
    reactor.add_reader(second[0], seen.append, 1)
    os.write(second[1], b"x")
    reactor.run_once(0)
    assert 1 in seen
    for fd in (first[1], *second):
        os.close(fd)


def test_regular_files_are_refused_as_by_asyncio(reactor: Reactor) -> None:
    with open("/dev/null", "rb") as null, pytest.raises(PermissionError):
        reactor.add_reader(null.fileno(), lambda: None)
    with open("/dev/null", "rb") as null, pytest.raises(PermissionError):
        reactor.add_hangup(null.fileno(), lambda: None)
    # Nothing of the failed ones is left.
    assert reactor.run_once(0) == 0


def test_timers_run_in_their_order(reactor: Reactor) -> None:
    seen: list[int] = []
    begin = time.monotonic()
    reactor.call_later(0.02, seen.append, 2)
    reactor.call_later(0.01, seen.append, 1)
    reactor.call_later(0.015, seen.append, 99).cancel()
    reactor.call_later(0.03, reactor.stop)
    reactor.run()
    assert seen == [1, 2]
    assert time.monotonic() - begin >= 0.03


def test_cancelled_timers_do_not_pile_up(reactor: Reactor) -> None:
    for _ in range(10_000):
        reactor.call_later(3600, lambda: None).cancel()
    assert len(reactor._timers) < 200


def test_call_soon(reactor: Reactor) -> None:
    seen: list[int] = []
    reactor.call_soon(seen.append, 1)
    reactor.call_soon(reactor.call_soon, seen.append, 2)
    # It does not wait while something is due, now or in the next round.
    reactor.run_once(60)
    assert seen == [1]
    reactor.run_once(60)
    assert seen == [1, 2]


def test_stop_ends_the_round(reactor: Reactor) -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    seen: list[int] = []

    def read(index: int) -> None:
        seen.append(index)
        reactor.stop()

    for index, (one, other) in enumerate(pairs):
        reactor.add_reader(one.fileno(), read, index)
        other.send(b"x")
    reactor.run()
    assert len(seen) == 1
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_time_is_the_clock_of_timers(reactor: Reactor) -> None:
    due = reactor.time() + 0.01
    reactor.call_later(0.01, reactor.stop)
    reactor.run()
    assert reactor.time() >= due
