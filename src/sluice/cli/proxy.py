"""``sluice proxy``: try, check and look into chains of filters (docs/spec/proxy.md)."""

from __future__ import annotations

import sys

import click

from sluice.cli.proxy_common import config_option, told
from sluice.cli.proxy_look import COMMANDS
from sluice.errors import ConfigError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Chains of filters in the pipe of a call."""


@command.command()
@config_option
@click.option(
    "--sockets",
    metavar="DIR",
    help="Where the sockets are made; otherwise SLUICE_PROXY_SOCKETS, /run/sluice-proxy or the"
    " user's runtime directory. Ignored for those that systemd hands over.",
)
@told
def serve(config: str | None, sockets: str | None) -> None:
    """Serve all calls in one process, for the launcher and for the raw socket."""
    from sluice.flow.selector import run
    from sluice.proxy.server import serve as serve_until_told

    run(serve_until_told(config, directory=sockets))


@command.command(context_settings={"ignore_unknown_options": True})
@config_option
@click.option("--chain", metavar="NAME", help="The chain of the configuration.")
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="FILTER",
    help="Instead of a chain: a filter, as NAME:option=value,... or the path of its file;"
    " may be repeated.",
)
@click.option("--source", default="here", metavar="DOMAIN", help="Who calls, for the filters.")
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)
@told
def run(
    config: str | None,
    chain: str | None,
    filters: tuple[str, ...],
    source: str,
    program: tuple[str, ...],
) -> None:
    """Put a chain between stdin/stdout and a program: sluice proxy run --chain X -- PROGRAM."""
    from sluice.proxy.command import configuration_of, filters_from_words, run_command
    from sluice.proxy.configuration import load

    if bool(chain) == bool(filters):
        raise click.UsageError("give either --chain or --filter")
    if filters:
        chain = "tried"
        configuration = configuration_of(filters_from_words(filters), chain)
    else:
        configuration = load(config)
    assert chain is not None
    sys.exit(run_command(configuration, chain, program, source=source))


@command.command()
@config_option
@told
def check(config: str | None) -> None:
    """Validate the configuration and print every chain as it will run."""
    from sluice.proxy.configuration import load
    from sluice.proxy.show import chain_lines

    configuration = load(config)
    for file in configuration.files:
        click.echo(f"# {file}")
    for chain in configuration.chains.values():
        click.echo()
        for line in chain_lines(chain):
            click.echo(line)
    count = len(configuration.chains)
    click.echo(f"\n{count} chain{'s' * (count != 1)}, no mistakes.")


@command.command()
@config_option
@told
def chains(config: str | None) -> None:
    """List the chains."""
    from sluice.proxy.configuration import load
    from sluice.proxy.show import element_names, in_column

    found = load(config).chains
    width = max(map(len, found), default=0)
    for chain in found.values():
        names = ", ".join(element_names(chain)) or "(no filter)"
        about = f": {chain.description}" if chain.description else ""
        for line in in_column(chain.name, f"{names}{about}", width):
            click.echo(line)


@command.command("filters")
@config_option
@click.argument("name", required=False)
@told
def filters_command(config: str | None, name: str | None) -> None:
    """List the filters there are, or one with its options."""
    from sluice.proxy.loader import Filters
    from sluice.proxy.show import filter_lines, in_column, summary

    known = Filters(_directories(config))
    if name is not None:
        for line in filter_lines(known.get(name)):
            click.echo(line)
        return
    names = known.names()
    width = max(map(len, names))
    for each, origin in names.items():
        about = summary(known.get(each)).replace("``", "'") if origin == "built in" else origin
        for line in in_column(each, about, width):
            click.echo(line)


def _directories(config: str | None) -> list[str]:
    """Return the configured directories of filters; none where nothing is configured."""
    from sluice.proxy.configuration import load
    from sluice.proxy.paths import configuration_files

    try:
        configuration_files(config)
    except ConfigError:
        if config:
            raise
        return []
    return load(config).settings.filters


@command.command("import")
@click.argument("file", metavar="CONFIG.JSON")
@told
def import_command(file: str) -> None:
    """Print the earlier proxy's config.json as TOML."""
    from sluice.proxy.legacy import as_toml, load_legacy

    click.echo(as_toml(load_legacy(file)))


for _look in COMMANDS:
    command.add_command(_look)
