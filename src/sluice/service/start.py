"""Starting what answers a call: its environment, its descriptors, its process.

Theory. A program gets two socket pairs as stdin and stdout, so that it can shut one direction
down or talk both ways over its stdin, and a *pipe* as stderr, so that ``/proc/self/fd/2`` can be
opened again. It is started with ``posix_spawn``, which stays cheap however large the starter is,
and in a session of its own, by which a signal of any of its descendants can be traced to the
call. What runs as somebody else is started through a launcher in front of it (``wrap``), never by
changing our own user. docs/spec/wire-protocol.md 9.3.
"""

from __future__ import annotations

import _socket
import errno
import os

from sluice.service.address import Connecting, connect_blocking, resolve
from sluice.service.command import Command, ServiceError
from sluice.service.descriptors import own_limit
from sluice.service.lookup import EXECUTABLE, Found
from sluice.wire.messages import EXIT_FAILURE, EXIT_NOT_FOUND
from sluice.wire.names import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sluice.flow.reactor import Loop

    Environment = Mapping[bytes, bytes]
    # What to execute: argv, environment, and the working directory (None: ours).
    Start = tuple[list[bytes], dict[bytes, bytes], bytes | None]
    # Takes argv and environment, returns what to execute instead. Raises ServiceError.
    Wrap = Callable[[list[bytes], dict[bytes, bytes]], Start]

KEPT_VARIABLES = (b"QREXEC_SERVICE_PATH", b"QREXEC_AGENT_PID")
# SIGPIPE, SIGCHLD and SIGXFSZ: what a Python process ignores or handles (numbers of Linux; the
# module that names them costs more than the rest of a small program).
RESET_SIGNALS = (13, 17, 25)


class Started:
    """A service that runs: ``pid`` (-1 for a socket) and our ends of its streams.

    ``in_fd`` takes the caller's data, ``out_fd`` gives the service's, ``err_fd`` is -1 where
    there is none. For a socket service ``in_fd`` and ``out_fd`` are the same descriptor.
    ``descriptor`` is what must be written to a socket service before anything else.
    """

    __slots__ = ("descriptor", "err_fd", "in_fd", "out_fd", "pid")

    def __init__(
        self, pid: int, in_fd: int, out_fd: int, err_fd: int = -1, descriptor: bytes = b""
    ) -> None:
        """Keep the process id and the descriptors; they belong to the receiver."""
        self.pid = pid
        self.in_fd = in_fd
        self.out_fd = out_fd
        self.err_fd = err_fd
        self.descriptor = descriptor


def service_environment(command: Command, base: Environment) -> dict[bytes, bytes]:
    """Return the environment of an executable service (9.3.1).

    ``base`` is what the context provides. Raises ServiceError for a call of 3 or over 4 words.
    """
    words = command.tokens()
    environment = {
        name: value
        for name, value in base.items()
        if not name.startswith(b"QREXEC") or name in KEPT_VARIABLES
    }
    environment[b"QREXEC_REMOTE_DOMAIN"] = words[1]
    environment[b"QREXEC_SERVICE_FULL_NAME"] = words[0]
    if command.argument is not None:
        environment[b"QREXEC_SERVICE_ARGUMENT"] = command.argument
    kind = words[2] if len(words) == 4 else b""
    environment[b"QREXEC_REQUESTED_TARGET_TYPE"] = kind
    if kind == b"name":
        environment[b"QREXEC_REQUESTED_TARGET"] = words[3]
    elif kind == b"keyword":
        environment[b"QREXEC_REQUESTED_TARGET_KEYWORD"] = words[3]
    return environment


def service_argv(found: Found, command: Command) -> list[bytes]:
    """Return the argument vector of an executable service: the path, and a non-empty argument."""
    if not found.path.startswith(b"/"):
        raise ServiceError(f"the path of a service must be absolute: {escape(found.path)}")
    return [found.path, command.argument] if command.argument else [found.path]


def socket_descriptor(command: Command, skip: bool) -> bytes:
    """Return what a socket service is sent first: the call text and a NUL, or nothing (9.3.2)."""
    return b"" if skip else command.call_text + b"\0"


def spawn(
    argv: list[bytes],
    environment: Environment,
    stdin: int,
    stdout: int,
    stderr: int,
    *,
    path: bytes | None = None,
    session: bool = True,
    directory: bytes | None = None,
) -> int:
    """Start a program, in a session of its own unless told otherwise; returns its process id.

    ``path`` is the file where that is not ``argv[0]``; ``directory`` the working directory, if it
    can be entered (we go there and back: there is no other way but a fork). The three descriptors
    become its 0, 1 and 2; all others must be close-on-exec. Raises ServiceError: 127 where the
    program or its interpreter does not exist, else 125 (9.3.1).
    """
    program = argv[0] if path is None else path
    back = _enter(directory)
    try:
        given = own_limit.lower((stdin, stdout, stderr))
        return os.posix_spawn(
            program,
            argv,
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(given)],
            setsid=session,
            setsigmask=(),
            setsigdef=RESET_SIGNALS,
        )
    except OSError as error:
        code = EXIT_NOT_FOUND if error.errno == errno.ENOENT else EXIT_FAILURE
        message = f"cannot execute {escape(program)}: {error.strerror}"
        raise ServiceError(message, code) from error
    finally:
        own_limit.restore()
        if back >= 0:
            os.fchdir(back)
            os.close(back)


