"""``sluice policy``: the questions that people have about a policy, loaded one by one."""

from __future__ import annotations

import importlib

import click

# name -> module; each has a click command called ``command``.
_COMMANDS = {
    "explain": "policy_explain",
    "lint": "policy_lint",
    "test": "policy_test",
    "who-can": "policy_who_can",
    "what-can": "policy_what_can",
    "diff": "policy_diff",
    "graph": "policy_graph",
}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        found = importlib.import_module(f"sluice.cli.{_COMMANDS[cmd_name]}").command
        assert isinstance(found, click.Command)
        return found


@click.group(cls=_Group)
def command() -> None:
    """Ask what a policy means: who may call what, and why."""
