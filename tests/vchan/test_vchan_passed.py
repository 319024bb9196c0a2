"""Pipes for calls, and descriptors that are handed over."""

from __future__ import annotations

import array
import errno
import os
import resource
import socket
import stat
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.flow import count_fds

from sluice.errors import RemoteError
from sluice.vchan.passed import (
    FdMessageReader,
    close_all,
    make_pair,
    recv_with_fds,
    send_with_fds,
)
from sluice.wire import messages as m

CARRYING = (m.EXEC_CMDLINE, m.JUST_EXEC, m.SERVICE_CONNECT)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A control channel: stream sockets."""
    before = count_fds(collect=True)
    one, other = socket.socketpair()
    yield one, other
    one.close()
    other.close()
    assert count_fds() == before


def some_fds(count: int) -> list[int]:
    """Open descriptors that can be told apart."""
    return [os.memfd_create(f"number-{index}") for index in range(count)]


def names(fds: list[int]) -> list[str]:
    """What the descriptors are, and close them."""
    found = [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]
    close_all(fds)
    return [name.removeprefix("/memfd:").removesuffix(" (deleted)") for name in found]


@pytest.mark.spec("WIRE-241")
def test_a_call_is_two_pipes() -> None:
    before = count_fds(collect=True)
    (first_read, first_write), (second_read, second_write) = make_pair()
    ends = [first_read, first_write, second_read, second_write]
    os.write(first_write, b"there")
    assert os.read(second_read, 10) == b"there"
    os.write(second_write, b"back")
    assert os.read(first_read, 10) == b"back"
    for fd in ends:
        assert stat.S_ISFIFO(os.fstat(fd).st_mode)
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError) as caught:
            send_with_fds(fd, b"x", [0])
        assert caught.value.errno == errno.ENOTSOCK
    close_all(ends)
    assert count_fds() == before


def test_no_pipe_is_left_when_descriptors_run_out() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
        while True:
            try:
                fillers.append(os.dup(0))
            except OSError:
                break
        # Room for one pipe and half of another.
        close_all([fillers.pop() for _ in range(3)])
        with pytest.raises(OSError) as caught:
            make_pair()
        assert caught.value.errno == errno.EMFILE
        fillers += some_fds(3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        close_all(fillers)


@pytest.mark.spec("WIRE-242")
def test_descriptors_travel_with_the_first_byte(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    fds = some_fds(2)
    assert send_with_fds(pair[0].fileno(), b"message", fds) == 7
    close_all(fds)
    data, got = recv_with_fds(pair[1].fileno(), 1)
    assert data == b"m"
    assert all(not os.get_inheritable(fd) for fd in got)
    assert names(got) == ["number-0", "number-1"]
    assert recv_with_fds(pair[1].fileno(), 100) == (b"essage", [])


def test_nothing_to_receive_and_end_of_file(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(BlockingIOError):
        recv_with_fds(pair[1].fileno(), 10)
    assert pair[1].getblocking()
    pair[0].close()
    assert recv_with_fds(pair[1].fileno(), 10) == (b"", [])


def test_a_full_socket_takes_no_descriptors(pair: tuple[socket.socket, socket.socket]) -> None:
    fds = some_fds(2)
    with pytest.raises(BlockingIOError):
        while True:
            send_with_fds(pair[0].fileno(), bytes(65536), [])
    with pytest.raises(BlockingIOError):
        send_with_fds(pair[0].fileno(), b"x", fds)
    close_all(fds)


@pytest.mark.spec("WIRE-243")
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 10, 100, 253])
def test_too_many_descriptors_leave_none_open(
    pair: tuple[socket.socket, socket.socket], count: int
) -> None:
    fds = some_fds(count)
    send_with_fds(pair[0].fileno(), b"x", fds)
    close_all(fds)
    before = count_fds()
    data, got = recv_with_fds(pair[1].fileno(), 10)
    assert data == b"x"
    assert len(got) == (count if count <= 2 else 0)
    close_all(got)
    assert count_fds() == before


def test_several_ancillary_messages_of_odd_size() -> None:
    """Only whole numbers are taken; anything else that comes is ignored."""
    one, other = socket.socketpair()
    with one, other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        fds = some_fds(2)
        one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        close_all(fds)
        before = count_fds(collect=True)
        _, got = recv_with_fds(other.fileno(), 10)
        # With credentials asked for there may be no room for the descriptors: then none is left.
        close_all(got)
        assert count_fds() == before


class Receiver:
    """What an agent does with its control channel."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = FdMessageReader(m.FROM_DAEMON, CARRYING)
        self.messages: list[tuple[int, bytes, list[str]]] = []

    def drain(self) -> None:
        """Take everything that is there."""
        while True:
            try:
                data, fds = recv_with_fds(self.sock.fileno(), self.reader.wanted)
            except BlockingIOError:
                return
            if not data:
                return
            self.reader.feed(data, fds)
            while (message := self.reader.next()) is not None:
                kind, body, got = message
                self.messages.append((kind, body, names(got)))


