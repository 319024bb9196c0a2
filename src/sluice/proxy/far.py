"""The far end of a proxied call: what the proxy calls on the source's behalf (proxy.md 2).

Each kind gives the flow two descriptors, ``in_fd`` (to write what the source says) and ``out_fd``
(to read what the target answers), and calls ``on_exit(code)`` once, when the far end is over.
"""

from __future__ import annotations

import os

from sluice.errors import LocalError
from sluice.proxy.lines import LineSplitter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Protocol

    from sluice.flow.reactor import Loop
    from sluice.proxy.link import Call

    class FarEnd(Protocol):
        """What the flow needs of a far end."""

        in_fd: int
        out_fd: int

        def start(self, on_exit: Callable[[int], None]) -> None:
            """Begin; raises LocalError where that cannot be. Descriptors are there afterwards.

            Both belong to the flow from then on. ``on_exit`` is called once, with the exit code
            for the source, and with every process reaped.
            """

        def terminate(self) -> None:
            """Ask it to end: SIGTERM. ``on_exit`` still comes."""

        def kill(self) -> None:
            """End it: SIGKILL. ``on_exit`` still comes."""


_SIGTERM, _SIGKILL = 15, 9
CLIENT_FALLBACK = "/usr/lib/qubes/qrexec-client-vm"


