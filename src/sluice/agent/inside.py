"""What process 1 of a domain does before it is the agent: furnish the domain.

Theory. The domain's own tree is hostile to everything outside, so nothing outside ever writes into
it. The AdminVM hands an archive over instead (a descriptor named in SLUICE_INIT_FD), and this code,
inside, with the domain's own powers, lays the files. A link that the domain planted leads, at
worst, to another place of the same domain; even so no link is followed.

The archive is a sequence of entries, each a header (``ENTRY``: flags, mode, length of the path,
length of the data), the path below ``/``, the data. Used by small programs and by the AdminVM.
docs/spec/core-stack.md 2.7, 11, 12.4.1.
"""

import errno
import os
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

ENTRY = struct.Struct("<BHHI")
EACH_START = 0  # laid at every start, replacing what is there
FIRST_START = 1  # laid when the domain's tree is new
OWNED_BY_USER = 2  # belongs to the default user, also the directories on the way

INIT_VARIABLE = "SLUICE_INIT_FD"
LIMIT_VARIABLE = "SLUICE_SERVICE_DESCRIPTORS"
CONTROL_VARIABLE = "SLUICE_CONTROL_FD"
USER_VARIABLE = "SLUICE_USER_ID"
# Everybody may write in /run; what must be root's in it is made before anything else runs.
DIRECTORIES = (
    ("/run/lock", 0o1777),
    ("/run/qubes", 0o755),
    ("/run/qubes-rpc", 0o755),
    ("/run/qubes/rpc-config", 0o755),
    ("/run/qubes-service", 0o755),
    ("/run/sluice", 0o755),
    ("/run/user", 0o755),
)
FRESH_MARK = "/rw/config"
RC_LOCAL = "/rw/config/rc.local"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def pack(flags: int, mode: int, path: str, data: bytes) -> bytes:
    """Return one entry of an archive; ``path`` is absolute and normal."""
    name = os.fsencode(path.lstrip("/"))
    return ENTRY.pack(flags, mode, len(name), len(data)) + name + data


def unpack(archive: bytes) -> "Iterator[tuple[int, int, bytes, bytes]]":
    """Yield (flags, mode, path below /, data) of each entry."""
    at = 0
    while at < len(archive):
        flags, mode, path_size, size = ENTRY.unpack_from(archive, at)
        at += ENTRY.size
        path = archive[at : at + path_size]
        at += path_size
        yield flags, mode, path, archive[at : at + size]
        at += size


def lay(root: int, path: bytes, mode: int, data: bytes, owner: int = -1) -> None:
    """Write one file below the open directory ``root``, making directories on the way.

    No link is followed; what is at the place is replaced in one step. ``owner`` (a uid that is a
    gid too, or -1) gets the file and every directory that had to be made. Raises OSError.
    """
    parts = [part for part in path.split(b"/") if part]
    here = os.open(".", _DIRECTORY, dir_fd=root)
    try:
        for part in parts[:-1]:
            here = _enter(here, part, owner)
        temporary = b".sluice-new-%d" % os.getpid()
        _unlink(temporary, here)
        made = os.open(temporary, _NEW_FILE, 0o600, dir_fd=here)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(made, view) :]
            if owner >= 0:
                os.fchown(made, owner, owner)
            os.fchmod(made, mode)
        finally:
            os.close(made)
        os.rename(temporary, parts[-1], src_dir_fd=here, dst_dir_fd=here)
    finally:
        os.close(here)


def _enter(here: int, part: bytes, owner: int) -> int:
    """Open a directory below ``here``, made if need be, and close ``here``."""
    try:
        try:
            return os.open(part, _DIRECTORY, dir_fd=here)
        except FileNotFoundError:
            os.mkdir(part, 0o755, dir_fd=here)
            below = os.open(part, _DIRECTORY, dir_fd=here)
            if owner >= 0:
                os.fchown(below, owner, owner)
            return below
    finally:
        os.close(here)


def _unlink(name: bytes, directory: int) -> None:
    try:  # noqa: SIM105
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass


