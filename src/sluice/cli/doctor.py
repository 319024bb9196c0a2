"""``sluice doctor``: what this machine can do, and what follows."""

from __future__ import annotations

import json
import sys

import click

from sluice.cli.common import places, root_option, tell_errors

LEVELS = {
    3: "3 privileged: each domain has user ids of its own, limits are set by control groups",
    2: "2 rootless+: each domain has subordinate user ids of its own",
    1: "1 rootless: sandboxes work, all domains share one user id",
    0: "0 none: no sandboxes here; kind `process` only, which isolates nothing",
}


@click.command()
@click.option(
    "--can",
    type=click.Choice(["bubblewrap", "process", "own-ids", "limits"]),
    help="Print nothing but why not; end with 0 if the machine can do that, else with 1.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@root_option
@tell_errors
def command(can: str | None, as_json: bool, root: str | None) -> None:
    """Say what this machine can do. Ends with 1 where no sandbox can start."""
    from sluice.domains.sandbox import probe

    findings = probe.examine(places(root).state)
    level = probe.level(findings)
    if can is not None:
        obstacles = probe.obstacles(findings, can)
        for finding in obstacles:
            click.echo(f"{finding.what}: {finding.found}; {finding.follows}", err=True)
        sys.exit(1 if obstacles else 0)
    if as_json:
        document = {
            "level": level,
            "findings": [
                {
                    "what": finding.what,
                    "state": finding.state,
                    "found": finding.found,
                    "follows": finding.follows,
                }
                for finding in findings
            ],
        }
        click.echo(json.dumps(document, indent=2))
    else:
        for finding in findings:
            click.echo(f"{finding.state:8}{finding.what + ':':22}{finding.found}")
            if finding.follows:
                click.echo(f"{'':30}{finding.follows}")
        click.echo(f"level   {LEVELS[level]}")
    sys.exit(0 if level else 1)
