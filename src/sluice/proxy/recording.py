"""Files that hold a whole call: written by the filter ``record``, read by show and replay.

    "sluice-record 1\\n"  JSON of the call, one line  then frames
    frame: kind (1 byte), seconds since the beginning (f64), length (u32), so many bytes

Kinds: 0 and 1 data of src2dst and dst2src, 2 and 3 the end of these directions, 4 the end of the
call with its cause as text. Numbers are little-endian. A file without frame 4 was cut off.
"""

from __future__ import annotations

import errno
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, BinaryIO

    from sluice.proxy.verdicts import Bytes

MAGIC = b"sluice-record 1\n"
SUFFIX = ".rec"
FRAME = struct.Struct("<BdI")
END_OF = 2
END = 4
_MAX_HEADER = 65536
_BLOCK = 4096


class RecordingError(OSError):
    """The call cannot be recorded (any further), or a file is no record."""


class Recording:
    """A record that is being written. Nobody but us can read it."""

    def __init__(self, directory: str, call: dict[str, Any], allowance: int) -> None:
        """Make a file of a random name in ``directory``; ``allowance`` is the most it may have.

        No part of the name comes from the call, and no link is followed, in the last part of
        ``directory`` neither. Raises RecordingError.
        """
        import json

        self.size = 0
        self.allowance = allowance
        self._fd = -1
        self.path = ""
        try:
            folder = os.open(directory, os.O_DIRECTORY | os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise RecordingError(error.errno, f"{directory}: {error.strerror}") from None
        try:
            if others_can_write(os.fstat(folder)):
                raise RecordingError(errno.EPERM, f"{directory} can be written by others")
            name = os.urandom(12).hex() + SUFFIX
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(name, flags, 0o600, dir_fd=folder)
            self.path = os.path.join(directory, name)
        except RecordingError:
            raise
        except OSError as error:
            raise RecordingError(error.errno, f"{directory}: {error.strerror}") from None
        finally:
            os.close(folder)
        self._write(MAGIC + json.dumps(call, sort_keys=True).encode("ascii") + b"\n")

    def frame(self, kind: int, moment: float, payload: Bytes = b"") -> None:
        """Append a frame. Raises RecordingError where it does not fit or the disk is full."""
        self._write(FRAME.pack(kind, moment, len(payload)), payload)

    def _write(self, *pieces: Bytes) -> None:
        size = sum(map(len, pieces))
        if self.size + size > self.allowance:
            raise RecordingError(errno.EDQUOT, "the record would be larger than is allowed")
        try:
            written = os.writev(self._fd, pieces)
        except OSError as error:
            raise RecordingError(error.errno, error.strerror) from None
        self.size += written
        if written != size:
            raise RecordingError(errno.ENOSPC, "no space left")

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def others_can_write(status: os.stat_result) -> bool:
    """Tell whether a directory is not ours (or root's) alone."""
    return status.st_uid not in (os.geteuid(), 0) or bool(status.st_mode & 0o022)


def space(size: int) -> int:
    """Return what a file of ``size`` bytes takes of a disk, so that small ones count as well."""
    return -(-size // _BLOCK) * _BLOCK


def used(directory: str) -> int:
    """Return how many bytes the records of a directory take on the disk."""
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX):
                try:
                    total += space(max(entry.stat(follow_symlinks=False).st_size, 1))
                except FileNotFoundError:
                    continue
    return total


def read(stream: BinaryIO) -> tuple[dict[str, Any], Iterator[tuple[int, float, bytes]]]:
    """Return the call and an iterator over the frames. Raises RecordingError for another file."""
    import json

    if stream.read(len(MAGIC)) != MAGIC:
        raise RecordingError(errno.EINVAL, "is no record of a call")
    try:
        call = json.loads(stream.readline(_MAX_HEADER))
    except ValueError:
        raise RecordingError(errno.EINVAL, "is damaged") from None
    if not isinstance(call, dict):
        raise RecordingError(errno.EINVAL, "is damaged")
    return call, _frames(stream)


def _frames(stream: BinaryIO) -> Iterator[tuple[int, float, bytes]]:
    while header := stream.read(FRAME.size):
        if len(header) < FRAME.size:
            return
        kind, moment, length = FRAME.unpack(header)
        if kind > END:
            raise RecordingError(errno.EINVAL, "is damaged")
        payload = stream.read(length)
        yield kind, moment, payload
        if len(payload) < length:
            return
