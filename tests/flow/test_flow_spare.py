"""What is borrowed and given back."""

from __future__ import annotations

import os

import pytest
from tests.support.flow import count_fds

from sluice.flow import spare


@pytest.fixture(autouse=True)
def empty_handed() -> None:
    """Begin without spare pipes."""
    while spare._pipes:
        for fd in spare._pipes.pop():
            os.close(fd)


def borrow() -> tuple[int, int]:
    pipe = spare.borrow_pipe()
    assert pipe is not None
    return pipe


def test_an_empty_pipe_is_used_again() -> None:
    pipe = borrow()
    spare.return_pipe(pipe, True)
    assert borrow() == pipe
    spare.return_pipe(pipe, False)
    assert not spare._pipes


def test_a_pipe_with_bytes_in_it_never_goes_to_another_call() -> None:
    before = count_fds(collect=True)
    pipe = borrow()
    os.write(pipe[1], b"of another domain")
    spare.return_pipe(pipe, True)
    assert not spare._pipes
    assert count_fds() == before


def test_few_are_kept() -> None:
    pipes = [borrow() for _ in range(10)]
    buffers = [spare.borrow_buffer() for _ in range(10)]
    for pipe in pipes:
        spare.return_pipe(pipe, True)
    for buffer in buffers:
        spare.return_buffer(buffer)
    assert len(spare._pipes) == 4
    assert len(spare._buffers) == 4


def test_splice_tells_which_side_to_wait_for() -> None:
    source, sink = borrow(), borrow()
    assert spare.splice(source[0], sink[1], 100) == spare.SOURCE_EMPTY
    os.write(source[1], b"abc")
    assert spare.splice(source[0], sink[1], 100) == 3
    os.write(source[1], b"more")
    while spare.splice(source[0], sink[1], 100) > 0:
        os.write(source[1], bytes(4096))
    assert spare.splice(source[0], sink[1], 100) == spare.SINK_FULL
    os.close(source[1])
    os.read(sink[0], 1 << 20)
    os.read(source[0], 1 << 20)
    assert spare.splice(source[0], sink[1], 100) == 0
    os.close(sink[0])
    for fd in (source[0], sink[1]):
        os.close(fd)


def test_what_cannot_be_spliced() -> None:
    source = borrow()
    os.write(source[1], b"abc")
    with open("/dev/null", "rb") as one, open("/dev/null", "rb") as other:
        assert spare.splice(one.fileno(), other.fileno(), 10) == spare.CANNOT
    spare.return_pipe(source, False)


def test_a_broken_sink_is_an_error() -> None:
    source, sink = borrow(), borrow()
    os.close(sink[0])
    os.write(source[1], b"abc")
    with pytest.raises(BrokenPipeError):
        spare.splice(source[0], sink[1], 10)
    os.close(sink[1])
    spare.return_pipe(source, False)
