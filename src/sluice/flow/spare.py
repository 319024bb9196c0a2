"""What the engines borrow while bytes are under way, and how the kernel moves bytes for them.

A daemon has many calls of which few move bytes at one moment, so buffers and private pipes belong
to the process, not to the call: borrowed when needed, given back when empty. Few are kept.
"""

from __future__ import annotations

import errno
import os
import select

# Bytes of a borrowed buffer: a data message with its header, or a good piece of a stream.
BUFFER = 65536 + 8

# Most buffers, and most pipes, that are kept for the next one.
_KEEP = 4

_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE

# What splice() returns besides a number of bytes; 0 is the end of the source.
SOURCE_EMPTY = -1
SINK_FULL = -2
CANNOT = -3

_buffers: list[bytearray] = []
_pipes: list[tuple[int, int]] = []


def borrow_buffer() -> bytearray:
    """Return a buffer of BUFFER bytes with anything in it."""
    return _buffers.pop() if _buffers else bytearray(BUFFER)


def return_buffer(buffer: bytearray) -> None:
    """Give a buffer back; views of it must not be used any more."""
    if len(_buffers) < _KEEP:
        _buffers.append(buffer)


def borrow_pipe() -> tuple[int, int] | None:
    """Return an empty non-blocking pipe as (read end, write end), None where there are no more."""
    if _pipes:
        return _pipes.pop()
    try:
        return os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None


def return_pipe(pipe: tuple[int, int], empty: bool) -> None:
    """Give a pipe back; it is kept only if it is ``empty``.

    What were left in it would go to another call, so that is not taken on trust.
    """
    if empty and len(_pipes) < _KEEP:
        try:
            os.read(pipe[0], 1)
        except BlockingIOError:
            _pipes.append(pipe)
            return
    os.close(pipe[0])
    os.close(pipe[1])


def splice(source: int, sink: int, most: int) -> int:
    """Let the kernel move up to ``most`` bytes without waiting.

    Returns how many, 0 at the end of ``source``, SOURCE_EMPTY or SINK_FULL (whichever must be
    awaited), or CANNOT where the bytes have to be copied. Raises OSError where one is broken.
    """
    try:
        return os.splice(source, sink, most, flags=_FLAGS)
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EBADF, errno.ENOSYS):
            # Terminals, files opened for appending, two ends neither of which is a pipe.
            return CANNOT
        raise
    poll = select.poll()
    poll.register(source, select.POLLIN)
    poll.register(sink, select.POLLOUT)
    ready = dict(poll.poll(0))
    if sink not in ready:
        return SINK_FULL
    if source not in ready:
        return SOURCE_EMPTY
    try:
        # One of the two became ready a moment ago; or else they both claim to be and are not.
        return os.splice(source, sink, most, flags=_FLAGS)
    except BlockingIOError:
        return CANNOT
