"""What an agent does to its own process and its surroundings, once or at its end.

docs/spec/wire-protocol.md 7.2, 7.4.
"""

from __future__ import annotations

import _socket
import os
import stat

MEMINFO_PID_FILE = "/var/run/meminfo-writer.pid"


def poke_meminfo(path: str = MEMINFO_PID_FILE) -> None:
    """Tell meminfo-writer, where there is one, that the domain is up: SIGUSR1 (7.4)."""
    try:
        with open(path, "rb") as file:
            pid = int(file.read(16))
        if 2 <= pid <= 65535:
            os.kill(pid, 10)
    except (OSError, ValueError):
        pass


def end_session(pid: int) -> None:
    """Kill the process group that ``pid`` leads: with the domain its processes end."""
    try:  # noqa: SIM105
        os.killpg(pid, 9)
    except OSError:
        pass


def notify_ready() -> None:
    """Tell systemd that we are up, where NOTIFY_SOCKET asks for it (7.2 step 4)."""
    path = os.environ.pop("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    notifier = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        notifier.sendto(b"READY=1", address)
    except OSError:
        pass
    finally:
        notifier.close()


def keep_descriptors_private() -> None:
    """Have 0, 1 and 2 open, and every other inherited descriptor closed at exec."""
    while True:
        fd = os.open("/dev/null", os.O_RDWR)
        if fd > 2:
            os.close(fd)
            break
        os.set_inheritable(fd, True)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:  # noqa: SIM105
                os.set_inheritable(int(name), False)
            except OSError:
                pass


def spare_stderr() -> None:
    """Have writes to a stderr that nobody reads fail instead of waiting: a log must stop nobody."""
    if stat.S_ISFIFO(os.fstat(2).st_mode):
        os.set_blocking(2, False)
