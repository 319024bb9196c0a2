"""Running an outside program beside a call (filter ``program``)."""

from __future__ import annotations

import os

from sluice.proxy.far import SIGNALS_TO_RESET
from sluice.proxy.lines import LineSplitter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sluice.flow.reactor import Loop
    from sluice.proxy.verdicts import Bytes

INTERPRETER = "/usr/bin/python3"
_PIECE = 64 << 10
_SEARCHED = ("/usr/bin", "/bin", "/usr/sbin", "/sbin")


class Outside:
    """A process with three pipes on a loop. ``on_end(status)`` comes once, after all output.

    The status is an exit code, or minus the number of a signal.
    """

    def __init__(
        self,
        loop: Loop,
        argv: Sequence[str],
        environment: dict[str, str],
        *,
        on_output: Callable[[bytes], None],
        on_input: Callable[[], None],
        on_end: Callable[[int], None],
        on_stderr: Callable[[str], None],
    ) -> None:
        """Start it, in a process group of its own. Raises OSError."""
        self._loop = loop
        self._on_output = on_output
        self._on_input = on_input
        self._on_end = on_end
        self.ended = False
        self.input_closed = False
        self._status: int | None = None
        self._lines = LineSplitter(on_stderr)
        self._waiting = False
        self._reading = True
        child_in, self._in = os.pipe2(os.O_CLOEXEC)
        self._out, child_out = os.pipe2(os.O_CLOEXEC)
        self._err, child_err = os.pipe2(os.O_CLOEXEC)
        self._pidfd = -1
        try:
            self.pid = os.posix_spawn(
                argv[0],
                list(argv),
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, fd, number)
                    for number, fd in enumerate((child_in, child_out, child_err))
                ],
                setpgroup=0,
                setsigdef=SIGNALS_TO_RESET,
                setsigmask=[],
            )
        except OSError:
            for fd in (self._in, self._out, self._err):
                os.close(fd)
            raise
        finally:
            for fd in (child_in, child_out, child_err):
                os.close(fd)
        self._pidfd = os.pidfd_open(self.pid)
        for fd in (self._in, self._out, self._err):
            os.set_blocking(fd, False)
        loop.add_reader(self._pidfd, self._exited)
        loop.add_reader(self._out, self._readable)
        loop.add_reader(self._err, self._stderr)

    # --- input ------------------------------------------------------------------------------------

    def write(self, data: Bytes) -> int:
        """Give it some of ``data``; return how much it took. It takes all once it is closed."""
        view, taken = memoryview(data), 0
        while taken < len(view):
            try:
                taken += os.write(self._in, view[taken:])
            except BlockingIOError:
                return taken
            except OSError:
                self.close_input()
                return len(view)
        return taken

    def wait_for_input(self) -> None:
        """Call ``on_input`` once, when it takes input again."""
        if not self._waiting and not self.input_closed:
            self._waiting = True
            self._loop.add_writer(self._in, self._writable)

    def _writable(self) -> None:
        self._waiting = False
        self._loop.remove_writer(self._in)
        self._on_input()

    def close_input(self) -> None:
        """Let it see end-of-file. May be repeated."""
        if not self.input_closed:
            self.input_closed = True
            if self._waiting:
                self._waiting = False
                self._loop.remove_writer(self._in)
            os.close(self._in)

    # --- output -----------------------------------------------------------------------------------

    def pause_output(self) -> None:
        """Read no more of what it writes."""
        if self._reading and self._out >= 0:
            self._reading = False
            self._loop.remove_reader(self._out)

    def resume_output(self) -> None:
        """Undo ``pause_output``."""
        if not self._reading and self._out >= 0:
            self._reading = True
            self._loop.add_reader(self._out, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._out, _PIECE)
        except BlockingIOError:
            return
        if data:
            self._on_output(data)
        else:
            self._loop.remove_reader(self._out)
            os.close(self._out)
            self._out = -1
            self._check_end()

    def _stderr(self) -> None:
        try:
            data = os.read(self._err, 4096)
        except BlockingIOError:
            return
        if data:
            self._lines.feed(data)
        else:
            self._loop.remove_reader(self._err)
            os.close(self._err)
            self._err = -1
            self._lines.end()

    # --- the end ----------------------------------------------------------------------------------

    def _exited(self) -> None:
        """See how it ended. It is reaped at the end: until then its group's number is its own."""
        self._loop.remove_reader(self._pidfd)
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        by_itself = ended.si_code == os.CLD_EXITED
        self._status = ended.si_status if by_itself else -ended.si_status
        self._check_end()

    def _check_end(self) -> None:
        """It is over when it has exited and all that it wrote is read; a failure is told at once.

        What it started may keep its output open, which is its affair while it runs well.
        """
        failed = self._status not in (None, 0)
        if self._status is not None and (self._out < 0 or failed) and not self.ended:
            self.ended = True
            if self._err >= 0:
                self._stderr()
            self.close_input()
            self._on_end(self._status)

    def destroy(self) -> None:
        """End it and what it started, at once, and reap it. No callback comes any more."""
        self.ended = True
        if self._pidfd >= 0:
            if self._status is None:
                self._loop.remove_reader(self._pidfd)
            for end in (os.killpg, os.kill):
                try:
                    end(self.pid, 9)
                except (ProcessLookupError, PermissionError):
                    continue
            os.close(self._pidfd)
            self._pidfd = -1
            os.waitpid(self.pid, 0)
        self.close_input()
        for fd in (self._out, self._err):
            if fd >= 0:
                self._loop.remove_reader(fd)
                os.close(fd)
        self._out = self._err = -1


def find_program(name: str) -> str | None:
    """Return the path of a program: absolute, or found where the system keeps its own."""
    candidates = [name] if name.startswith("/") else [f"{place}/{name}" for place in _SEARCHED]
    for candidate in candidates:
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    return None


def command_line(argv: Sequence[str]) -> list[str]:
    """Return ``argv`` with the program's path. Raises FileNotFoundError."""
    program = find_program(argv[0])
    if program is None:
        raise FileNotFoundError(f"{argv[0]} is no program")
    return [program, *argv[1:]]


def confined(argv: Sequence[str], read: Sequence[str], *, check: bool = False) -> list[str]:
    """Return the command line that confines itself and becomes ``argv``."""
    from sluice.proxy import confine

    loader = confine.__loader__
    source = loader.get_source(confine.__name__)  # type: ignore[union-attr]
    words = ["--check"] if check else []
    return [INTERPRETER, "-I", "-S", "-c", source, *words, *read, "--", *argv]


def try_confinement(program: str, read: Sequence[str]) -> str | None:
    """Return why a program cannot be confined on this machine; None where it can."""
    import subprocess

    try:
        done = subprocess.run(
            confined([program], read, check=True), capture_output=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"a program cannot be confined here: {error}"
    if done.returncode == 0:
        return None
    from sluice.wire.names import escape

    return escape(done.stderr.strip(), 300) or "a program cannot be confined here"
