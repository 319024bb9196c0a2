"""The proxy's log: journald where there is one, else syslog, stderr or a file; never stdout.

docs/spec/proxy.md 8. In the program form standard error leads to the source, so it is not used
there. Each line is escaped here once more, so that nothing of a domain reaches a log raw, and one
call's lines are bounded (section 10).
"""

from __future__ import annotations

import _socket
import os
import time

from sluice.wire.names import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

JOURNAL = "/run/systemd/journal/socket"
SYSLOG = "/dev/log"
IDENTIFIER = "qrexec-proxy"
# Syslog's number for a message of a daemon at the level "info", and "warning".
_FACILITY = 3 << 3
INFO, WARNING, ERROR = 6, 4, 3
_MAX_LINE = 2000
_MAX_FILE = 16 << 20


class Log:
    """Where lines go. ``write`` never raises and never blocks for long."""

    def __init__(self, where: str = "auto", *, stderr: bool = True, fallback: str = "") -> None:
        """Take the setting ``log``; ``stderr`` says whether standard error may be used.

        ``fallback`` is the file that is used where ``auto`` finds nothing else.
        """
        self._socket: _socket.socket | None = None
        self._fd = -1
        self._path = ""
        self._size = 0
        self._journal = False
        if where in ("auto", "journal", "syslog"):
            if where != "syslog":
                self._connect(JOURNAL)
                self._journal = self._socket is not None
            if where != "journal" and self._socket is None:
                self._connect(SYSLOG)
        if self._socket is not None:
            return
        if where in ("auto", "journal", "syslog", "stderr"):
            if stderr:
                self._fd = 2
            elif fallback:
                self._open(fallback)
        else:
            self._open(where)

    def _connect(self, path: str) -> None:
        flags = _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        sock = _socket.socket(_socket.AF_UNIX, flags)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            return
        self._socket = sock

    def _open(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            os.makedirs(os.path.dirname(path) or ".", 0o700, exist_ok=True)
            if os.path.exists(path) and os.path.getsize(path) > _MAX_FILE:
                os.replace(path, path + ".1")
            self._fd = os.open(path, flags, 0o600)
            self._path, self._size = path, os.fstat(self._fd).st_size
        except OSError:
            self._fd = -1

    def write(self, text: str, level: int = INFO) -> None:
        """Write one line; whatever in it is not printable ASCII is escaped."""
        line = escape(text, _MAX_LINE)
        try:
            if self._socket is not None:
                if self._journal:
                    message = f"MESSAGE={line}\nPRIORITY={level}\nSYSLOG_IDENTIFIER={IDENTIFIER}\n"
                else:
                    message = f"<{_FACILITY | level}>{IDENTIFIER}[{os.getpid()}]: {line}"
                self._socket.send(message.encode())
            elif self._fd >= 0:
                stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime()) if self._fd > 2 else ""
                whole = f"{stamp}{IDENTIFIER}[{os.getpid()}]: {line}\n".encode()
                self._size += os.write(self._fd, whole)
                if self._path and self._size > _MAX_FILE:
                    # A server lives long, and what is refused is logged too.
                    self.close()
                    self._open(self._path)
        except OSError:
            # Nobody is there to be told; the audit record still says how the call ended.
            pass

    def of_call(
        self, ident: str, lines: int, clock: Callable[[], float] = time.monotonic
    ) -> CallLog:
        """Return the log of one call: its lines bear ``ident`` and are bounded."""
        return CallLog(self, ident, lines, clock)

    def close(self) -> None:
        """Let go of socket or file."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._fd > 2:
            os.close(self._fd)
        self._fd = -1


class CallLog:
    """The lines of one call: ``most`` a second, then a count of those left out."""

    def __init__(self, log: Log, ident: str, most: int, clock: Callable[[], float]) -> None:
        """Take the log, the call's name in it, the bound and a clock."""
        self._log = log
        self._ident = ident
        self._most = most
        self._clock = clock
        self._second = -1
        self._written = 0
        self._folded = 0

    def __call__(self, text: str, level: int = INFO) -> None:
        """Write a line, or count it."""
        second = int(self._clock())
        if second != self._second:
            self.flush()
            self._second, self._written = second, 0
        if self._written >= self._most:
            self._folded += 1
            return
        self._written += 1
        self._log.write(f"[{self._ident}] {text}", level)

    def flush(self) -> None:
        """Say how many lines were left out, if any were."""
        if self._folded:
            self._log.write(f"[{self._ident}] {self._folded} more lines left out", WARNING)
            self._folded = 0
