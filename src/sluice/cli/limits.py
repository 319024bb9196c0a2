"""``sluice limits``: change the limits of a domain while it runs."""

from __future__ import annotations

import click

from sluice.cli.common import ask, places, root_option, tell_errors
from sluice.errors import LocalError


@click.command()
@click.argument("name")
@click.option("--memory", type=click.IntRange(1, 1 << 24), help="MiB that it may use at most.")
@click.option("--processes", type=click.IntRange(1, 1 << 22), help="Processes and threads.")
@click.option("--cpus", type=click.IntRange(1, 1024), help="Processors' worth of time.")
@root_option
@tell_errors
def command(
    name: str, memory: int | None, processes: int | None, cpus: int | None, root: str | None
) -> None:
    """Set other limits for the running domain NAME, until it stops (see `sluice ls --limits`)."""
    if memory is None and processes is None and cpus is None:
        raise LocalError("which limit? --memory, --processes, --cpus")
    ask(places(root), "limits", name=name, memory=memory, processes=processes, cpus=cpus)
