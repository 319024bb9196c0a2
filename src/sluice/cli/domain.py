"""``sluice start`` and ``sluice stop``: single domains of a system that runs."""

from __future__ import annotations

import click

from sluice.cli.common import ask, places, root_option, tell_errors


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@root_option
@tell_errors
def start(names: tuple[str, ...], root: str | None) -> None:
    """Start domains and wait until their agents answer."""
    paths = places(root)
    for name in names:
        ask(paths, "start", name=name)


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--kill", is_flag=True, help="End them at once, without asking their agents.")
@root_option
@tell_errors
def stop(names: tuple[str, ...], kill: bool, root: str | None) -> None:
    """End domains and wait until nothing of them is left; what they keep is kept."""
    paths = places(root)
    for name in names:
        ask(paths, "kill" if kill else "stop", name=name)
