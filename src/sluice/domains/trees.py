"""Removing a tree that something hostile has written.

Theory. Names are only ever used relative to an open directory, links are never followed, and no
directory is entered by a path. Depth is no danger: every directory that is found is first moved to
the top, so that nothing is ever deeper than one level. A mount inside is not entered, since it can
neither be moved nor removed. Small programs load this, so it imports ``os`` and ``errno`` only.
docs/spec/core-stack.md 12.3, CORE-174.
"""

import errno
import os

_OPEN = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(parent: int, name: str) -> None:
    """Remove ``name`` below the open directory ``parent``, whatever it is; absent is success.

    ``name`` is one component. Nobody may write in the tree meanwhile. Raises OSError when
    something in it cannot be removed.
    """
    if not name or "/" in name or name in (".", ".."):
        raise ValueError("one name, not a path")
    try:
        top = _open_directory(parent, os.fsencode(name))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        os.unlink(name, dir_fd=parent)
        return
    try:
        _empty(top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=parent)


def _open_directory(parent: int, name: bytes) -> int:
    """Open a directory for reading even where its owner has locked it. A link is ENOTDIR."""
    try:
        handle = os.open(name, _OPEN, dir_fd=parent)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotADirectoryError(error.errno, error.strerror) from error
        raise
    try:
        # By its descriptor: the name could lead elsewhere the second time.
        try:  # noqa: SIM105
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        except PermissionError:
            pass  # somebody else's; perhaps we may read it all the same
        return os.open(".", _READ, dir_fd=handle)
    finally:
        os.close(handle)


def _empty(top: int) -> None:
    """Empty the directory ``top``, moving what is below to its own level."""
    moved = 0
    while True:
        names = os.listdir(top)
        if not names:
            return
        for name in map(os.fsencode, names):
            try:
                below = _open_directory(top, name)
            except NotADirectoryError:
                os.unlink(name, dir_fd=top)
                continue
            try:
                moved = _raise_directories(below, top, moved)
            finally:
                os.close(below)
            os.rmdir(name, dir_fd=top)


def _raise_directories(below: int, top: int, moved: int) -> int:
    """Unlink the files of ``below`` and move its directories to ``top`` under new names."""
    for name in map(os.fsencode, os.listdir(below)):
        try:
            os.unlink(name, dir_fd=below)
        except (IsADirectoryError, PermissionError):
            # A directory without permissions cannot be moved: its ".." would have to change.
            os.close(_open_directory(below, name))
            while True:
                moved += 1
                try:
                    os.rename(name, b".moved-%d" % moved, src_dir_fd=below, dst_dir_fd=top)
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
    return moved
