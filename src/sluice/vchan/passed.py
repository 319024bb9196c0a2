"""The transport `passed`: two pipes for each call, whose ends are handed over.

Never a socket between two domains: through one they could hand each other descriptors that outlive
the call. The ends travel by SCM_RIGHTS over the control channel or the trigger socket, attached to
the first byte of the message that they belong to (docs/spec/wire-protocol.md 20).

A trap of stream sockets: one recvmsg may return the tail of earlier bytes together with the head of
a send that has descriptors, and then nothing tells where that send began. ``FdMessageReader``
therefore never reads past the end of a message: it says how many bytes it wants next, the eight of
a header first. Then descriptors that come with the first byte of a message are known to be its own,
and any others are known to be nobody's.
"""

from __future__ import annotations

import _socket
import os
import struct

from sluice.wire.messages import MessageReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from sluice.wire.messages import Lengths

# Not the array module: loading it costs a small program a millisecond (it loads collections).
_INT = struct.calcsize("i")


def make_pair() -> tuple[tuple[int, int], tuple[int, int]]:
    """Make the two pipes of a call; return each side's (read end, write end), close-on-exec.

    What the first side writes the second reads and the other way round. Raises OSError where the
    process has no descriptors left; nothing stays open then.
    """
    first_read, second_write = os.pipe2(os.O_CLOEXEC)
    try:
        second_read, first_write = os.pipe2(os.O_CLOEXEC)
    except OSError:
        os.close(first_read)
        os.close(second_write)
        raise
    return (first_read, first_write), (second_read, second_write)


def send_with_fds(sock_fd: int, data: bytes, fds: Sequence[int]) -> int:
    """Send ``data`` on a stream socket with ``fds`` attached to its first byte.

    Returns the number of bytes taken; where that is less than all, the descriptors have gone with
    the first of them and the rest must be sent without. Never blocks; raises BlockingIOError where
    nothing could be sent (the descriptors have not gone then), OSError ETOOMANYREFS where the
    user has too many descriptors in flight.
    """
    ancillary = []
    if fds:
        ancillary.append(
            (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))
        )
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, sock_fd)
    try:
        flags = _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL
        return sock.sendmsg([data], ancillary, flags)
    finally:
        sock.detach()


def recv_with_fds(sock_fd: int, size: int, max_fds: int = 2) -> tuple[bytes, list[int]]:
    """Receive up to ``size`` bytes and the descriptors that come with them, close-on-exec.

    No bytes means end-of-file. More than ``max_fds`` descriptors: all of them are closed and none
    is returned, since no prefix of a wrong set is a right one. Never blocks (BlockingIOError).
    """
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, sock_fd)
    try:
        flags = _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
        space = _socket.CMSG_SPACE(_INT * (max_fds + 1))
        data, ancillary, message_flags, _ = sock.recvmsg(size, space, flags)
    finally:
        sock.detach()
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            count = len(payload) // _INT
            fds.extend(struct.unpack_from(f"{count}i", payload))
    if len(fds) > max_fds or message_flags & _socket.MSG_CTRUNC:
        close_all(fds)
        fds = []
    return data, fds


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors, however many of them are closed already."""
    for fd in fds:
        try:  # noqa: SIM105  contextlib is too dear for the small programs
            os.close(fd)
        except OSError:
            pass


class FdMessageReader:
    """A MessageReader for a socket over which descriptors come (the agent's control channel).

    Read with ``feed(*recv_with_fds(fd, reader.wanted))`` and call ``next`` after each feed.
    ``carrying`` lists the message types that must come with two descriptors. ``next`` returns them
    with the message, or an empty list where the sender attached none or a wrong number: the
    receiver then ends that call with a failed start. Descriptors that come with any other byte
    than the first of such a message are closed.
    """

    def __init__(self, lengths: Lengths, carrying: Container[int]) -> None:
        """Begin empty; ``lengths`` as for MessageReader."""
        self._reader = MessageReader(lengths)
        self._carrying = carrying
        self._fds: list[int] = []

    @property
    def lengths(self) -> Lengths:
        """The table of allowed lengths; may be replaced between messages."""
        return self._reader.lengths

    @lengths.setter
    def lengths(self, lengths: Lengths) -> None:
        self._reader.lengths = lengths

    @property
    def pending(self) -> int:
        """Bytes fed but not yet taken as a message; non-zero at the end means truncated."""
        return self._reader.pending

    @property
    def wanted(self) -> int:
        """How many bytes to receive next: never more than the message under way still lacks."""
        return min(self._reader.wanted, 65536)

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take what one recv_with_fds of ``wanted`` bytes returned."""
        if fds and self._reader.pending:
            close_all(fds)
        elif fds:
            close_all(self._fds)
            self._fds = list(fds)
        self._reader.feed(data)

    def next(self) -> tuple[int, bytes, list[int]] | None:
        """Return the next whole message as (type, body, descriptors), or None.

        The descriptors are the caller's to close. Raises RemoteError as MessageReader does.
        """
        message = self._reader.next()
        if message is None:
            return None
        kind, body = message
        fds, self._fds = self._fds, []
        if fds and (kind not in self._carrying or len(fds) != 2):
            close_all(fds)
            fds = []
        return kind, body, fds

    def close(self) -> None:
        """Close the descriptors that nobody has taken."""
        close_all(self._fds)
        self._fds = []
