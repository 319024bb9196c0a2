"""``sluice run``: run a command in a domain, as dom0's qrexec-client does."""

from __future__ import annotations

import os
import select
import shlex
import subprocess
import sys
from typing import NoReturn

import click

from sluice import runtime
from sluice.cli.common import make_running, places, root_option, tell_errors
from sluice.cli.escapes import EscapeFilter
from sluice.domains.paths import Paths


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
    """Run COMMAND in the domain NAME; started if need be. Ends with the command's status."""
    paths = places(root)
    make_running(paths, name)
    become(client(paths, name, shlex.join(command_words), user), raw=raw)


def become(argv: list[str], *, raw: bool) -> NoReturn:
    """End as ``argv`` ends; where it shows something on a terminal, filtered unless ``raw``."""
    if raw or not (os.isatty(1) or os.isatty(2)):
        sys.stdout.flush()
        os.execv(argv[0], argv)
    sys.exit(run_filtered(argv))


def client(paths: Paths, name: str, text: str, user: str = "DEFAULT") -> list[str]:
    """Return the command line of qrexec-client that runs ``text`` in a shell of a domain."""
    program = runtime.launcher("qrexec-client")
    return [program, f"--socket-dir={paths.daemon_dir}", "-d", name, f"{user}:{text}"]


def run_filtered(argv: list[str]) -> int:
    """Run a program; what it shows on our terminal passes the filter of escape sequences."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    ends = {
        process.stdout.fileno(): (1, EscapeFilter()),
        process.stderr.fileno(): (2, EscapeFilter()),
    }
    while ends:
        for descriptor in select.select(list(ends), [], [])[0]:
            data = os.read(descriptor, 65536)
            if not data:
                target, escapes = ends[descriptor]
                if os.isatty(target):
                    write_all(target, escapes.undo())
                del ends[descriptor]
                continue
            target, escapes = ends[descriptor]
            write_all(target, escapes.feed(data) if os.isatty(target) else data)
    return process.wait()


def write_all(descriptor: int, data: bytes) -> None:
    """Write everything, also to a terminal that was left in non-blocking mode."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