class ProgramEnd:
    """A program with pipes as stdin and stdout, its stderr in the log.

    ``signal_code`` gives the code for one that a signal ended; None means 128 + signal.
    """

    def __init__(
        self,
        loop: Loop,
        argv: Sequence[str | bytes],
        *,
        environment: Mapping[str, str] | Mapping[bytes, bytes] | None = None,
        log: Callable[[str], None],
        signal_code: int | None = None,
        stderr_fd: int | None = None,
        label: str = "far end: ",
        extra: Sequence[int] = (),
        group: bool = True,
    ) -> None:
        """Take the command line (``argv[0]`` is searched in PATH where it has no slash).

        ``stderr_fd`` leads the program's stderr there instead of into the log, where its lines
        begin with ``label``. ``extra`` descriptors become its 3, 4 and so on. Without ``group`` it
        stays in our own process group, and what it starts is not signalled with it.
        """
        self.in_fd = self.out_fd = -1
        self.pid = -1
        self._loop = loop
        self.argv = argv
        self._environment = environment
        self._log = log
        self._signal_code = signal_code
        self._stderr_fd = stderr_fd
        self._stderr = -1
        self._extra = extra
        self._group = group
        self._label = label
        self._lines = LineSplitter(lambda line: log(f"{label}{line}"))
        self._pidfd = -1
        self._on_exit: Callable[[int], None] | None = None

    def start(self, on_exit: Callable[[int], None]) -> None:
        """Start the program. Raises LocalError where it cannot be started."""
        child_in, self.in_fd = os.pipe2(os.O_CLOEXEC)
        self.out_fd, child_out = os.pipe2(os.O_CLOEXEC)
        child_err = self._stderr_fd
        if child_err is None:
            self._stderr, child_err = os.pipe2(os.O_CLOEXEC)
        try:
            self._spawn(child_in, child_out, child_err)
        except OSError as error:
            for fd in (self.in_fd, self.out_fd, self._stderr):
                if fd >= 0:
                    os.close(fd)
            name = os.fsdecode(self.argv[0])
            raise LocalError(f"cannot start {name}: {error.strerror}") from None
        finally:
            for fd in (child_in, child_out, child_err):
                if fd != self._stderr_fd:
                    os.close(fd)
        self._on_exit = on_exit
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        if self._stderr >= 0:
            os.set_blocking(self._stderr, False)
            self._loop.add_reader(self._stderr, self._read_stderr)

    def _spawn(self, child_in: int, child_out: int, child_err: int) -> None:
        # Away from the child's numbers first: a pipe of ours may have got one of these.
        given = (child_in, child_out, child_err, *self._extra)
        low = [_moved_up(fd, len(given)) for fd in given]
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(low)]
        options: dict[str, Any] = {"setpgroup": 0} if self._group else {}
        spawn = os.posix_spawn if b"/" in os.fsencode(self.argv[0]) else os.posix_spawnp
        try:
            self.pid = spawn(
                self.argv[0],
                list(self.argv),
                os.environ if self._environment is None else self._environment,
                file_actions=actions,
                **options,
                setsigdef=SIGNALS_TO_RESET,
                setsigmask=[],
            )
        finally:
            for fd, before in zip(low, given, strict=True):
                if fd != before:
                    os.close(fd)

    def terminate(self) -> None:
        """Send SIGTERM to the program and what it started."""
        self._signal(_SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the program and what it started."""
        self._signal(_SIGKILL)

    def _signal(self, number: int) -> None:
        # Not reaped yet while the pidfd is open, so the group's number is still ours.
        if self._pidfd >= 0:
            try:
                if self._group:
                    os.killpg(self.pid, number)
                else:
                    os.kill(self.pid, number)
            except ProcessLookupError:
                pass
            except PermissionError:
                os.kill(self.pid, number)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._before_reaping()
        _, status = os.waitpid(self.pid, 0)
        self._end_stderr()
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            self._log(f"{self._label}ended by signal {-code}")
            code = 128 - code if self._signal_code is None else self._signal_code
        if self._on_exit is not None:
            self._on_exit(code)

    def _before_reaping(self) -> None:
        """Do what needs the number of the process or its group; it has ended already."""

    def _read_stderr(self) -> None:
        try:
            data = os.read(self._stderr, 65536)
        except BlockingIOError:
            return
        if data:
            self._lines.feed(data)
        else:
            self._close_stderr()

    def _end_stderr(self) -> None:
        """Read what is left; a descendant may keep the pipe open, so do not wait for its end."""
        for _ in range(16):
            if self._stderr < 0:
                return
            try:
                data = os.read(self._stderr, 65536)
            except BlockingIOError:
                break
            if not data:
                break
            self._lines.feed(data)
        self._close_stderr()

    def _close_stderr(self) -> None:
        if self._stderr >= 0:
            self._loop.remove_reader(self._stderr)
            os.close(self._stderr)
            self._stderr = -1
            self._lines.end()


def _moved_up(fd: int, least: int) -> int:
    """Return ``fd``, or a copy of it with a number that is at least ``least``."""
    if fd >= least:
        return fd
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)


# SIGPIPE is ignored by Python itself; SIGTERM and SIGINT may have handlers of ours.
SIGNALS_TO_RESET = (1, 2, 3, 10, 12, 13, 14, 15, 17)


def find_client(configured: str | None, path: str | None) -> str | None:
    """Return the path of ``qrexec-client-vm``: configured, in PATH, or at its usual place."""
    if configured:
        return configured
    for directory in (path or "").split(":"):
        candidate = f"{directory}/qrexec-client-vm"
        if directory.startswith("/") and os.access(candidate, os.X_OK):
            return candidate
    return CLIENT_FALLBACK if os.access(CLIENT_FALLBACK, os.X_OK) else None


def client_end(
    loop: Loop,
    call: Call,
    client: str,
    log: Callable[[str], None],
    *,
    as_source: bool = False,
    group: bool = True,
) -> ProgramEnd:
    """Return a far end that is ``qrexec-client-vm TARGET SERVICE[+ARGUMENT]``.

    ``as_source`` lets it claim the call's source (``--source-qube``, section 9). One that a signal
    ended is trouble: 125. ``group`` as for ProgramEnd.
    """
    options = [f"--source-qube={call.source}"] if as_source else []
    argv = [client, *options, "--", call.target, call.descriptor]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("QREXEC_")
    }
    return ProgramEnd(loop, argv, environment=environment, log=log, signal_code=125, group=group)
