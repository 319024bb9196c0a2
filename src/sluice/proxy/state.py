"""What filters keep between calls and processes: directories, locks, keys (proxy.md 5.1).

Locks are flock: the kernel lets go of them when a process dies at whatever moment, so nobody waits
for a dead one. A state file is replaced as a whole, so that it is either the old or the new one.
"""

from __future__ import annotations

import errno
import fcntl
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.proxy.link import Call


class StateError(OSError):
    """State cannot be read or kept: who depends on it must refuse."""


def directory(base: str, name: str) -> str:
    """Return ``base/name``, made if need be, ours and nobody else's. Raises StateError."""
    path = os.path.join(base, name)
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        status = os.lstat(path)
    except OSError as error:
        raise StateError(error.errno, error.strerror, path) from None
    if status.st_mode & 0o170000 != 0o040000:
        raise StateError(errno.ENOTDIR, "is no directory", path)
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        raise StateError(errno.EPERM, "can be written by others", path)
    return path


def key(*parts: str) -> str:
    """Return a file name for names that a domain may have chosen."""
    import hashlib

    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def key_of(per: str, stage: str, call: Call) -> str:
    """Return the key of a filter's place in a chain, for all calls that are counted together."""
    who = [call.chain, stage]
    if per != "chain":
        who.append(call.source)
    if per == "source+service+target":
        who += [call.descriptor, call.target]
    return key(*who)


def try_lock(path: str) -> int | None:
    """Return a descriptor that holds the lock of a file, or None where another one has it.

    Closing the descriptor lets go. Raises StateError.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise StateError(error.errno, error.strerror, path) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine, there = os.fstat(fd), os.stat(path)
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            # Removed by who held it, between our opening and locking it: that was another lock.
            os.close(fd)
            continue
        except OSError as error:
            os.close(fd)
            raise StateError(error.errno, error.strerror, path) from None
        if mine.st_ino == there.st_ino:
            return fd
        os.close(fd)


def unlock(fd: int, path: str) -> None:
    """Let go of a lock and remove its file, so that no trace is left of who needed it once."""
    try:  # noqa: SIM105
        os.unlink(path)
    except OSError:
        pass
    os.close(fd)


def read(path: str, limit: int = 1 << 20) -> bytes | None:
    """Return what a state file holds, None where there is none. Raises StateError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(error.errno, error.strerror, path) from None
    try:
        data = os.read(fd, limit + 1)
    except OSError as error:
        raise StateError(error.errno, error.strerror, path) from None
    finally:
        os.close(fd)
    if len(data) > limit:
        raise StateError(errno.EFBIG, "is too large", path)
    return data


def replace(path: str, data: bytes) -> None:
    """Put ``data`` in the place of a state file, on disk, or leave it as it is.

    The temporary name is the same each time, so a killed process leaves at most one behind; the
    caller holds the lock. Raises StateError.
    """
    temporary = path + ".new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(temporary, flags, 0o600)
        try:
            written = os.write(fd, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, "no space left")
            os.fdatasync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError as error:
        raise StateError(error.errno, error.strerror, path) from None