def furnish(archive: bytes, user: int, root_path: str = "/") -> "list[str]":
    """Lay an archive; returns what could not be laid, one text each. Never raises for a file."""
    failures = []
    fresh = not os.path.lexists(os.path.join(root_path, FRESH_MARK[1:]))
    root = os.open(root_path, _DIRECTORY)
    try:
        for flags, mode, path, data in unpack(archive):
            if flags & FIRST_START and not fresh:
                continue
            try:
                lay(root, path, mode, data, user if flags & OWNED_BY_USER else -1)
            except OSError as error:
                failures.append(f"/{os.fsdecode(path)}: {error.strerror}")
    finally:
        os.close(root)
    return failures


def _read_all(descriptor: int) -> bytes:
    pieces = []
    while piece := os.read(descriptor, 1 << 20):
        pieces.append(piece)
    os.close(descriptor)
    return b"".join(pieces)


def hide_from_others() -> None:
    """Forbid everybody else in the domain to look into this process or to trace it.

    Where a domain has one user, what it runs has the same user id as its agent. PR_SET_DUMPABLE 0
    makes the agent's memory and descriptors root's, as the kernel sees it.
    """
    import _ctypes

    class Number(_ctypes._SimpleCData):  # type: ignore[type-arg]
        _type_ = "l"

    class Function(_ctypes.CFuncPtr):
        _flags_ = _ctypes.FUNCFLAG_CDECL
        _restype_ = Number

    prctl = Function(_ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl"))  # type: ignore[arg-type]
    prctl(Number(4), Number(0), Number(0), Number(0), Number(0))


def _close_all_but(kept: "set[int]") -> None:
    """Close what the sandbox's set-up has left open: it must not be in reach of the domain."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2 and descriptor not in kept:
            try:  # noqa: SIM105
                os.close(descriptor)
            except OSError:
                pass  # the one that listed the directory


def _run_rc_local() -> None:
    """Start the domain's own start-up script, if it has made it executable; do not wait."""
    limit = os.environ.get(LIMIT_VARIABLE, "unlimited")
    script = 'ulimit -n "$0" 2>/dev/null; exec "$1"'
    try:
        if os.access(RC_LOCAL, os.X_OK):
            argv = ["/bin/sh", "-c", script, limit, RC_LOCAL]
            os.posix_spawn(argv[0], argv, os.environ, setsid=True)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EACCES):
            sys.stderr.write(f"rc.local: {error.strerror}\n")


def _make_session_directory(user: int) -> None:
    """Make what XDG_RUNTIME_DIR names: a place for sockets of the user's own, gone at the end."""
    path = f"/run/user/{user if user >= 0 else os.getuid()}"
    os.mkdir(path, 0o700)
    if user >= 0:
        os.chown(path, user, user)


def main() -> int:
    """Furnish the domain, then be its agent; returns the exit status."""
    os.umask(0o022)
    descriptor = int(os.environ.pop(INIT_VARIABLE, "-1"))
    user = int(os.environ.pop(USER_VARIABLE, "-1"))
    hide_from_others()
    control = int(os.environ.get(CONTROL_VARIABLE, "-1"))
    _close_all_but({descriptor, control})
    if control >= 0:
        # Before anything of the domain's own is started: the channel is for nobody else.
        os.set_inheritable(control, False)
    for directory, mode in DIRECTORIES:
        os.mkdir(directory)
        os.chmod(directory, mode)
    _make_session_directory(user)
    if user >= 0 and not os.path.lexists("/rw/root"):
        os.mkdir("/rw/root", 0o700)
    if descriptor >= 0:
        for failure in furnish(_read_all(descriptor), user):
            sys.stderr.write(f"could not lay {failure}\n")
    _run_rc_local()
    if user >= 0:
        # A saved user id gives no right to us; it lets that user's services signal us (SIGUSR1).
        os.setresuid(-1, -1, user)

    from sluice.agent import users
    from sluice.agent.agent import main as agent

    users.service_descriptors = int(os.environ.pop(LIMIT_VARIABLE, "0"))

    return agent([])
