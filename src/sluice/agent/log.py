"""What an agent logs: its own lines, and the stderr of services.

Theory. On a machine with a system log the stderr of a service goes to a ``logger`` process, as
section 9.6 has it, line by line. Where there is none, as in a sandbox, lines
``<descriptor>-<source>: text`` go to the agent's own stderr, which the AdminVM reads. Both are a
courtesy that must never hold up a call: what the log does not take is dropped, and of a service
that floods it the surplus is only counted. What we write ourselves is escaped, for what a service
writes may come from anywhere; a system log sees to that by itself.
"""

from __future__ import annotations

import os
import time

from sluice.service.descriptors import own_limit
from sluice.service.start import RESET_SIGNALS
from sluice.wire.names import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.flow.reactor import Loop

# Lines of one call that are logged at once, and how many a second are added to that.
BURST = 200
RATE = 50.0
MAX_LINE = 1024
MAX_HELD = 65536
SYSTEM_LOGS = ("/dev/log", "/run/systemd/journal/socket")


class Allowance:
    """How many lines may be written: a burst, and so many a second. Counts what had to be left."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Take a clock in seconds."""
        self._clock = clock
        self._left = float(BURST)
        self._refilled = clock()
        self._folded = 0

    def take(self) -> bool:
        """Tell whether a line may be written now."""
        now = self._clock()
        self._left = min(BURST, self._left + (now - self._refilled) * RATE)
        self._refilled = now
        if self._left < 1:
            self._folded += 1
            return False
        self._left -= 1
        return True

    def leave(self) -> None:
        """Count a line that was allowed but could not be written."""
        self._folded += 1

    def folded(self) -> str:
        """Return a remark on the lines left out since the last time, empty where there are none."""
        count, self._folded = self._folded, 0
        return f"({count} lines left out)" if count else ""


class Log:
    """Writes lines to fd 2 with the name of the program in front; a flood is folded."""

    def __init__(
        self,
        program: str,
        write: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the program's name; ``write`` and ``clock`` replace fd 2 and the real time."""
        self._program = program
        self._write = write or write_line
        self._allowance = Allowance(clock)

    def __call__(self, text: str) -> None:
        """Write one line; what stderr does not take is lost."""
        if self._allowance.take():
            if remark := self._allowance.folded():
                self._write(f"{self._program}: {remark}")
            self._write(f"{self._program}: {text}")


def has_system_log() -> bool:
    """Tell whether there is something that ``logger`` could write to."""
    return any(os.path.exists(path) for path in SYSTEM_LOGS)


def write_line(text: str) -> None:
    """Write a line of ASCII to fd 2 in one piece, or drop it."""
    try:  # noqa: SIM105
        os.write(2, text.encode("ascii", "backslashreplace") + b"\n")
    except OSError:
        pass


class Lines:
    """Takes the stderr of one call as bytes, and gives lines, folding a flood. A base class."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Take a clock in seconds."""
        self._partial = bytearray()
        self._allowance = Allowance(clock)

    def _put(self, untrusted_line: bytes) -> bool:
        """Write one line; False where it was dropped."""
        raise NotImplementedError

    def feed(self, untrusted_data: bytes | memoryview) -> None:
        """Take bytes as they came."""
        self._partial += untrusted_data
        if b"\n" not in self._partial and len(self._partial) < MAX_LINE:
            return
        *lines, rest = bytes(self._partial).split(b"\n")
        while len(rest) >= MAX_LINE:
            lines.append(rest[:MAX_LINE])
            rest = rest[MAX_LINE:]
        self._partial = bytearray(rest)
        for line in lines:
            self._emit(line)

    def _emit(self, untrusted_line: bytes) -> None:
        if self._allowance.take():
            self._tell_folded()
            if not self._put(untrusted_line):
                self._allowance.leave()

    def _tell_folded(self) -> None:
        if remark := self._allowance.folded():
            self._put(remark.encode())

    def _end(self) -> None:
        """Write what is left of the last line."""
        if self._partial:
            self._emit(bytes(self._partial))
            self._partial.clear()
        self._tell_folded()


class LineSink(Lines):
    """Writes the stderr of one call as escaped lines."""

    def __init__(
        self,
        loop: Loop,
        tag: bytes,
        write: Callable[[str], None] = write_line,
    ) -> None:
        """Take the call's identity, which stands before every line."""
        super().__init__(loop.time)
        self._loop = loop
        self._tag = escape(tag)
        self._write = write
        self._fd = -1

    def _put(self, untrusted_line: bytes) -> bool:
        self._write(f"{self._tag}: {escape(untrusted_line, MAX_LINE)}")
        return True

    def close(self) -> None:
        """Write what is left of the last line."""
        self._end()

    def take_stderr(self) -> int:
        """Return a descriptor that a process can have as its stderr (JUST_EXEC, 7.4.5).

        It is the receiver's to close. What comes out of it is fed here until its end.
        """
        self._fd, writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._fd, False)
        self._loop.add_reader(self._fd, self._readable)
        return writing

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        if data:
            self.feed(data)
            return
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self.close()


class LoggerSink(Lines):
    """Passes the stderr of one call to the stdin of ``logger -t TAG``, line by line (9.6)."""

    def __init__(self, loop: Loop, tag: bytes, spawned: Callable[[int], None]) -> None:
        """Start the process, whose id goes to ``spawned``. Its failure is nobody's concern."""
        super().__init__(loop.time)
        self._loop = loop
        self._held = bytearray()
        self._closing = False
        self._writing = False
        reading, self._fd = os.pipe2(os.O_CLOEXEC)
        try:
            (stdin,) = own_limit.lower((reading,))
            pid = os.posix_spawnp(
                "logger",
                [b"logger", b"-t", tag],
                os.environb,
                file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0)],
                setsigmask=(),
                setsigdef=RESET_SIGNALS,
            )
            spawned(pid)
        except OSError:
            os.close(self._fd)
            self._fd = -1
        finally:
            own_limit.restore()
            os.close(reading)

    def _put(self, untrusted_line: bytes) -> bool:
        if self._fd < 0 or len(self._held) + len(untrusted_line) >= MAX_HELD:
            return False
        if not self._writing:
            os.set_blocking(self._fd, False)
        self._held += untrusted_line + b"\n"
        self._flush()
        return True

    def _flush(self) -> None:
        try:
            while self._held:
                del self._held[: os.write(self._fd, self._held)]
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._fd, self._flush)
            return
        except OSError:
            self._held.clear()
            self._closing = True
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)
        if self._closing:
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """End the log as soon as what is held has been passed on."""
        if self._fd >= 0 and not self._closing:
            self._end()
            self._closing = True
            if self._fd >= 0 and not self._writing:
                self._flush()

    def take_stderr(self) -> int:
        """Return the descriptor for a process that logs by itself; the receiver closes it."""
        descriptor, self._fd = self._fd, -1
        if descriptor < 0:
            descriptor = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        return descriptor
