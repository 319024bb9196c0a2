"""``sluice policy test``: run tables of calls and expected decisions, with coverage of rules."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import click

from sluice.cli.policy_common import Place, place_options, read_system_info, say, tell_policy_errors
from sluice.errors import ConfigError, LocalError
from sluice.policy import cases
from sluice.policy.cases import Coverage, Failure, Table, coverage, parse_table, run_case
from sluice.policy.decisions import settle
from sluice.policy.evaluation import Policy
from sluice.policy.resolution import Deny
from sluice.policy.rules import Rule
from sluice.policy.system_info import SystemInfo


def _help() -> str:
    """Return the help: what it does, and the format of the tables, paragraph by paragraph."""
    intro = (
        "Run the cases of FILEs. Exit status 0 if all hold, 1 if not, or if the rules are covered "
        "less than PERCENT."
    )
    paragraphs = (cases.__doc__ or "").strip().replace("``", "").split("\n\n")
    # \b: click shall not join the lines of a paragraph.
    return "\n\n".join([intro, *(f"\b\n{paragraph}" for paragraph in paragraphs)])


@click.command(help=_help(), short_help="Run tables of calls and expected decisions.")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--coverage", "show_coverage", is_flag=True, help="List the rules never used.")
@click.option("--min-coverage", type=click.FloatRange(0, 100), metavar="PERCENT")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@place_options
@tell_policy_errors
def command(
    files: tuple[str, ...],
    show_coverage: bool,
    min_coverage: float | None,
    as_json: bool,
    place: Place,
) -> None:
    """Run the cases and print what did not hold, and the coverage."""
    failures: list[Failure] = []
    count = 0
    covered: list[tuple[str, Coverage]] = []
    for name in files:
        table = _read(name)
        policy, info = _world(table, place)
        deciding: list[Rule | None] = []
        for case in table.cases:
            failure, rule = run_case(case, policy, info)
            deciding.append(rule)
            if failure is not None:
                failures.append(failure)
                if not as_json:
                    _print(failure, info)
        count += len(table.cases)
        covered.append((name, coverage(policy, deciding)))
    low = [name for name, c in covered if min_coverage is not None and c.percent < min_coverage]
    if as_json:
        click.echo(json.dumps(_to_json(count, failures, covered), indent=2))
    else:
        _summary(count, failures, covered, show_coverage)
        for name in low:
            say(f"{name}: less than {min_coverage:g} % of the rules are covered")
    sys.exit(1 if failures or low else 0)


def _read(name: str) -> Table:
    with open(name, "rb") as stream:
        content = stream.read()
    try:
        return parse_table(content.decode("utf-8"), name)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"not valid UTF-8: byte 0x{content[error.start]:02x}"
        raise ConfigError(message, file=name, line=line) from None


def _world(table: Table, place: Place) -> tuple[Policy, SystemInfo]:
    """Return what a table is about: its own directives go before the options."""
    here = os.path.dirname(os.path.abspath(table.file))
    if table.legacy is not None:
        legacy = table.legacy if table.legacy == "-" else os.path.join(here, table.legacy)
        place = replace(place, legacy=legacy)
    directories = tuple(os.path.join(here, directory) for directory in table.policy)
    policy = place.load(directories=directories or None)
    if table.domains and table.system_info:
        raise LocalError(f"{table.file}: !domain and !system-info exclude each other")
    if table.domains:
        return policy, SystemInfo(table.domains)
    if table.system_info:
        return policy, read_system_info(os.path.join(here, table.system_info))
    return policy, place.info()


def _print(failure: Failure, info: SystemInfo) -> None:
    case, resolution = failure.case, failure.resolution
    say(f"{case.file}:{case.line}: {case.text}")
    for wrong in failure.wrong:
        say(f"    {wrong}")
    why = f": {resolution.message}" if isinstance(resolution, Deny) else ""
    place = f" by {resolution.rule.place}" if resolution.rule else ""
    say(f"    decided{place}: {settle(resolution, info)[0]}{why}")


def _summary(
    count: int, failures: list[Failure], covered: list[tuple[str, Coverage]], show: bool
) -> None:
    for name, found in covered:
        total = len(found.decided) + len(found.missed)
        say(
            f"{name}: {len(found.decided)} of {total} rules decided something "
            f"({found.percent:.0f} %)"
        )
        if show:
            for rule in found.missed:
                say(f"    never: {rule.place}  {str(rule).replace(chr(9), '  ')}")
    say(f"{count} calls, {len(failures)} not as expected")


def _to_json(
    count: int, failures: list[Failure], covered: list[tuple[str, Coverage]]
) -> dict[str, object]:
    return {
        "calls": count,
        "failures": [
            {"file": f.case.file, "line": f.case.line, "case": f.case.text, "wrong": list(f.wrong)}
            for f in failures
        ],
        "coverage": [
            {
                "table": name,
                "percent": round(found.percent, 1),
                "missed": [{"file": rule.file, "line": rule.line} for rule in found.missed],
            }
            for name, found in covered
        ],
    }
