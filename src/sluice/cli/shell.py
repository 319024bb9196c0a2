"""``sluice shell``: a shell in a domain, on a terminal of the domain's own."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import termios
import tty
from collections.abc import Iterator
from typing import IO

import click

from sluice import runtime
from sluice.agent.terminal import SIZE, TYPED, WINDOW, frame
from sluice.cli.common import make_running, places, root_option, tell_errors
from sluice.cli.escapes import EscapeFilter
from sluice.cli.run import become, client, tidy_end, write_all
from sluice.domains.paths import Paths


@click.command()
@click.argument("name")
@click.option("--user", "-u", default="DEFAULT", help="Be this user of the domain.")
@click.option("--raw", is_flag=True, help="Pass escape sequences to the terminal unfiltered.")
@root_option
@tell_errors
def command(name: str, user: str, raw: bool, root: str | None) -> None:
    """Open a shell in the domain NAME; started if need be.

    Without a terminal on stdin it reads its commands from there, as any shell does.
    """
    paths = places(root)
    make_running(paths, name)
    if not os.isatty(0):
        become(client(paths, name, "exec ${SHELL:-/bin/sh} -l", user, hangup=True), raw=raw)
    program = pty_program(paths, name)
    rows, columns = window_size()
    term = os.environ.get("TERM", "dumb")
    if not re.fullmatch(r"[A-Za-z0-9._+-]{1,40}", term):
        term = "dumb"
    text = shlex.join([program, str(rows), str(columns), term])
    sys.exit(relay(client(paths, name, text, user, hangup=True), None if raw else EscapeFilter()))


def pty_program(paths: Paths, name: str) -> str:
    """Return where the domain has the program that makes its terminal."""
    if in_process_domain(paths, name):
        return runtime.launcher("sluice-pty")
    return f"{runtime.INSIDE_BIN}/sluice-pty"


def in_process_domain(paths: Paths, name: str) -> bool:
    """Tell whether a domain is of kind ``process`` and sees the host's own files."""
    from sluice.cli.ls import describe

    kinds = {domain["name"]: domain["kind"] for domain in describe(paths)}
    return kinds.get(name) == "process"


def window_size() -> tuple[int, int]:
    """Return rows and columns of our terminal; 24 by 80 where there is none."""
    try:
        size = os.get_terminal_size(0)
    except OSError:
        return 24, 80
    return size.lines or 24, size.columns or 80


@contextlib.contextmanager
def raw_terminal(descriptor: int, escapes: EscapeFilter | None) -> Iterator[None]:
    """Let every key through to the domain, and put the terminal back however this ends."""
    before = termios.tcgetattr(descriptor)

    def put_back() -> None:
        with contextlib.suppress(termios.error, OSError):  # the terminal itself may be gone
            termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
            if escapes is not None and os.isatty(1):
                write_all(1, escapes.undo())

    with tidy_end(put_back):
        try:
            tty.setraw(descriptor, termios.TCSADRAIN)  # what was typed ahead is for the domain
            yield
        finally:
            put_back()


def relay(argv: list[str], escapes: EscapeFilter | None) -> int:
    """Join our terminal (on stdin) to the program in the domain; returns its exit status."""
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGWINCH, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    with raw_terminal(0, escapes):
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        to_domain, from_domain = Outlet(process.stdin), process.stdout.fileno()
        watched = [0, from_domain, wake_read]
        while from_domain in watched:
            # What they do not read yet keeps us from reading more, not from showing theirs.
            readers = [fd for fd in watched if fd != 0 or not to_domain.held]
            writers = [process.stdin] if to_domain.held else []
            readable, writable, _ = select.select(readers, writers, [])
            if writable:
                to_domain.flush()
            if wake_read in readable:
                os.read(wake_read, 512)
                to_domain.send(WINDOW, SIZE.pack(*window_size()))
            if 0 in readable:
                typed = os.read(0, 16384)
                if typed:
                    to_domain.send(TYPED, typed)
                else:
                    watched.remove(0)  # our terminal is gone; theirs goes with the call
                    to_domain.close()
            if from_domain in readable:
                shown = os.read(from_domain, 65536)
                if shown:
                    write_all(1, escapes.feed(shown) if escapes else shown)
                else:
                    watched.remove(from_domain)
        to_domain.close()
        status = process.wait()
    signal.set_wakeup_fd(-1)
    os.close(wake_read)
    os.close(wake_write)
    return status


class Outlet:
    """The pipe to the domain: takes frames, holds what the pipe does not, never waits."""

    def __init__(self, pipe: IO[bytes]) -> None:
        """Take the pipe, which is ours to close."""
        os.set_blocking(pipe.fileno(), False)
        self._pipe = pipe
        self.held = bytearray()

    def send(self, kind: int, data: bytes) -> None:
        """Send one frame, behind what is held."""
        if not self._pipe.closed:
            self.held += frame(kind, data)
            self.flush()

    def flush(self) -> None:
        """Write what the pipe takes; drop it where nobody reads any more."""
        try:
            del self.held[: os.write(self._pipe.fileno(), self.held)]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.held.clear()

    def close(self) -> None:
        """Let the domain see the end, and drop what is held. May be repeated."""
        self.held.clear()
        self._pipe.close()
