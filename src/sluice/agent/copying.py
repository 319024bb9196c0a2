"""Sending and receiving a file or a tree over a pipe: ``sluice cp``, both ends.

Theory. A stream of entries. Each has a header (``HEADER``: kind, mode, size, length of the name),
the name (one component, none for what is at the top), then the bytes of a file. A directory is
entered by its entry and left by ``UP``. Whoever receives trusts nothing: names are checked,
everything is made new, relative to an open directory, and no link is ever followed or made. Links
and special files are left out by the sender. On the host the receiver also leaves some of the disk
free, whatever sizes it is told. Small programs load this.
"""

import errno
import os
import stat
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = struct.Struct("<BHQH")
FILE, DIRECTORY, UP, END = range(4)
CHUNK = 1 << 18
MAX_NAME = 255
MAX_DEPTH = 256
_ZEROS = bytes(CHUNK)
# Of a file system that is the host's: so much stays free, of its room and of its files.
_RESERVE = 256 << 20
_RESERVED_SHARE = 16

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class CopyError(Exception):
    """What was sent makes no sense, or could not be read or made. The text may hold a name."""


def _write(descriptor: int, data: "bytes | memoryview") -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def unfit(name: bytes) -> bool:
    """Tell whether a name is a trap: for a path, or for whoever sees it listed on a terminal.

    Controls are legal in names, C1 controls and those that turn text around too.
    """
    if not name or b"/" in name or name in (b".", b".."):
        return True
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = name.decode("latin-1")
    return any(
        code < 0x20 or 0x7F <= code < 0xA0 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
        for code in map(ord, text)
    )


def send(stream: int, path: str) -> "list[str]":
    """Send what ``path`` is; returns what was left out. Raises CopyError, BrokenPipeError.

    What cannot be read is a CopyError when all else has been sent.
    """
    skipped: list[str] = []
    unread: list[str] = []
    try:
        # The one who gave the path may mean a link; below it none is followed.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CopyError(f"{path}: {error.strerror}") from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        os.close(descriptor)
        raise CopyError(f"{path}: is neither a file nor a directory")
    _send_open(stream, descriptor, b"", skipped, unread, 0)
    _write(stream, HEADER.pack(END, 0, 0, 0))
    if unread:
        more = f", nor {len(unread) - 1} more" if unread[1:] else ""
        raise CopyError(f"{unread[0]} cannot be read{more}; all else was copied")
    return skipped


def _send_open(
    stream: int,
    descriptor: int,
    name: bytes,
    skipped: "list[str]",
    unread: "list[str]",
    depth: int,
) -> None:
    """Send one open file or directory, and close it."""
    try:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode):
            _send_file(stream, descriptor, name, found)
        elif stat.S_ISDIR(found.st_mode) and depth < MAX_DEPTH:
            _write(stream, HEADER.pack(DIRECTORY, found.st_mode & 0o777, 0, len(name)) + name)
            for below in sorted(map(os.fsencode, os.listdir(descriptor))):
                try:
                    opened = os.open(below, _READ, dir_fd=descriptor)
                except OSError as error:
                    special = error.errno in (errno.ELOOP, errno.ENXIO)  # a link, a socket
                    (skipped if special else unread).append(os.fsdecode(below))
                    continue
                _send_open(stream, opened, below, skipped, unread, depth + 1)
            _write(stream, HEADER.pack(UP, 0, 0, 0))
        else:
            skipped.append(os.fsdecode(name))
    finally:
        os.close(descriptor)


def _send_file(stream: int, descriptor: int, name: bytes, found: os.stat_result) -> None:
    size = found.st_size
    _write(stream, HEADER.pack(FILE, found.st_mode & 0o777, size, len(name)) + name)
    while size:
        data = os.read(descriptor, min(size, CHUNK))
        if not data:  # it became shorter meanwhile; the size was promised
            raise CopyError(f"{os.fsdecode(name)}: changed while it was read")
        _write(stream, data)
        size -= len(data)


