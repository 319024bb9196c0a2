"""The ``sluice`` command: a table of subcommands, each loaded only when it is called."""

from __future__ import annotations

import importlib

import click

import sluice

# name -> "module:attribute". Loading one subcommand must not cost the imports of the others.
LAZY: dict[str, str] = {
    "init": "sluice.cli.init:command",
    "up": "sluice.cli.up:command",
    "down": "sluice.cli.down:command",
    "start": "sluice.cli.domain:start",
    "stop": "sluice.cli.domain:stop",
    "wipe": "sluice.cli.wipe:command",
    "ls": "sluice.cli.ls:command",
    "shell": "sluice.cli.shell:command",
    "run": "sluice.cli.run:command",
    "cp": "sluice.cli.cp:command",
    "limits": "sluice.cli.limits:command",
    "log": "sluice.cli.log:command",
    "doctor": "sluice.cli.doctor:command",
    "proxy": "sluice.cli.proxy:command",
    "policy": "sluice.cli.policy:command",
    "service": "sluice.cli.service:command",
}


class LazyGroup(click.Group):
    """A group that knows the names of its commands and imports a command's module on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all subcommands, in the order of the table."""
        return list(LAZY)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one subcommand, or None where there is none of that name."""
        if cmd_name not in LAZY:
            return None
        module, attribute = LAZY[cmd_name].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--root", metavar="DIR", envvar="SLUICE_ROOT", help="See the subcommands.")
@click.version_option(sluice.__version__, prog_name="sluice")
def main(root: str | None) -> None:
    """Qubes RPC (qrexec) for any Linux, with a firewall in the data path."""
