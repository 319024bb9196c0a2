"""Running a service of dom0's in our own place (docs/spec/wire-protocol.md 12.2 D)."""

from __future__ import annotations

import errno
import os

from sluice.service.command import Command, ServiceError, parse_command
from sluice.service.configuration import load_configuration
from sluice.service.lookup import EXECUTABLE, find_program, find_service
from sluice.service.start import RESET_SIGNALS, service_argv, service_environment, spawn
from sluice.wire.messages import EXIT_FAILURE, EXIT_NOT_FOUND
from sluice.wire.names import escape


def become_service(text: bytes) -> int:
    """Execute the service call ``text``; does not return where that works.

    Raises ServiceError: 127 where there is no such service, else 125.
    """
    command = parse_command(text, with_user=False)
    if not command.is_service:
        raise ServiceError("only services can be run in dom0")
    settings = load_configuration(command)
    if settings.wait_for_session and not command.nogui:
        _wait_for_session(command)
    found = find_service(command)
    if found.kind != EXECUTABLE:
        raise ServiceError("a socket service cannot take this process's place")
    argv = service_argv(found, command)
    environment = service_environment(command, os.environb)
    # The interpreter ignores SIGPIPE; what takes its place must not.
    import _signal  # type: ignore[import-not-found]  # it has no stub

    for number in RESET_SIGNALS:
        _signal.signal(number, _signal.SIG_DFL)
    try:
        os.execve(argv[0], argv, environment)
    except OSError as error:
        code = EXIT_NOT_FOUND if error.errno == errno.ENOENT else EXIT_FAILURE
        message = f"cannot execute {escape(argv[0])}: {error.strerror}"
        raise ServiceError(message, code) from error


def _wait_for_session(command: Command) -> None:
    """Wait for the user's session; failures do not matter (9.5)."""
    waiter = find_program(b"qubes.WaitForSession")
    if waiter is None:
        return
    environment = dict(os.environb)
    environment[b"QREXEC_REMOTE_DOMAIN"] = command.source
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.waitpid(spawn([waiter], environment, null, 2, 2), 0)
    except ServiceError:
        pass
    finally:
        os.close(null)
