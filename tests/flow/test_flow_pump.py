"""One direction between two descriptors."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.flow import Driver, End, count_fds, pattern

from sluice.flow.endpoint import Endpoint
from sluice.flow.pump import EOF, FINISHED, READER_GONE, Pump


class Line:
    """A pump with the ends around it played by the test."""

    def __init__(self, driver: Driver, kinds: str = "pipe-pipe", **options: object) -> None:
        self.driver = driver
        self.ended: list[Pump] = []
        src, dst = kinds.split("-")
        if src == "pipe":
            src_fd, write_fd = os.pipe2(os.O_CLOEXEC)
            self.writer = End(driver, -1, write_fd)
        else:
            ours, theirs = socket.socketpair()
            fd = theirs.detach()
            src_fd, self.writer = ours.detach(), End(driver, fd, fd)
        if dst == "pipe":
            read_fd, dst_fd = os.pipe2(os.O_CLOEXEC)
            self.reader = End(driver, read_fd)
        else:
            ours, theirs = socket.socketpair()
            fd = theirs.detach()
            dst_fd, self.reader = ours.detach(), End(driver, fd, fd)
        self.pump = Pump(driver.loop, src_fd, dst_fd, on_end=self.ended.append, **options)  # type: ignore[arg-type]

    def until_ended(self) -> Pump:
        """Wait for the end of the pump."""
        self.driver.until(lambda: self.ended)
        self.driver.quiet()
        assert self.ended == [self.pump]
        return self.pump

    def close(self) -> None:
        """Close everything."""
        self.pump.close()
        self.writer.close()
        self.reader.close()


@pytest.fixture
def line(each_driver: Driver) -> Iterator[Callable[..., Line]]:
    """Make pumps on each loop; nothing of them may stay open."""
    made: list[Line] = []
    warm = Line(each_driver)
    warm.pump.start()
    warm.close()
    before = count_fds()

    def build(kinds: str = "pipe-pipe", **options: object) -> Line:
        made.append(Line(each_driver, kinds, **options))
        return made[-1]

    yield build
    for one in made:
        one.close()
    assert count_fds() <= before


KINDS = ["pipe-pipe", "pipe-socket", "socket-pipe", "socket-socket"]


@pytest.mark.parametrize("kinds", KINDS)
def test_bytes_that_nobody_looks_at_are_spliced(line: Callable[..., Line], kinds: str) -> None:
    one = line(kinds)
    one.pump.start()
    data = pattern(3_000_000)
    one.writer.write(data)
    one.writer.end()
    pump = one.until_ended()
    one.driver.until(lambda: one.reader.eof)
    assert one.reader.received == data
    assert pump.moved == pump.spliced == pump.taken == len(data)
    assert (pump.cause, pump.discarded, pump.held) == (EOF, 0, 0)


@pytest.mark.parametrize("kinds", KINDS)
def test_bytes_that_are_inspected_are_copied(line: Callable[..., Line], kinds: str) -> None:
    seen = bytearray()
    one = line(kinds, inspect=lambda piece: seen.extend(piece))
    one.pump.start()
    data = pattern(1_000_000)
    one.writer.write(data)
    one.writer.end()
    pump = one.until_ended()
    one.driver.until(lambda: one.reader.eof)
    assert one.reader.received == seen == data
    assert (pump.moved, pump.spliced) == (len(data), 0)


def test_from_inspecting_to_splicing(line: Callable[..., Line]) -> None:
    def look(piece: memoryview) -> None:
        one.pump.inspect = None

    one = line(inspect=look)
    one.pump.start()
    data = pattern(1_000_000)
    one.writer.write(data)
    one.writer.end()
    pump = one.until_ended()
    one.driver.until(lambda: one.reader.eof)
    assert one.reader.received == data
    assert 0 < pump.moved - pump.spliced <= 65544


def test_inspect_may_replace_and_drop(line: Callable[..., Line]) -> None:
    def look(piece: memoryview) -> list[bytes | memoryview]:
        if piece == b"drop":
            return []
        return [b"<", piece, b"", b">"]

    one = line(inspect=look)
    one.pump.start()
    one.writer.write(b"keep")
    one.driver.until(lambda: one.reader.received)
    one.writer.write(b"drop")
    one.driver.until(lambda: one.pump.taken == 8)
    one.writer.write(b"more")
    one.writer.end()
    pump = one.until_ended()
    one.driver.until(lambda: one.reader.eof)
    assert one.reader.received == b"<keep><more>"
    assert (pump.taken, pump.moved) == (12, 12)


def test_a_slow_reader_stops_the_reading(line: Callable[..., Line]) -> None:
    one = line(inspect=lambda piece: None)
    one.reader.deafen()
    one.pump.start()
    one.writer.write(pattern(10_000_000))
    one.driver.quiet()
    assert one.pump.held <= 65544
    assert one.pump.taken <= 65536 + 65544
    one.reader.listen()
    one.writer.end()
    one.until_ended()
    one.driver.until(lambda: one.reader.eof)
    assert one.reader.received == pattern(10_000_000)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("inspected", [False, True])
def test_pause_and_resume(line: Callable[..., Line], kinds: str, inspected: bool) -> None:
    one = line(kinds, inspect=(lambda piece: None) if inspected else None)
    one.pump.start()
    one.pump.pause()
    one.writer.write(b"waits")
    one.driver.quiet()
    assert not one.reader.received
    one.pump.resume()
    one.driver.until(lambda: one.reader.received == b"waits")
    one.pump.pause()
    one.writer.end()
    one.driver.quiet()
    assert not one.ended
    one.pump.resume()
    one.until_ended()


def test_pausing_from_within_inspect(line: Callable[..., Line]) -> None:
    def look(piece: memoryview) -> None:
        one.pump.pause()

    one = line(inspect=look)
    one.pump.start()
    one.writer.write(b"first")
    one.driver.until(lambda: one.reader.received == b"first")
    one.writer.write(b"second")
    one.driver.quiet()
    assert one.pump.taken == 5
    one.pump.resume()
    one.driver.until(lambda: one.reader.received == b"firstsecond")


def test_emit_and_an_end_that_waits(line: Callable[..., Line]) -> None:
    ends: list[Pump] = []
    one = line(inspect=lambda piece: [], on_eof=ends.append)
    one.pump.start()
    one.pump.emit(b"early ")
    one.writer.write(b"swallowed")
    one.writer.end()
    one.driver.until(lambda: ends)
    one.driver.quiet()
    assert not one.ended
    one.pump.emit(b"late")
    one.pump.finish()
    pump = one.until_ended()
    one.driver.until(lambda: one.reader.eof)
    assert one.reader.received == b"early late"
    assert pump.cause == EOF
    # Over is over.
    pump.emit(b"no")
    pump.finish()


def test_drained_is_told(line: Callable[..., Line]) -> None:
    told: list[int] = []
    one = line(on_drained=lambda pump: told.append(pump.held))
    one.reader.deafen()
    one.pump.start()
    one.pump.emit(bytes(1_000_000))
    one.driver.quiet()
    assert one.pump.held and not told
    one.reader.listen()
    one.driver.until(lambda: told)
    assert told == [0]


@pytest.mark.parametrize("kinds", KINDS)
def test_finish_tells_the_source_to_stop(line: Callable[..., Line], kinds: str) -> None:
    one = line(kinds)
    one.pump.start()
    one.writer.write(b"some")
    one.driver.until(lambda: one.reader.received == b"some")
    one.pump.finish()
    assert one.until_ended().cause == FINISHED
    one.driver.until(lambda: one.reader.eof)
    one.writer.write(b"more")
    assert one.writer.broken


@pytest.mark.parametrize("kinds", KINDS)
def test_finish_and_drain(line: Callable[..., Line], kinds: str) -> None:
    one = line(kinds)
    one.pump.start()
    one.writer.write(b"some")
    one.driver.until(lambda: one.reader.received == b"some")
    one.pump.finish(drain=True)
    one.driver.until(lambda: one.reader.eof)
    one.writer.write(bytes(1_000_000))
    one.driver.until(lambda: not one.writer.unsent)
    assert not one.ended
    one.writer.end()
    pump = one.until_ended()
    assert one.reader.received == b"some"
    assert (pump.moved, pump.discarded, pump.taken) == (4, 1_000_000, 1_000_004)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("inspected", [False, True])
@pytest.mark.parametrize("discard", [True, False])
@pytest.mark.parametrize("idle", [True, False])
def test_a_reader_that_goes(
    line: Callable[..., Line], kinds: str, inspected: bool, discard: bool, idle: bool
) -> None:
    told: list[Pump] = []
    one = line(
        kinds,
        inspect=(lambda piece: None) if inspected else None,
        discard=discard,
        on_reader_gone=told.append,
    )
    one.pump.start()
    one.driver.quiet()
    if not idle:
        one.reader.deafen()
        one.writer.write(bytes(2_000_000))
        one.driver.quiet()
    one.reader.close()
    one.driver.until(lambda: told)
    assert one.pump.reader_gone
    if discard:
        one.writer.write(bytes(1_000_000))
        one.writer.end()
    pump = one.until_ended()
    assert told == [pump]
    if discard:
        assert pump.cause == EOF
        assert pump.moved + pump.discarded == pump.taken == 1_000_000 + 2_000_000 * (not idle)
    else:
        assert pump.cause == READER_GONE
        one.writer.write(b"nobody")
        assert one.writer.broken


def test_close_calls_nobody(line: Callable[..., Line]) -> None:
    one = line()
    one.pump.start()
    one.pump.close()
    one.pump.close()
    one.driver.until(lambda: one.reader.eof)
    one.pump.resume()
    assert not one.ended


def test_closing_from_within_inspect(line: Callable[..., Line]) -> None:
    def look(piece: memoryview) -> list[bytes]:
        one.pump.close()
        return [b"never"]

    one = line(inspect=look)
    one.pump.start()
    one.writer.write(b"data")
    one.driver.until(lambda: one.reader.eof)
    assert not one.reader.received and not one.ended


def test_from_a_file(each_driver: Driver, tmp_path: Path) -> None:
    data = pattern(1_000_000)
    (tmp_path / "in").write_bytes(data)
    source = os.open(tmp_path / "in", os.O_RDONLY)
    target = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    ended: list[Pump] = []
    pump = Pump(each_driver.loop, source, target, on_end=ended.append)
    pump.start()
    each_driver.until(lambda: ended)
    assert (tmp_path / "out").read_bytes() == data
    assert pump.moved == len(data)


def test_two_pumps_share_a_socket_each_way(each_driver: Driver) -> None:
    """Half-close in each order, through a relay of two sockets."""
    for first, second in permutations((0, 1)):
        left, left_far = socket.socketpair()
        right, right_far = socket.socketpair()
        ends = [Endpoint(each_driver.loop, sock.detach()) for sock in (left, right)]
        played = []
        for sock in (left_far, right_far):
            fd = sock.detach()
            played.append(End(each_driver, fd, fd))
        ended: list[Pump] = []
        pumps = [
            Pump(each_driver.loop, ends[0], ends[1], on_end=ended.append),
            Pump(each_driver.loop, ends[1], ends[0], on_end=ended.append),
        ]
        for pump in pumps:
            pump.start()
        data = [pattern(700_000, 1), pattern(600_000, 2)]
        for end, content in zip(played, data, strict=True):
            end.write(content)
        played[first].end()
        each_driver.until(lambda: played[second].eof)  # noqa: B023
        assert played[second].received == data[first]
        assert len(ended) == 1
        played[second].write(b"after the other's end")
        played[second].end()
        each_driver.until(lambda: played[first].eof)  # noqa: B023
        assert played[first].received == data[second] + b"after the other's end"
        each_driver.until(lambda: len(ended) == 2)  # noqa: B023
        for end in ends:
            end.close()
        for end in played:
            end.close()


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 200_000) | st.integers(1, 100), max_size=8),
    kinds=st.sampled_from(KINDS),
    switch=st.integers(-1, 300_000),
    pauses=st.lists(st.booleans(), max_size=8),
)
def test_nothing_is_lost_or_changed(
    pieces: list[int], kinds: str, switch: int, pauses: list[bool]
) -> None:
    driver = Driver()
    seen = bytearray()

    def look(piece: memoryview) -> None:
        seen.extend(piece)
        if switch >= 0 and len(seen) >= switch:
            one.pump.inspect = None

    one = Line(driver, kinds, inspect=look)
    one.pump.start()
    written = bytearray()
    for index, size in enumerate(pieces):
        piece = pattern(size, len(written))
        written += piece
        one.writer.write(piece)
        driver.loop.run_once(0)
        if index < len(pauses):
            (one.pump.pause if pauses[index] else one.pump.resume)()
    one.pump.resume()
    one.writer.end()
    one.until_ended()
    driver.until(lambda: one.reader.eof)
    assert one.reader.received == written
    assert one.pump.moved == one.pump.taken == len(written)
    assert written.startswith(seen)
    one.close()
    driver.close()


OPERATIONS = st.lists(
    st.sampled_from(
        ["write", "pause", "resume", "emit", "finish", "drain", "deaf", "listen", "turn", "eof",
         "unlook", "look"]
    ),
    max_size=14,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    operations=OPERATIONS,
    kinds=st.sampled_from(KINDS),
    discard=st.booleans(),
    gone=st.integers(-1, 14),
    hold_eof=st.booleans(),
)
def test_any_order_of_operations_ends_once(
    operations: list[str], kinds: str, discard: bool, gone: int, hold_eof: bool
) -> None:
    """Whatever is done to a pump: every byte is accounted for, and it ends once."""
    driver = Driver()
    before = count_fds()
    emitted = 0
    waiting: list[Pump] = []
    one = Line(driver, kinds, discard=discard, on_eof=waiting.append if hold_eof else None)
    pump = one.pump
    pump.start()
    for index, operation in enumerate(operations):
        if index == gone:
            one.reader.close()
        if operation == "write" and one.writer.write_fd >= 0 and not one.writer.closing:
            one.writer.write(pattern(100_000))
        elif operation == "pause":
            pump.pause()
        elif operation == "resume":
            pump.resume()
        elif operation == "emit":
            if not pump._finishing and not pump._done:
                emitted += 50_000
            pump.emit(bytes(50_000))
        elif operation in ("finish", "drain"):
            pump.finish(drain=operation == "drain")
        elif operation == "deaf":
            one.reader.deafen()
        elif operation == "listen" and one.reader.read_fd >= 0:
            one.reader.listen()
        elif operation == "turn":
            driver.loop.run_once(0)
        elif operation == "eof":
            one.writer.end()
        elif operation == "unlook":
            pump.inspect = None
        elif operation == "look":
            pump.inspect = lambda piece: None
        assert pump.held <= 65544 + 50_000 * len(operations)
    pump.resume()
    if one.reader.read_fd >= 0:
        one.reader.listen()
    one.writer.end()
    if hold_eof:
        driver.until(lambda: waiting or one.ended)
        pump.finish()
    one.until_ended()
    if one.reader.read_fd >= 0:
        driver.until(lambda: one.reader.eof)
        assert len(one.reader.received) == pump.moved
    assert pump.held == 0
    assert pump.moved + pump.discarded == pump.taken + emitted
    one.close()
    # Fewer, where the collector found what an earlier test left.
    assert count_fds() <= before
    driver.close()
