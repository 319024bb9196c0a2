"""``sluice proxy log, top, show, replay, metrics``: what passed, what passes (proxy.md 8)."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from sluice.cli.proxy_common import config_option, told
from sluice.errors import LocalError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sluice.proxy.model import ProxySettings

_POLL = 0.2


def settings_of(config: str | None) -> ProxySettings:
    """Return the settings in force; the defaults where nothing is configured."""
    from sluice.errors import ConfigError
    from sluice.proxy.configuration import load
    from sluice.proxy.model import ProxySettings
    from sluice.proxy.paths import configuration_files

    try:
        configuration_files(config)
    except ConfigError:
        if config:
            raise
        return ProxySettings()
    return load(config).settings


@click.command("log")
@config_option
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes.")
@click.option("--lines", "-n", default=20, show_default=True, help="How many of the last to show.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as they are stored.")
@click.option("--file", metavar="FILE", help="Read this audit file.")
@told
def log_command(
    config: str | None, follow: bool, lines: int, as_json: bool, file: str | None
) -> None:
    """Show the calls that are over, one line each."""
    from sluice.proxy.paths import audit_file
    from sluice.proxy.viewing import Follower, record_line, tail

    path = file or audit_file(settings_of(config).audit)
    if path is None:
        raise LocalError('there are no audit records: audit is "none"')
    follower = Follower(path) if follow else None
    if not os.path.exists(path) and not follow:
        raise LocalError(f"there are no audit records yet in {path}")
    for line in tail(path, max(lines, 0)):
        click.echo(line if as_json else record_line(line))
    while follower is not None:
        for line in follower.poll():
            click.echo(line if as_json else record_line(line))
        time.sleep(_POLL)


@click.command()
@click.argument("file")
@click.option("--hex", "as_hex", is_flag=True, help="Show bytes as hexadecimal numbers.")
@told
def show(file: str, as_hex: bool) -> None:
    """Show a call that the filter record wrote; whatever is not plain text is escaped."""
    from sluice.proxy.viewing import recording_lines

    try:
        with open(file, "rb") as stream:
            for line in recording_lines(stream, decode="hex" if as_hex else "text"):
                click.echo(line)
    except OSError as error:
        raise LocalError(f"{file}: {error.strerror}") from None


@click.command(context_settings={"ignore_unknown_options": True})
@config_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--timeout", default=60.0, show_default=True, help="Seconds that the call may take.")
@click.option("--output", metavar="FILE", help="Write the answer to a file.")
@click.argument("file")
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
@told
def replay(
    config: str | None,
    yes: bool,
    timeout: float,
    output: str | None,
    file: str,
    program: tuple[str, ...],
) -> None:
    """Make a recorded call again, or give what was said to PROGRAM, and compare the answer.

    A replay does again what the call did, so it asks first.
    """
    from sluice.proxy import replaying
    from sluice.proxy.far import find_client

    recorded = replaying.load(file)
    if program:
        argv = list(program)
        what = f"run {' '.join(program)}"
    else:
        client = find_client(settings_of(config).client or None, os.environ.get("PATH"))
        if client is None:
            raise LocalError("qrexec-client-vm is not installed here; name a program instead")
        argv = [client, "--", recorded.target, recorded.descriptor]
        what = f"call {recorded.descriptor} on {recorded.target}"
    if not recorded.complete:
        click.echo("The record has no end: it may not hold all that was said.", err=True)
    if not yes:
        question = f"This will {what} with {len(recorded.said)} bytes. Go on?"
        click.confirm(question, abort=True, err=True)
    outcome = replaying.replay(recorded, argv, timeout)
    if output:
        with open(output, "wb") as stream:
            stream.write(outcome.answer)
    if outcome.differs_at is None:
        click.echo(f"same answer: {len(outcome.answer)} bytes, exit code {outcome.exit_code}")
        return
    click.echo(
        f"different answer: {len(outcome.answer)} bytes, not {len(recorded.answered)};"
        f" first difference at byte {outcome.differs_at}, exit code {outcome.exit_code}"
    )
    sys.exit(1)


@click.command()
@config_option
@told
def metrics(config: str | None) -> None:
    """Print the counters that the filter metrics keeps, as Prometheus reads them."""
    from sluice.proxy.metrics_file import text
    from sluice.proxy.paths import state_directory

    click.echo(text(state_directory(settings_of(config).state)), nl=False)


@click.command()
@click.option("--once", is_flag=True, help="Print the calls once and end.")
@click.option("--interval", default=1.0, show_default=True, help="Seconds between two looks.")
@told
def top(once: bool, interval: float) -> None:
    """Show the calls under way. Keys: up and down choose one, k ends it, q leaves."""
    from rich.console import Console

    from sluice.proxy.viewing import Rates

    console = Console()
    rates = Rates()
    # A terminal that can only print has no place to draw on.
    drawable = sys.stdin.isatty() and console.is_terminal and not console.is_dumb_terminal
    if once or not drawable:
        console.print(table_of(calls_under_way(), rates, None))
        return
    _Top(console, rates, max(interval, 0.1)).run()


def calls_under_way() -> list[dict[str, Any]]:
    """Return the calls of the resident form, if it runs, and those of the program form."""
    from sluice.proxy.control import ControlClient
    from sluice.proxy.viewing import program_calls

    try:
        with ControlClient() as client:
            resident = client.calls()
    except LocalError:
        resident = []
    return resident + program_calls()


def end_call(ident: str) -> None:
    """End a call under way, of either form. Raises LocalError where it is over already."""
    from sluice.proxy.control import ControlClient

    if ident.startswith("pid:"):
        try:
            os.kill(int(ident[4:]), signal.SIGTERM)
        except OSError as error:
            raise LocalError(f"cannot end it: {error.strerror}") from None
        return
    with ControlClient() as client:
        client.end(ident)


def table_of(calls: list[dict[str, Any]], rates: Any, chosen: int | None) -> Table:
    """Return the calls as a table; ``chosen`` is the place of the one to be marked."""
    from rich.table import Table
    from rich.text import Text

    from sluice.proxy.units import show_size
    from sluice.wire.names import escape

    table = Table(box=None, pad_edge=False, expand=True, title=f"{len(calls)} calls under way")
    # What a narrow terminal cuts is the service; names of domains have a column of their own size.
    widths = {"source": 12, "target": 12, "service": None, "chain": 10, "state": 7, "time": 5}
    for column, width in widths.items():
        share = 1 if width is None else None
        table.add_column(column, overflow="ellipsis", no_wrap=True, max_width=width, ratio=share)
    for column in ("->", "->/s", "<-", "<-/s"):
        table.add_column(column, justify="right", no_wrap=True)
    now = time.monotonic()
    for place, call in enumerate(calls):
        service = call["service"] + ("" if call["argument"] is None else f"+{call['argument']}")
        cells = [call["source"], call["target"], service, call["chain"], call["state"]]
        cells = [escape(str(cell), 40) for cell in cells] + [f"{call['seconds']:.0f}s"]
        moved = rates.of(call, now)
        for direction in ("src2dst", "dst2src"):
            size, rate = moved.get(direction, (None, None))
            cells += ["-", "-"] if size is None else [show_size(size), show_size(rate or 0)]
        # Text, not markup: "[" in an argument is only that.
        style = "reverse" if place == chosen else ""
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


class _Top:
    """The interactive table: looks, draws, reads keys."""

    def __init__(self, console: Console, rates: Any, interval: float) -> None:
        self._console = console
        self._rates = rates
        self._interval = interval
        self._chosen = 0
        self._calls: list[dict[str, Any]] = []
        self._said = ""

    def run(self) -> None:
        """Show the table until ``q`` or ^C."""
        import termios
        import tty

        from rich.live import Live

        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
        try:
            tty.setcbreak(fd)
            with Live(console=self._console, screen=True, auto_refresh=False) as live:
                while True:
                    self._look()
                    live.update(self._draw(), refresh=True)
                    if not self._keys(fd, live):
                        return
        except KeyboardInterrupt:
            return
        finally:
            termios.tcsetattr(fd, termios.TCSADRAIN, before)

    def _look(self) -> None:
        self._calls = calls_under_way()
        self._rates.forget({call["id"] for call in self._calls})
        self._chosen = max(min(self._chosen, len(self._calls) - 1), 0)

    def _draw(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        table = table_of(self._calls, self._rates, self._chosen)
        return Group(table, Text(self._said or "k: end the marked call   q: leave", style="dim"))

    def _keys(self, fd: int, live: Any) -> bool:
        """Handle keys until it is time to look again; tell whether to go on."""
        import select

        deadline = time.monotonic() + self._interval
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([fd], [], [], left)[0]:
                break
            typed = os.read(fd, 32)
            if not typed or b"q" in typed:
                return False
            if typed == b"k" and self._calls:
                self._end()
            elif typed in (b"\x1b[A", b"\x1bOA"):
                self._chosen = max(self._chosen - 1, 0)
            elif typed in (b"\x1b[B", b"\x1bOB"):
                self._chosen = min(self._chosen + 1, max(len(self._calls) - 1, 0))
            live.update(self._draw(), refresh=True)
        return True

    def _end(self) -> None:
        call = self._calls[self._chosen]
        try:
            end_call(call["id"])
            self._said = f"ended: {call['source']} -> {call['target']} {call['service']}"
        except LocalError as error:
            self._said = str(error)


COMMANDS = (log_command, show, replay, metrics, top)