class Receiver:
    """Takes a stream of entries and makes them below an open directory."""

    def __init__(
        self, read: "Callable[[int], bytes]", parent: int, top: bytes, *, reserve: bool = False
    ) -> None:
        """``read(n)`` returns exactly n bytes or raises; ``top`` is the name of the first entry.

        ``reserve``: leave some of the file system free.
        """
        self._read = read
        self._top = top
        self._reserve = reserve
        # The sender does not decide that everybody may write here.
        self._mask = os.umask(0o077)
        os.umask(self._mask)
        # Open directories from ``parent`` down, each with the mode it gets when it is left.
        self._open = [(os.dup(parent), -1)]

    def run(self) -> None:
        """Receive all. Raises CopyError."""
        first = True
        try:
            while True:
                kind, mode, size, name_size = HEADER.unpack(self._read(HEADER.size))
                if kind == END and len(self._open) == 1 and not first:
                    return
                if first and name_size:
                    raise CopyError("the first entry has a name")
                name = self._top if first else self._name(name_size)
                if not first and len(self._open) == 1:
                    raise CopyError("more than one entry at the top")
                first = False
                self._entry(kind, mode & 0o777, size, name)
        finally:
            while self._open:
                os.close(self._open.pop()[0])

    def _name(self, size: int) -> bytes:
        return self._read(size) if 0 < size <= MAX_NAME else b""

    def _entry(self, kind: int, mode: int, size: int, name: bytes) -> None:
        here = self._open[-1][0]
        if kind == UP:
            if len(self._open) < 2:
                raise CopyError("a directory is left that was not entered")
            descriptor, left_mode = self._open.pop()
            os.fchmod(descriptor, left_mode & ~self._mask)
            os.close(descriptor)
            return
        if unfit(name):
            raise CopyError(f"{os.fsdecode(name)!r}: a name that cannot be")
        if self._reserve:
            self._leave_some_free(here, size)
        try:
            if kind == FILE:
                self._file(here, name, mode, size)
            elif kind == DIRECTORY and len(self._open) <= MAX_DEPTH:
                os.mkdir(name, 0o700, dir_fd=here)
                self._open.append((os.open(name, _DIRECTORY, dir_fd=here), mode | 0o700))
            else:
                raise CopyError("an entry of a kind that there is not")
        except OSError as error:
            raise CopyError(f"{os.fsdecode(name)}: {error.strerror}") from error

    def _file(self, here: int, name: bytes, mode: int, size: int) -> None:
        descriptor = os.open(name, _NEW, 0o600, dir_fd=here)
        left = size
        try:
            while left:
                data = self._read(min(left, CHUNK))
                if data == _ZEROS[: len(data)]:
                    os.lseek(descriptor, len(data), os.SEEK_CUR)  # a hole takes no room
                else:
                    _write(descriptor, data)
                left -= len(data)
            os.ftruncate(descriptor, size)
            os.fchmod(descriptor, mode & ~self._mask)
        except BaseException:
            os.unlink(name, dir_fd=here)  # half a file is none
            raise
        finally:
            os.close(descriptor)

    def _leave_some_free(self, here: int, size: int) -> None:
        """Refuse an entry that would fill the file system. Raises CopyError."""
        room = os.fstatvfs(here)
        reserve = min(_RESERVE, room.f_blocks * room.f_frsize // _RESERVED_SHARE)
        if room.f_bavail * room.f_frsize < size + reserve:
            raise CopyError(f"{size >> 20} MiB more: there is not enough room here")
        if room.f_files and room.f_favail < room.f_files // _RESERVED_SHARE:
            raise CopyError("too many files for what is free here")


def receive(stream: int, destination: str, name_below: str = "", *, reserve: bool = False) -> None:
    """Receive as ``destination``, a name that does not exist yet. Raises CopyError.

    Where it is a directory and ``name_below`` is given, as that name in it. ``reserve``: leave some
    of the file system free.
    """
    if name_below and os.path.isdir(destination):
        destination = os.path.join(destination, name_below)
    parent, name = os.path.split(os.path.normpath(destination))
    try:
        directory = os.open(parent or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CopyError(f"{parent}: {error.strerror}") from error

    def read(size: int) -> bytes:
        pieces = []
        while size:
            piece = os.read(stream, size)
            if not piece:
                raise CopyError("the stream ended too early")
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    try:
        Receiver(read, directory, os.fsencode(name), reserve=reserve).run()
    finally:
        os.close(directory)


def main(arguments: "list[str]") -> int:
    """Run ``sluice-copy send PATH`` or ``sluice-copy receive PATH [NAME]`` inside a domain."""
    if len(arguments) not in (2, 3) or arguments[0] not in ("send", "receive"):
        os.write(2, b"usage: sluice-copy send PATH | receive PATH [NAME]\n")
        return 2
    home = os.environ.get("HOME", "/")
    path = os.path.join(home, os.path.expanduser(arguments[1]))
    try:
        if arguments[0] == "send":
            skipped = send(1, path)
            if skipped:
                more = f" and {len(skipped) - 1} more" if skipped[1:] else ""
                said = f"left out (not a file or directory): {skipped[0]}{more}\n"
                os.write(2, said.encode("utf-8", "backslashreplace"))
        else:
            receive(0, path, *arguments[2:])
    except CopyError as error:
        os.write(2, f"{error}\n".encode("utf-8", "backslashreplace"))
        return 1
    except OSError as error:
        if error.errno != errno.EPIPE:
            os.write(2, f"{error.strerror}\n".encode())
        return 1
    return 0
