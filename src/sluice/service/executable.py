"""Finding out beforehand what executing a program would fail with.

Theory. Where a program is executed directly, the kernel says what is wrong with it. Where a
launcher stands in front (to change the user, to lower a limit), the kernel tells the launcher,
which makes statuses of its own of it, takes 126 for what is 125 here, and even runs a file of an
unknown format as a script of the shell. So we look ourselves before. What cannot be seen here (a
library that is missing, say) is left to the launcher. docs/spec/wire-protocol.md 9.2, 9.3.1.
"""

from __future__ import annotations

import os
import stat

from sluice.service.command import ServiceError
from sluice.wire.messages import EXIT_FAILURE, EXIT_NOT_FOUND
from sluice.wire.names import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# What the kernel looks at.
HEAD = 256
ACCESS_LIST = "system.posix_acl_access"


class Identity:
    """Who is to execute something: a user id and all group ids."""

    __slots__ = ("groups", "uid")

    def __init__(self, uid: int, groups: Sequence[int]) -> None:
        """Keep both."""
        self.uid = uid
        self.groups = groups


def check_program(path: bytes, identity: Identity | None = None) -> None:
    """Raise ServiceError where ``path`` cannot be executed (as ``identity``, if given).

    With code 127 where it or its interpreter does not exist, else 125.
    """
    shown = escape(path)
    try:
        status = os.stat(path)
    except OSError as error:
        code = EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_FAILURE
        raise ServiceError(f"{shown}: {error.strerror}", code) from error
    if stat.S_ISDIR(status.st_mode):
        raise ServiceError(f"{shown}: is a directory")
    if identity is not None and not _allowed(path, status, identity):
        raise ServiceError(f"{shown}: the user with the id {identity.uid} may not execute it")
    head = _head(path)
    if head is None or head.startswith(b"\x7fELF"):
        return
    if not head.startswith(b"#!"):
        raise ServiceError(f"{shown}: begins neither with #! nor as a program")
    _check_interpreter(shown, head[2:].split(b"\n")[0].replace(b"\t", b" ").strip(b" "))


def _head(path: bytes) -> bytes | None:
    """Return what a file begins with; None where it may be executed but not read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return os.read(descriptor, HEAD)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _check_interpreter(shown: str, line: bytes) -> None:
    """Check the first line of a script. Nothing but a blank ends the name: no carriage return."""
    interpreter = line.split(b" ")[0]
    if not interpreter:
        raise ServiceError(f"{shown}: names no interpreter")
    name = f"its interpreter {escape(interpreter)}"
    try:
        mode = os.stat(interpreter).st_mode
    except FileNotFoundError as error:
        raise ServiceError(f"{shown}: {name} is missing", EXIT_NOT_FOUND) from error
    except OSError as error:
        raise ServiceError(f"{shown}: {name}: {error.strerror}") from error
    if not stat.S_ISREG(mode) or not mode & 0o111:
        raise ServiceError(f"{shown}: {name} is not executable")


def _allowed(path: bytes, status: os.stat_result, identity: Identity) -> bool:
    """Tell whether the mode of a file lets somebody execute it."""
    mode = status.st_mode
    if identity.uid == 0:
        return bool(mode & 0o111)
    if identity.uid == status.st_uid:
        return bool(mode & 0o100)
    if bool(mode & 0o010) if status.st_gid in identity.groups else bool(mode & 0o001):
        return True
    try:
        # Such a list may allow what the mode does not: the kernel will know.
        return bool(os.getxattr(path, ACCESS_LIST))
    except OSError:
        return False
