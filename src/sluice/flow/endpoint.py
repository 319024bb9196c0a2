"""One descriptor in the data path: what is wanted of it, and how it is closed.

This is the thin layer between the engines, which know only streams, and the kernel, whose
descriptors differ:

- Regular files, /dev/null and their like cannot be waited for (epoll says EPERM). They are always
  ready, so while they are wanted their callback runs once a round of the loop.
- O_NONBLOCK belongs to the open file description, which others may share: a shell keeps our stdin
  and gets its terminal back in our state, even when we are killed. Pipes and terminals on
  descriptors 0 to 2 are therefore opened a second time (/proc/self/fd), which gives a description
  of our own. Where that fails, and for sockets, the flag is set and taken back on closing.
- Descriptors 0 to 2 are closed by putting /dev/null in their place: a number that is free is given
  out again, and then a stray print goes into somebody's file.

docs/spec/wire-protocol.md 10.5.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from sluice.flow.reactor import Loop

    class Hangups(Protocol):
        """What can tell that the other side of a descriptor is gone."""

        def add_hangup(self, fd: int, callback: Callable[[], None]) -> None:
            """Call ``callback()`` once when it is."""

        def remove_hangup(self, fd: int) -> object:
            """Undo add_hangup."""


_S_IFMT = 0o170000
_S_IFIFO = 0o010000
_S_IFCHR = 0o020000
_S_IFREG = 0o100000
_S_IFSOCK = 0o140000

# Majors of terminals that may be opened again: consoles, and the slaves of pseudo terminals. Not
# /dev/ptmx (5), where each open makes a new terminal.
_TERMINALS = (4, *range(136, 144))

# What a pipe that carries much is grown to, in bytes; the default is 65536.
GROWN = 1 << 18

# After how many bytes of a stream its pipes are grown.
GROW_AFTER = 1 << 20

# Pipes grown by this process at one time. The kernel counts the pages of pipes for a user id, and
# when those are used up every new pipe of that user is tiny.
_GROWN_MOST = 24

_grown_now = 0


def _nothing() -> None:
    """Stand for a callback that was not given."""


class Endpoint:
    """A descriptor that an engine owns. ``on_read``, ``on_write``, ``on_hangup`` are its events.

    Two engines may share one for the two directions of a socket: one reads, the other writes.
    """

    __slots__ = (
        "_blocking",
        "_borrowed",
        "_grown",
        "_hangup",
        "_loop",
        "_read",
        "_soon",
        "_twin",
        "_write",
        "always",
        "closed",
        "fd",
        "is_pipe",
        "is_socket",
        "number",
        "on_hangup",
        "on_read",
        "on_write",
        "spliceable",
    )

    def __init__(
        self, loop: Loop, fd: int, *, writing: bool = False, borrowed: bool = False
    ) -> None:
        """Take the descriptor and make it non-blocking; ``writing`` says which end it is.

        borrowed: leave its flags alone, and leave it open in the end (use ``write``).
        """
        mode = os.fstat(fd).st_mode & _S_IFMT
        self._loop = loop
        # The number that was given, and the descriptor in use: another one if opened again.
        self.number = fd
        self.fd = fd
        self.is_socket = mode == _S_IFSOCK
        self.is_pipe = mode == _S_IFIFO
        # Terminals refuse to splice, and so do files opened for appending (found out by trying).
        self.spliceable = mode != _S_IFCHR
        self.always = mode == _S_IFREG
        self.closed = False
        self._blocking = False
        self._borrowed = borrowed
        self._grown = False
        self._twin: Endpoint | None = None
        self._read = self._write = self._hangup = self._soon = False
        self.on_read: Callable[[], None] = _nothing
        self.on_write: Callable[[], None] = _nothing
        self.on_hangup: Callable[[], None] = _nothing
        if not self.always and not borrowed:
            self._unblock(mode, writing)

    def _unblock(self, mode: int, writing: bool) -> None:
        """See that reads and writes return at once."""
        if not os.get_blocking(self.number):
            return
        if self.number <= 2 and (self.is_pipe or mode == _S_IFCHR):
            self._reopen(mode, writing)
        if self.fd == self.number:
            os.set_blocking(self.fd, False)
            self._blocking = True

    def _reopen(self, mode: int, writing: bool) -> None:
        """Open a pipe or a terminal a second time; leave all as it is where that cannot be."""
        if mode == _S_IFCHR and os.major(os.fstat(self.number).st_rdev) not in _TERMINALS:
            return
        flags = os.O_WRONLY if writing else os.O_RDONLY
        flags |= os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            self.fd = os.open(f"/proc/self/fd/{self.number}", flags)
        except OSError:
            self.fd = self.number

    # --- waiting -------------------------------------------------------------------------------

    def want_read(self, wanted: bool) -> None:
        """Say whether ``on_read`` is to be called. Costs nothing where nothing changes."""
        if wanted is self._read or self.closed:
            return
        self._read = wanted
        if self.always:
            self._schedule()
        elif not wanted:
            self._loop.remove_reader(self.fd)
        else:
            try:
                self._loop.add_reader(self.fd, self._readable)
            except PermissionError:
                self._cannot_wait()

    def want_write(self, wanted: bool) -> None:
        """Say whether ``on_write`` is to be called."""
        if wanted is self._write or self.closed:
            return
        self._write = wanted
        if self.always:
            self._schedule()
        elif not wanted:
            self._loop.remove_writer(self.fd)
        else:
            try:
                self._loop.add_writer(self.fd, self._writable)
            except PermissionError:
                self._cannot_wait()

    def want_hangup(self, wanted: bool) -> None:
        """Say whether ``on_hangup`` is to be called, once, when the other side is gone."""
        if wanted is self._hangup or self.closed or self.always:
            return
        self._hangup = wanted
        if not wanted:
            self._hangups().remove_hangup(self.fd)
        else:
            try:
                self._hangups().add_hangup(self.fd, self._gone)
            except PermissionError:
                self._cannot_wait()

    def _hangups(self) -> Hangups:
        """Return what tells of hang-ups: the Reactor itself, or something beside asyncio's loop."""
        if hasattr(self._loop, "add_hangup"):
            return self._loop  # type: ignore[return-value]
        # In large processes only; it would cost the small ones a module.
        from sluice.flow.hangup import of

        return of(self._loop)

    def _cannot_wait(self) -> None:
        """Treat a descriptor that epoll refuses as always ready; nothing of it is registered."""
        self.always = True
        self._hangup = False
        self._schedule()

    def _readable(self) -> None:
        self.on_read()

    def _writable(self) -> None:
        self.on_write()

    def _gone(self) -> None:
        self._hangup = False
        self.on_hangup()

    def _schedule(self) -> None:
        """Run the wanted callbacks of a descriptor that is always ready, in the next round."""
        if not self._soon and (self._read or self._write):
            self._soon = True
            self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        self._soon = False
        if self._read and not self.closed:
            self.on_read()
        if self._write and not self.closed:
            self.on_write()
        if not self.closed:
            self._schedule()

    def write(self, data: bytes | memoryview) -> int:
        """Write some of ``data`` without waiting, whatever the flags; raises as os.write does.

        Where a pipe may block, what it surely takes once it is ready is PIPE_BUF, 4096 bytes.
        """
        if self._borrowed and not self.always:
            poll = select.poll()
            poll.register(self.fd, select.POLLOUT)
            if not poll.poll(0):
                raise BlockingIOError
            data = data[:4096]
        return os.write(self.fd, data)

    def grow(self) -> None:
        """Give a pipe that carries much more room; being refused (EPERM, EBUSY) is normal."""
        global _grown_now
        if not self.is_pipe or self.closed or self._grown or _grown_now >= _GROWN_MOST:
            return
        try:
            if fcntl.fcntl(self.fd, fcntl.F_GETPIPE_SZ) < GROWN:
                fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, GROWN)
                self._grown = True
                _grown_now += 1
        except OSError:
            pass

    # --- ending --------------------------------------------------------------------------------

    def shutdown(self, *, reading: bool) -> None:
        """End one direction of a socket; harmless where it has ended already."""
        if self.closed or not self.is_socket:
            return
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, self.fd)
        try:
            sock.shutdown(_socket.SHUT_RD if reading else _socket.SHUT_WR)
        except OSError:
            pass
        finally:
            sock.detach()

    def end_reading(self) -> None:
        """Read no more: a socket may still be written, anything else is closed."""
        self.want_read(False)
        if self.is_socket:
            self.shutdown(reading=True)
        else:
            self.close()

    def end_writing(self) -> None:
        """Write no more, which the other side sees as end-of-file; a socket may still be read."""
        self.want_write(False)
        self.want_hangup(False)
        if self.is_socket:
            self.shutdown(reading=False)
        else:
            self.close()

    def close(self) -> None:
        """Stop waiting, give the descriptor back as it came, and close it. May be repeated."""
        global _grown_now
        if self.closed:
            return
        if self._grown:
            self._grown = False
            _grown_now -= 1
        self.want_read(False)
        self.want_write(False)
        self.want_hangup(False)
        self.closed = True
        if self._borrowed:
            return
        if self._blocking:
            self._give_back()
        if self.fd != self.number:
            os.close(self.fd)
        close_fd(self.number)

    def share_flags(self, other: Endpoint) -> None:
        """Say that ``other`` may be the same open file: what runs a program on a socket pair often
        puts one end on both its stdin and its stdout."""
        if self.is_socket and other.is_socket and os.path.sameopenfile(self.fd, other.fd):
            self._twin, other._twin = other, self

    def _give_back(self) -> None:
        """Take O_NONBLOCK back; or leave that to the twin, while it is in use."""
        twin = self._twin
        if twin is not None and not twin.closed:
            twin._blocking = True
            return
        try:  # noqa: SIM105
            os.set_blocking(self.fd, True)
        except OSError:
            pass


def close_fd(fd: int) -> None:
    """Close a descriptor (-1: none); put /dev/null in the place of one of 0 to 2."""
    if fd < 0:
        return
    if fd > 2:
        os.close(fd)
        return
    try:
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        os.close(fd)
        return
    os.dup2(null, fd)
    os.close(null)
