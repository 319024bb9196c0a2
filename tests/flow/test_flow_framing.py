"""Messages out of a byte stream, in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.errors import RemoteError
from sluice.flow.callstate import CallState
from sluice.flow.framing import BULK, Framer
from sluice.wire import messages as m


def accept(kind: int, size: int) -> None:
    """Accept every header."""


def feed(framer: Framer, data: bytes, most: int) -> tuple[list[tuple[int, bytes, bool]], int]:
    """Put as many of ``data`` into the framer as it has room for; return the pieces."""
    room = framer.room()
    count = min(len(room), len(data), most)
    room[:count] = data[:count]
    framer.filled(count)
    pieces = []
    while (piece := framer.next()) is not None:
        pieces.append((piece[0], bytes(piece[1]), piece[2]))
    return pieces, count


MESSAGES = st.lists(
    st.tuples(
        st.sampled_from([m.DATA_STDIN, m.DATA_STDERR, m.DATA_EXIT_CODE]),
        st.integers(0, 40) | st.sampled_from([BULK - 1, BULK, 65536]),
    ),
    max_size=8,
)


@given(messages=MESSAGES, chunks=st.lists(st.integers(1, 70_000) | st.just(1), min_size=1))
@pytest.mark.spec("WIRE-007", "WIRE-008")
def test_pieces_put_together_are_the_messages(
    messages: list[tuple[int, int]], chunks: list[int]
) -> None:
    bodies = [(kind, bytes([index + 1]) * size) for index, (kind, size) in enumerate(messages)]
    stream = b"".join(m.encode(kind, body) for kind, body in bodies)
    framer = Framer(accept)
    found: list[tuple[int, bytes]] = []
    body = b""
    turn = 0
    while stream:
        pieces, count = feed(framer, stream, max(chunks[turn % len(chunks)], len(stream) // 500))
        turn += 1
        stream = stream[count:]
        for kind, piece, last in pieces:
            body += piece
            if last:
                found.append((kind, body))
                body = b""
        framer.rest()
    assert found == bodies
    assert not framer.inside


def test_large_messages_are_not_read_ahead() -> None:
    framer = Framer(accept)
    stream = m.encode(m.DATA_STDIN, bytes(BULK)) + m.encode(m.DATA_STDIN, bytes(BULK))
    feed(framer, stream, 100)
    assert framer.left == BULK - 92
    # The rest goes past the framer; then it wants exactly a header.
    assert framer.skip(framer.left)
    assert len(framer.room()) == 8
    stream = stream[8 + BULK :]
    feed(framer, stream, 8)
    assert framer.left == BULK


def test_small_messages_are_read_ahead() -> None:
    framer = Framer(accept)
    pieces, count = feed(framer, m.encode(m.DATA_STDIN, b"x") * 1000, 1 << 20)
    assert len(pieces) == 1000 and count == 9000


def test_a_header_is_checked_before_its_payload() -> None:
    seen: list[tuple[int, int]] = []

    def refuse(kind: int, size: int) -> None:
        seen.append((kind, size))
        raise RemoteError("no")

    framer = Framer(refuse)
    with pytest.raises(RemoteError):
        feed(framer, m.HEADER.pack(7, 0xFFFFFFFF), 8)
    assert seen == [(7, 0xFFFFFFFF)]


@pytest.mark.parametrize("cut", range(1, 12))
def test_inside_tells_a_truncated_stream(cut: int) -> None:
    framer = Framer(accept)
    feed(framer, m.encode(m.DATA_STDIN, b"four")[:cut], 100)
    assert framer.inside


@given(kind=st.integers(0, 2**32 - 1), size=st.integers(0, 2**32 - 1), caller=st.booleans())
@pytest.mark.spec("WIRE-186", "WIRE-187")
def test_headers_are_accepted_by_type_and_length(kind: int, size: int, caller: bool) -> None:
    state = CallState(caller=caller)
    state.opened = True
    allowed = kind in range(0x190, 0x194) and size <= 65536
    if allowed:
        state.check(kind, size)
    else:
        with pytest.raises(RemoteError):
            state.check(kind, size)


@given(kind=st.integers(0, 2**32 - 1), size=st.integers(0, 2**32 - 1))
def test_only_hello_is_accepted_before_the_handshake(kind: int, size: int) -> None:
    state = CallState(caller=True)
    if (kind, size) == (m.HELLO, 4):
        state.check(kind, size)
    else:
        with pytest.raises(RemoteError):
            state.check(kind, size)