def execute(text: bytes) -> bytes:
    return m.encode_exec(m.EXEC_CMDLINE, 1, 2, text)


@pytest.mark.spec("WIRE-242")
def test_each_message_has_its_own(pair: tuple[socket.socket, socket.socket]) -> None:
    receiver = Receiver(pair[1])
    first, second = some_fds(2), [os.memfd_create(name) for name in ("third", "fourth")]
    send_with_fds(pair[0].fileno(), execute(b"a\0"), first)
    send_with_fds(pair[0].fileno(), m.encode_refused(b"SOCKET1"), [])
    send_with_fds(pair[0].fileno(), execute(b"b\0"), [])
    send_with_fds(pair[0].fileno(), m.encode_exec(m.SERVICE_CONNECT, 3, 4, b"id\0"), second)
    close_all(first + second)
    receiver.drain()
    assert [(kind, fds) for kind, _, fds in receiver.messages] == [
        (m.EXEC_CMDLINE, ["number-0", "number-1"]),
        (m.SERVICE_REFUSED, []),
        (m.EXEC_CMDLINE, []),
        (m.SERVICE_CONNECT, ["third", "fourth"]),
    ]


@pytest.mark.spec("WIRE-243")
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_wrong_number_counts_as_none(
    pair: tuple[socket.socket, socket.socket], count: int
) -> None:
    receiver = Receiver(pair[1])
    fds = some_fds(count)
    send_with_fds(pair[0].fileno(), execute(b"a\0"), fds)
    close_all(fds)
    before = count_fds()
    receiver.drain()
    assert receiver.messages[0][2] == (["number-0", "number-1"] if count == 2 else [])
    assert count_fds() == before


@pytest.mark.spec("WIRE-243")
def test_descriptors_of_nobody_are_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    """With a message that carries none, in the middle of one, or with one that never ends."""
    receiver = Receiver(pair[1])
    message = execute(b"long command\0")
    fds = some_fds(2)
    before = count_fds()
    send_with_fds(pair[0].fileno(), m.encode_refused(b"SOCKET1"), fds)
    send_with_fds(pair[0].fileno(), message[:10], [])
    send_with_fds(pair[0].fileno(), message[10:], fds)
    receiver.drain()
    assert [fds for _, _, fds in receiver.messages] == [[], []]
    assert count_fds() == before
    send_with_fds(pair[0].fileno(), message[:3], fds)
    receiver.drain()
    receiver.reader.close()
    close_all(fds)
    assert count_fds() == before - 2


def test_a_bad_header_is_an_error_and_leaves_nothing_open(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    receiver = Receiver(pair[1])
    fds = some_fds(2)
    send_with_fds(pair[0].fileno(), m.HEADER.pack(m.EXEC_CMDLINE, 0xFFFFFFFF), fds)
    close_all(fds)
    with pytest.raises(RemoteError):
        receiver.drain()
    receiver.reader.close()


PLAN = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 200), st.lists(st.integers(1, 40), max_size=3)),
    max_size=8,
)


@settings(deadline=None)
@given(plan=PLAN)
@pytest.mark.spec("WIRE-242", "WIRE-243")
def test_any_split_gives_each_message_its_own(
    plan: list[tuple[int, int, list[int]]],
) -> None:
    """Messages with any number of descriptors, sent in any pieces and read at any moment."""
    before = count_fds()
    one, other = socket.socketpair()
    receiver = Receiver(other)
    expected = []
    with one, other:
        for index, (count, size, cuts) in enumerate(plan):
            text = bytes([65 + index]) * size + b"\0"
            message = execute(text)
            fds = [os.memfd_create(f"{index}-{number}") for number in range(count)]
            at = 0
            for cut in [*cuts, len(message)]:
                piece = message[at : at + cut] if cut != len(message) else message[at:]
                if piece:
                    send_with_fds(one.fileno(), piece, fds if at == 0 else [])
                at += len(piece)
                if index % 2:
                    receiver.drain()
            close_all(fds)
            right = [f"{index}-0", f"{index}-1"] if count == 2 else []
            expected.append((m.EXEC_CMDLINE, message[8:], right))
        receiver.drain()
        assert receiver.messages == expected
        receiver.reader.close()
    # Fewer, where the collector found what an earlier test left.
    assert count_fds() <= before
