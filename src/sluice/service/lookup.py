"""Finding the file that answers a service call.

Theory. A service is a file in one of a few directories, named after the call: first
``SERVICE+ARGUMENT`` is tried in every directory, then ``SERVICE`` in every directory, so that a
specific entry in the last directory wins over a general one in the first. What is found is a
program, a Unix socket, or a symbolic link that spells a TCP address (``/dev/tcp/HOST/PORT``).
Configuration files are found by the same two passes. docs/spec/wire-protocol.md 9.2.
"""

from __future__ import annotations

import errno
import os
import stat

from sluice.service.command import Command, ServiceError
from sluice.wire.messages import EXIT_NOT_FOUND, NAME_MAX
from sluice.wire.names import escape

DEFAULT_SERVICE_PATH = "/run/qubes-rpc:/usr/local/etc/qubes-rpc:/etc/qubes-rpc"
SERVICE_PATH_VARIABLE = "QREXEC_SERVICE_PATH"
MAX_PATH = 1024  # NUL included
TCP_TARGET = b"/dev/tcp"

EXECUTABLE = "executable"
SOCKET = "socket"
TCP = "tcp"


class Found:
    """What answers a service: ``kind`` (executable, socket, tcp) and where it is.

    ``path`` is the path as found; ``address`` the target text of a TCP link, else empty.
    """

    __slots__ = ("address", "kind", "path")

    def __init__(self, kind: str, path: bytes, address: bytes = b"") -> None:
        """Keep the three facts."""
        self.kind = kind
        self.path = path
        self.address = address


def split_path(path: str) -> list[bytes]:
    """Split a search list at colons: runs count as one, a leading one means the root (9.2)."""
    parts = os.fsencode(path).split(b":")
    directories = [part for part in parts if part]
    if parts[0] == b"" and len(parts) > 1:
        directories.insert(0, b"")
    return directories


def _look_at(path: bytes, tcp: bool) -> tuple[bytes, bytes] | None:
    """Judge one candidate: (path, TCP target or empty), None for "try the next"; or raise."""
    try:
        status = os.lstat(path)
        if not stat.S_ISLNK(status.st_mode):
            return path, b""
        if tcp:
            target = os.readlink(path)
            if target == TCP_TARGET or target.startswith(TCP_TARGET + b"/"):
                if target == TCP_TARGET + b"/":
                    raise ServiceError(f"{escape(path)}: a link to /dev/tcp/ names no address")
                return path, target
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise ServiceError(f"{escape(path)}: {error.strerror}") from error
    return path, b""


def search(
    names: tuple[bytes, bytes], directories: list[bytes], *, tcp: bool
) -> tuple[bytes, bytes] | None:
    """Run the two passes for (specific, general) name; None where nothing is found (9.2).

    Returns the path and the target text of a ``/dev/tcp`` link (only looked for with ``tcp``).
    Raises ServiceError with code 125 at the first error other than "does not exist".
    """
    for name in names:
        if len(name) > NAME_MAX:
            continue
        for directory in directories:
            path = directory + b"/" + name
            if len(path) + 1 > MAX_PATH:
                raise ServiceError(f"a path of {len(path)} bytes is too long: {escape(path)}")
            found = _look_at(path, tcp)
            if found is not None:
                return found
    return None


def find_service(command: Command, path: str | None = None) -> Found:
    """Find what answers ``command``, which must be a service call (9.2).

    ``path`` replaces the search list of QREXEC_SERVICE_PATH or the default. Raises ServiceError:
    127 where there is no such service, 125 for every other trouble.
    """
    if path is None:
        path = os.environ.get(SERVICE_PATH_VARIABLE, DEFAULT_SERVICE_PATH)
    found = search((command.lookup, command.service), split_path(path), tcp=True)
    if found is None:
        raise ServiceError(f"no service {escape(command.descriptor)} in {path}", EXIT_NOT_FOUND)
    location, address = found
    if address:
        return Found(TCP, location, address)
    return Found(_kind(location), location)


def find_program(name: bytes, path: str | None = None) -> bytes | None:
    """Find the executable ``name`` in the service directories, or None (7.4.4)."""
    if path is None:
        path = os.environ.get(SERVICE_PATH_VARIABLE, DEFAULT_SERVICE_PATH)
    found = search((name, name), split_path(path), tcp=False)
    return found[0] if found is not None and _kind(found[0]) == EXECUTABLE else None


def _kind(path: bytes) -> str:
    """Tell a socket from a program; anything else is an error."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ServiceError(f"{escape(path)}: {error.strerror}") from error
    if stat.S_ISSOCK(mode):
        return SOCKET
    if os.access(path, os.X_OK, effective_ids=True):
        return EXECUTABLE
    raise ServiceError(f"{escape(path)} is neither executable nor a socket, and no link to one")
