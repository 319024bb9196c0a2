"""What the commands of ``sluice proxy`` share: errors as lines, the option --config."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from sluice.errors import SluiceError


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors of ours into a line on stderr and their exit code."""

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except SluiceError as error:
            click.echo(f"sluice proxy: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(130)

    return run


config_option = click.option(
    "--config",
    metavar="FILE",
    help="Read this configuration: a TOML file, a config.json of the earlier proxy, or a"
    " directory with either. Otherwise SLUICE_PROXY_CONFIG or the usual places.",
)
