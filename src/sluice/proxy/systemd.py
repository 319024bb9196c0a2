"""What systemd offers a service: sockets that it opened, and hearing how the service is.

Both are a few bytes each, so nothing of systemd's need be installed (sd_listen_fds(3),
sd_notify(3)). Without systemd there are no sockets and nobody listens.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

FIRST = 3


def listen_fds(env: MutableMapping[str, str] | None = None) -> list[tuple[str, int]]:
    """Return (name, descriptor) of the sockets that systemd opened for this process.

    The variables are removed, so that no child takes them for its own. The name is that of
    ``FileDescriptorName=``, empty where there is none.
    """
    env = os.environ if env is None else env
    count, pid = env.pop("LISTEN_FDS", ""), env.pop("LISTEN_PID", "")
    names = env.pop("LISTEN_FDNAMES", "").split(":")
    if not count.isdecimal() or pid != str(os.getpid()):
        return []
    found = []
    for place in range(int(count)):
        os.set_inheritable(FIRST + place, False)
        found.append((names[place] if place < len(names) else "", FIRST + place))
    return found


class Notifier:
    """Tells systemd the state of the service; does nothing where nobody asked."""

    def __init__(self, env: MutableMapping[str, str] | None = None) -> None:
        """Take NOTIFY_SOCKET out of the environment."""
        env = os.environ if env is None else env
        self._path = env.pop("NOTIFY_SOCKET", "")

    def _send(self, *lines: str) -> None:
        if not self._path:
            return
        path = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        # The manager may be gone or restarting; it asks again when it wants to know.
        with socket.socket(socket.AF_UNIX, kind) as sock, contextlib.suppress(OSError):
            sock.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, path)

    def ready(self, status: str) -> None:
        """Say that the service serves."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """Say in a line what goes on."""
        self._send(f"STATUS={status}")

    def reloading(self) -> None:
        """Say that the configuration is being read; ``ready`` ends that."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        """Say that the service ends."""
        self._send("STOPPING=1", f"STATUS={status}")
