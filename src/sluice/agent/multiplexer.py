"""qubes-rpc-multiplexer: finds and runs one service, as agents of older releases called it.

``qubes-rpc-multiplexer SERVICE[+ARGUMENT] SOURCE [TYPE TARGET]``: the service gets our stdin and
stdout and the environment of section 9.3.1, its stderr goes to the system log. A program takes our
place; to a socket we carry stdin and stdout ourselves. docs/spec/wire-protocol.md 1, 9.
"""

from __future__ import annotations

import errno
import os
import sys

from sluice.agent.log import has_system_log
from sluice.agent.options import die_of_interrupt
from sluice.errors import LocalError
from sluice.service.address import connect_blocking, resolve
from sluice.service.command import Command, ServiceError, parse_command
from sluice.service.configuration import load_configuration
from sluice.service.lookup import EXECUTABLE, Found, find_service
from sluice.service.start import (
    RESET_SIGNALS,
    service_argv,
    service_environment,
    socket_descriptor,
)
from sluice.wire.messages import EXIT_FAILURE, EXIT_NOT_FOUND

USAGE = "usage: qubes-rpc-multiplexer SERVICE[+ARGUMENT] SOURCE [TYPE TARGET]\n"


def log_stderr(tag: bytes) -> None:
    """Have what is written to fd 2 go to the system log; where there is none leave it as it is."""
    if not has_system_log():
        return
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        os.posix_spawnp(
            "logger",
            [b"logger", b"-t", tag],
            os.environb,
            file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0)],
            setsigdef=RESET_SIGNALS,
        )
        os.dup2(writing, 2)
    except OSError:
        pass
    os.close(reading)
    os.close(writing)


def execute(found: Found, command: Command) -> None:
    """Become the service. Raises ServiceError; returns never."""
    argv = service_argv(found, command)
    environment = service_environment(command, os.environb)
    # What Python ignores the service must not inherit as ignored.
    import _signal  # type: ignore[import-not-found]  # it has no stub

    for number in RESET_SIGNALS:
        _signal.signal(number, _signal.SIG_DFL)
    try:
        os.execve(found.path, argv, environment)
    except OSError as error:
        code = EXIT_NOT_FOUND if error.errno == errno.ENOENT else EXIT_FAILURE
        raise ServiceError(f"cannot execute the service: {error.strerror}", code) from error


def relay(found: Found, command: Command) -> None:
    """Carry stdin and stdout to a socket service and back, until both have ended.

    Or one of them, where the configuration says that this is enough (10.6).
    """
    from sluice.flow.endpoint import Endpoint
    from sluice.flow.pump import Pump
    from sluice.flow.reactor import Reactor

    settings = load_configuration(command)
    fd = connect_blocking(*resolve(found, command))
    first = socket_descriptor(command, settings.skip_service_descriptor)
    while first:
        first = first[os.write(fd, first) :]
    loop = Reactor()
    service = Endpoint(loop, fd)
    running: set[Pump] = set()

    def ended(pump: Pump) -> None:
        running.discard(pump)
        enough = settings.exit_on_client_eof if pump is there else settings.exit_on_service_eof
        if enough or not running:
            loop.stop()

    there = Pump(loop, 0, service, on_end=ended, discard=False)
    back = Pump(loop, service, 1, on_end=ended)
    running |= {there, back}
    # Within the loop: a pump may end as soon as it is started.
    loop.call_soon(there.start)
    loop.call_soon(back.start)
    loop.run()


def main(arguments: list[str]) -> int:
    """Run the program; returns its exit status where it is not the service's."""
    die_of_interrupt()
    if len(arguments) not in (2, 4) or not all(arguments):
        sys.stderr.write(USAGE)
        return EXIT_FAILURE
    words = [os.fsencode(word) for word in arguments]
    try:
        command = parse_command(b"QUBESRPC " + b" ".join(words), with_user=False)
        found = find_service(command)
        if found.kind == EXECUTABLE:
            log_stderr(command.descriptor + b"-" + command.source)
            execute(found, command)
        else:
            relay(found, command)
    except ServiceError as error:
        sys.stderr.write(f"qubes-rpc-multiplexer: {error}\n")
        return error.code
    except (LocalError, OSError) as error:
        sys.stderr.write(f"qubes-rpc-multiplexer: {error}\n")
        return EXIT_FAILURE
    return 0
