"""Where the resident proxy's sockets lie, and who may speak there (docs/spec/proxy.md 2).

The launcher loads this for each call, so it imports next to nothing. A directory is used only if it
is the system's (made by systemd or root) or belongs to the user himself.
"""

from __future__ import annotations

import _socket
import os
import struct

from sluice.flow.connecting import connect_within

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

LAUNCHER, RAW, CONTROL = "launcher.sock", "raw.sock", "control.sock"
SYSTEM_DIRECTORY = "/run/sluice-proxy"
VARIABLE = "SLUICE_PROXY_SOCKETS"
# The kernel's sockaddr_un has room for 107 bytes and a NUL.
MAX_PATH = 107
_UCRED = "3i"


def directories(env: Mapping[str, str] | None = None) -> list[str]:
    """Return the directories in which sockets may lie, in the order in which they are tried.

    SLUICE_PROXY_SOCKETS names the only one; else it is the system's and then the user's.
    """
    env = os.environ if env is None else env
    if env.get(VARIABLE):
        return [env[VARIABLE]]
    uid = os.geteuid()
    runtime = env.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}"
    return [SYSTEM_DIRECTORY, f"{runtime}/sluice-proxy", f"/tmp/sluice-proxy-{uid}"]  # noqa: S108


def make_directory(env: Mapping[str, str] | None = None) -> str | None:
    """Return the directory for a server's sockets, made with mode 0700 if need be; None for none.

    One that exists must belong to us, and nobody else may write to it.
    """
    for path in directories(env):
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        except OSError:
            continue
        try:
            status = os.lstat(path)
        except OSError:
            continue
        ours = status.st_uid == os.geteuid() and status.st_mode & 0o170022 == 0o040000
        if ours and os.access(path, os.W_OK):
            return path
    return None


def find(name: str, env: Mapping[str, str] | None = None) -> str | None:
    """Return the path of a server's socket, from the first directory that has it."""
    for directory in directories(env):
        path = f"{directory}/{name}"
        if os.path.exists(path):
            return path
    return None


def peer_user(sock: _socket.socket) -> int:
    """Return the uid of who is at the other end of a connected Unix socket."""
    raw = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, struct.calcsize(_UCRED))
    uid: int = struct.unpack(_UCRED, raw)[1]
    return uid


def is_trusted_peer(sock: _socket.socket) -> bool:
    """Tell whether the other end is our own user or root, who can do all that we can."""
    return peer_user(sock) in (os.geteuid(), 0)


def connect(path: str, kind: int, timeout: float) -> _socket.socket:
    """Connect to a server's socket; sending and receiving then wait ``timeout`` seconds at most.

    Raises OSError; PermissionError where it is another user who listens there.
    """
    sock = _socket.socket(_socket.AF_UNIX, kind | _socket.SOCK_CLOEXEC)
    try:
        connect_within(sock, path, timeout)
        set_timeout(sock, timeout)
        if not is_trusted_peer(sock):
            raise PermissionError(1, "another user listens there")
    except BaseException:
        sock.close()
        raise
    return sock


def set_timeout(sock: _socket.socket, seconds: float) -> None:
    """Let a blocking socket wait for so long in each operation; 0 for as long as it takes."""
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, value)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, value)
