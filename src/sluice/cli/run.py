"""``sluice run``: run a command in a domain, as dom0's qrexec-client does."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import click

from sluice import runtime
from sluice.cli.common import make_running, places, root_option, tell_errors
from sluice.cli.escapes import EscapeFilter
from sluice.domains.paths import Paths
from sluice.wire.messages import EXIT_FAILURE


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("command_words", metavar="-- COMMAND...", nargs=-1, required=True)
@click.option("--user", "-u", default="DEFAULT", help="Run as this user of the domain.")
@click.option("--raw", is_flag=True, help="Show escape sequences to the terminal unfiltered.")
@root_option
@tell_errors
def command(
    name: str, command_words: tuple[str, ...], user: str, raw: bool, root: str | None
) -> None:
    """Run COMMAND in the domain NAME; started if need be. Ends with the command's status.

    When this is ended (Ctrl-C, a closed terminal, kill), so is the command with all it started,
    but for what made a session of its own (setsid).
    """
    paths = places(root)
    make_running(paths, name)
    words = client(paths, name, shlex.join(command_words), user, hangup=True)
    become(words, raw=raw, at_125=f"not started? `sluice log --domain {name}` says why")


def become(argv: list[str], *, raw: bool, at_125: str = "") -> NoReturn:
    """End as qrexec-client with ``argv`` ends; what it shows on a terminal is filtered.

    Unless ``raw``. In any case the client is this process: however it is ended, its call is. A
    person at a terminal is told ``at_125`` where that is the status: the other side says nothing.
    """
    filtered = [] if raw else [fd for fd in (1, 2) if os.isatty(fd)]
    if not filtered:
        sys.stdout.flush()
        os.execv(argv[0], argv)
    from sluice.adminvm.client import main

    with contextlib.ExitStack() as stack:
        screens = [stack.enter_context(screened(fd)) for fd in filtered]

        def undo() -> None:
            for screen in screens:
                screen.undo()

        with tidy_end(undo):
            status = main(argv[1:])
    if status == EXIT_FAILURE and at_125 and os.isatty(2):
        click.echo(f"sluice: ended with {status}: {at_125}", err=True)
    sys.exit(status)


def client(
    paths: Paths, name: str, text: str, user: str = "DEFAULT", *, hangup: bool = False
) -> list[str]:
    """Return the command line of qrexec-client that runs ``text`` in a shell of a domain.

    ``hangup``: when the client ends, so does the command; when nobody takes the output, both.
    """
    program = runtime.launcher("qrexec-client")
    options = ["--hangup"] if hangup else []
    return [program, f"--socket-dir={paths.daemon_dir}", *options, "-d", name, f"{user}:{text}"]


class Screen:
    """What is written to one of our descriptors passes the filter on its way to the terminal."""

    def __init__(self, descriptor: int) -> None:
        """Put a pipe in the place of ``descriptor``, a terminal, and a thread behind the pipe."""
        self._descriptor = descriptor
        self._terminal = os.dup(descriptor)
        self._escapes = EscapeFilter()
        self._reading, writing = os.pipe2(os.O_CLOEXEC)
        os.dup2(writing, descriptor)
        os.close(writing)
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._thread.start()

    def _show(self) -> None:
        try:
            while data := os.read(self._reading, 65536):
                write_all(self._terminal, self._escapes.feed(data))
        except OSError:
            pass  # the terminal is gone
        finally:
            os.close(self._reading)

    def undo(self) -> None:
        """Put back what was changed of the terminal."""
        with contextlib.suppress(OSError):
            write_all(self._terminal, self._escapes.undo())

    def close(self) -> None:
        """Show the rest, put back what was changed, and give the descriptor back."""
        os.dup2(self._terminal, self._descriptor)
        self._thread.join()
        self.undo()
        os.close(self._terminal)


@contextlib.contextmanager
def screened(descriptor: int) -> Iterator[Screen]:
    """Have ``descriptor`` filtered meanwhile. Signals are for the other threads."""
    before = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        screen = Screen(descriptor)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield screen
    finally:
        screen.close()


@contextlib.contextmanager
def tidy_end(tidy: Callable[[], object]) -> Iterator[None]:
    """Have SIGINT, SIGTERM and SIGHUP call ``tidy()`` before they end us; who ignores them may."""

    def end(number: int, _frame: object) -> None:
        tidy()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything, also to a terminal that was left in non-blocking mode."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
