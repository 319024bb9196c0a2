"""sluice-pty: a shell on a terminal of its own, inside a domain.

Theory. The user's terminal is never inside. A pseudo-terminal of the domain's own is made here; its
master's bytes go to stdout as they are, and stdin carries frames: a header (``FRAME``: kind and
length) and what was typed, or the new size of the window. When the shell ends, so does this
program, with its status. docs/spec/core-stack.md 12.10.
"""

import fcntl
import os
import select
import struct
import sys
import termios

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

FRAME = struct.Struct("<BH")
TYPED = 0
WINDOW = 1
SIZE = struct.Struct("<HH")  # rows, columns
MAX_HELD = 65536


def frame(kind: int, data: bytes) -> bytes:
    """Return one frame of at most 65535 bytes."""
    return FRAME.pack(kind, len(data)) + data


class Frames:
    """Takes bytes, gives frames."""

    def __init__(self) -> None:
        """Begin empty."""
        self._held = bytearray()

    def feed(self, data: bytes) -> "list[tuple[int, bytes]]":
        """Take bytes and return the frames that are whole now."""
        self._held += data
        frames = []
        while len(self._held) >= FRAME.size:
            kind, size = FRAME.unpack_from(self._held)
            if len(self._held) < FRAME.size + size:
                break
            frames.append((kind, bytes(self._held[FRAME.size : FRAME.size + size])))
            del self._held[: FRAME.size + size]
        return frames


def set_size(terminal: int, rows: int, columns: int) -> None:
    """Tell a terminal its size; the kernel tells its programs."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("<HHHH", rows, columns, 0, 0))


class Relay:
    """Joins stdin and stdout to a shell's terminal."""

    def __init__(self, master: int, pid: int) -> None:
        """Take the master of the terminal and the shell's process id."""
        self._master = master
        self._pidfd = os.pidfd_open(pid)
        self._frames = Frames()
        self._typed = bytearray()
        self._stdin_open = True
        self._master_open = True

    def run(self) -> None:
        """Relay until the shell has ended and all its output was passed on."""
        while True:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if self._stdin_open and len(self._typed) < MAX_HELD:
                poll.register(0, select.POLLIN)
            if self._master_open:
                wanted = select.POLLIN | (select.POLLOUT if self._typed else 0)
                poll.register(self._master, wanted)
            ready = dict(poll.poll())
            if ready.get(0):
                self._read_stdin()
            events = ready.get(self._master, 0)
            if events & select.POLLOUT:
                self._type()
            if events & ~select.POLLOUT:
                self._show()
            elif self._pidfd in ready:
                return  # ended, and nothing left to read

    def _read_stdin(self) -> None:
        data = os.read(0, 32768)
        if not data:
            # Whoever watched is gone: the terminal hangs up.
            self._stdin_open = False
            self.hang_up()
            return
        for kind, body in self._frames.feed(data):
            if kind == TYPED:
                self._typed += body
            elif kind == WINDOW and len(body) == SIZE.size and self._master_open:
                set_size(self._master, *SIZE.unpack(body))

    def _type(self) -> None:
        try:
            del self._typed[: os.write(self._master, self._typed)]
        except BlockingIOError:
            pass
        except OSError:
            self._typed.clear()

    def _show(self) -> None:
        try:
            data = os.read(self._master, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.hang_up()
            return
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]

    def hang_up(self) -> None:
        """End the terminal; the kernel tells the shell. May be repeated."""
        if self._master_open:
            self._master_open = False
            os.close(self._master)


def main(arguments: "Sequence[str]") -> int:
    """Run ``sluice-pty ROWS COLUMNS TERM [PROGRAM...]``; returns the program's exit status."""
    rows, columns, term = int(arguments[0]), int(arguments[1]), arguments[2]
    program = list(arguments[3:]) or [os.environ.get("SHELL") or "/bin/sh", "-l"]
    master, slave = os.openpty()
    set_size(master, rows, columns)
    name = os.ttyname(slave)
    os.set_blocking(master, False)
    environment = dict(os.environ, TERM=term)
    # A new session opens the terminal by its name, which makes it the controlling one.
    pid = os.posix_spawnp(
        program[0],
        program,
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, name, os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_DUP2, 0, 2),
        ],
        setsid=True,
    )
    os.close(slave)
    relay = Relay(master, pid)
    try:  # noqa: SIM105
        relay.run()
    except BrokenPipeError:
        pass
    relay.hang_up()  # a shell whose terminal nobody watches any more would wait for ever
    _, status = os.waitpid(pid, 0)
    sys.stdout.flush()
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code
