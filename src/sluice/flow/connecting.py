"""Connecting a blocking Unix socket, for the small programs: a deadline, and signals survived."""

from __future__ import annotations

import _socket
import errno
import struct
import time


def connect_within(sock: _socket.socket, path: str | bytes, seconds: float) -> None:
    """Connect a blocking socket, waiting ``seconds`` at most for a place in the other's queue.

    Raises OSError; EAGAIN where the time is over.
    """
    end = time.monotonic() + seconds
    while True:
        # What bounds a blocking connect(); one that does not block would fail at once (EAGAIN).
        # Nought would be no bound.
        left = max(int((end - time.monotonic()) * 1_000_000), 1000)
        limit = struct.pack("ll", *divmod(left, 1_000_000))
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, limit)
        try:
            sock.connect(path)
            # Who was stopped and continued meanwhile, or heard a signal, is told that it is
            # connected.
            sock.getpeername()
            return
        except OSError as error:
            if error.errno not in (errno.EINTR, errno.ENOTCONN):
                raise
