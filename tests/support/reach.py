"""A checkout below a directory that is root's alone, as /root is, for tests that run as others.

Root's tests start programs of the checkout as ordinary users, who cannot get through such a
directory. Its modes are not ours to change. So the tests get a mount namespace of their own, in
which a directory that anybody may enter lies over the closed one, with nothing in it but the
checkout at its old place.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_NEWNS = 0x20000
_BIND, _REC, _PRIVATE = 0x1000, 0x4000, 0x40000


def closed(checkout: Path) -> Path | None:
    """Return the first directory on the way to ``checkout`` that others cannot enter, or None."""
    for place in reversed(checkout.parents):
        if not place.stat().st_mode & 0o001:
            return place
    return None


def open_way(checkout: Path) -> None:
    """Let others reach ``checkout`` (a path without links), in a mount namespace of our own.

    For root, and in the only thread. Raises OSError where that namespace cannot be had.
    """
    cover = closed(checkout)
    if cover is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    here = Path.cwd()
    _check(libc.unshare(_NEWNS))
    # Nothing of what follows shows outside.
    _check(libc.mount(None, b"/", None, ctypes.c_ulong(_REC | _PRIVATE), None))
    held = os.open(checkout, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check(libc.mount(b"tmpfs", os.fsencode(cover), b"tmpfs", ctypes.c_ulong(0), b"mode=0755"))
        path = cover
        for name in checkout.relative_to(cover).parts:
            path /= name
            path.mkdir()
            path.chmod(0o755)
        source, flags = f"/proc/self/fd/{held}".encode(), ctypes.c_ulong(_BIND | _REC)
        _check(libc.mount(source, os.fsencode(checkout), None, flags, None))
    finally:
        os.close(held)
    # The directory where we are lies below the closed one still.
    os.chdir(here if here.is_dir() else checkout)


def _check(result: int) -> None:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