def _enter(directory: bytes | None) -> int:
    """Change to a directory; return a descriptor of the one before, or -1 where nothing changed."""
    if directory is None:
        return -1
    try:
        back = os.open(".", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        os.chdir(directory)
    except OSError:
        os.close(back)
        return -1
    return back


def spawn_connected(
    argv: list[bytes],
    environment: Environment,
    *,
    stderr: str = "pipe",
    directory: bytes | None = None,
) -> Started:
    """Start a program on two socket pairs and, with ``stderr="pipe"``, a pipe (9.3.1).

    With ``stderr="inherit"`` it keeps ours. Raises ServiceError as ``spawn``, and with code 125
    where descriptors ran out; nothing stays open then.
    """
    mine: list[int] = []
    theirs: list[int] = []
    try:
        for _ in range(2):
            one, other = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
            mine.append(one.detach())
            theirs.append(other.detach())
        if stderr == "pipe":
            reading, writing = os.pipe()
            mine.append(reading)
            theirs.append(writing)
        third = theirs[2] if theirs[2:] else 2
        pid = spawn(argv, environment, theirs[0], theirs[1], third, directory=directory)
    except BaseException as error:
        for descriptor in mine:
            os.close(descriptor)
        if isinstance(error, OSError):
            raise ServiceError(f"no descriptors for a service: {error.strerror}") from error
        raise
    finally:
        for descriptor in theirs:
            os.close(descriptor)
    return Started(pid, mine[0], mine[1], mine[2] if mine[2:] else -1)


def start_shell(
    command: Command,
    *,
    environment: Environment,
    shell: bytes = b"/bin/sh",
    stderr: str = "pipe",
    wrap: Wrap | None = None,
) -> Started:
    """Start a shell command: ``/bin/sh -c`` in a domain, ``/bin/bash -c`` in dom0 (9.3.1)."""
    argv, final, directory = [shell, b"-c", command.shell], dict(environment), None
    if wrap is not None:
        argv, final, directory = wrap(argv, final)
    return spawn_connected(argv, final, stderr=stderr, directory=directory)


def start_service(
    found: Found,
    command: Command,
    *,
    environment: Environment,
    stderr: str = "pipe",
    dom0: bool = False,
    skip_descriptor: bool = False,
    wrap: Wrap | None = None,
) -> Started:
    """Start what ``find_service`` found, waiting for a socket's connection. For one-shot programs.

    ``environment`` is the base environment of the context. In dom0 stderr is inherited whatever
    ``stderr`` says. Raises ServiceError with the exit status of the call.
    """
    if found.kind != EXECUTABLE:
        descriptor = connect_blocking(*resolve(found, command))
        first = socket_descriptor(command, skip_descriptor)
        return Started(-1, descriptor, descriptor, -1, first)
    return start_program(
        found,
        command,
        environment=environment,
        stderr="inherit" if dom0 else stderr,
        wrap=wrap,
    )


def start_program(
    found: Found,
    command: Command,
    *,
    environment: Environment,
    stderr: str = "pipe",
    wrap: Wrap | None = None,
) -> Started:
    """Start an executable service. Raises ServiceError with the exit status of the call."""
    argv = service_argv(found, command)
    final = service_environment(command, environment)
    directory = None
    if wrap is not None:
        argv, final, directory = wrap(argv, final)
    return spawn_connected(argv, final, stderr=stderr, directory=directory)


def launch(
    loop: Loop,
    found: Found,
    command: Command,
    *,
    environment: Environment,
    on_started: Callable[[Started], None],
    on_failed: Callable[[ServiceError], None],
    stderr: str = "pipe",
    dom0: bool = False,
    skip_descriptor: bool = False,
    wrap: Wrap | None = None,
) -> Connecting | None:
    """Start what was found without blocking the loop; for the daemons.

    Exactly one of the callbacks is called, for a program before this returns. For a socket the
    attempt is returned and can be given up with ``close()``.
    """
    try:
        if found.kind == EXECUTABLE:
            started = start_program(
                found,
                command,
                environment=environment,
                stderr="inherit" if dom0 else stderr,
                wrap=wrap,
            )
        else:
            family, address = resolve(found, command)
            first = socket_descriptor(command, skip_descriptor)
            return Connecting(
                loop,
                family,
                address,
                lambda fd: on_started(Started(-1, fd, fd, -1, first)),
                on_failed,
            )
    except ServiceError as error:
        on_failed(error)
        return None
    on_started(started)
    return None
