"""``sluice service``: what can be asked about the services of this domain."""

from __future__ import annotations

import os
import sys

import click

from sluice.service.configuration import CONFIG_PATH_VARIABLE, DEFAULT_CONFIG_PATH
from sluice.service.lint import ERROR, lint_services
from sluice.service.lookup import DEFAULT_SERVICE_PATH, SERVICE_PATH_VARIABLE


@click.group()
def command() -> None:
    """Look after the services of a domain."""


@command.command()
@click.option(
    "--services",
    metavar="PATH",
    help="Colon-separated directories of services ($QREXEC_SERVICE_PATH or the usual ones).",
)
@click.option(
    "--settings",
    metavar="PATH",
    help="Colon-separated directories of settings ($QUBES_RPC_CONFIG_PATH or the usual ones).",
)
@click.option("--strict", is_flag=True, help="Fail on warnings too.")
def lint(services: str | None, settings: str | None, strict: bool) -> None:
    """Find services and settings that no call could use, or that cannot be meant so.

    Exits with 1 where there is an error: a call would fail because of it.
    """
    found = lint_services(
        services or os.environ.get(SERVICE_PATH_VARIABLE) or DEFAULT_SERVICE_PATH,
        settings or os.environ.get(CONFIG_PATH_VARIABLE) or DEFAULT_CONFIG_PATH,
    )
    for finding in found:
        click.echo(finding.text if finding.severity == ERROR else f"{finding.text} (warning)")
    errors = [finding for finding in found if finding.severity == ERROR]
    if errors or (strict and found):
        sys.exit(1)
