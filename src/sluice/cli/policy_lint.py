"""``sluice policy lint``: what is wrong, or odd, with the policy of a system or with some files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable

import click

from sluice.cli.common import places
from sluice.cli.policy_common import QUBESD, Place, place_options, say, tell_policy_errors
from sluice.errors import PolicyError
from sluice.policy.evaluation import Policy
from sluice.policy.findings import Finding, Severity, from_error
from sluice.policy.lint import lint
from sluice.policy.lint_lines import lint_text
from sluice.policy.loader import parse_file
from sluice.policy.rules import Rule
from sluice.policy.shipped import shipped_files
from sluice.wire.names import escape

_SERVICE_DIRECTORIES = ("/etc/qubes-rpc", "/usr/local/etc/qubes-rpc")


@click.command(short_help="Find what is wrong, or odd, with a policy.")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("-i", "--include-service", is_flag=True, help="FILEs are in service format.")
@click.option("--services", metavar="DIR", multiple=True, help="Services that exist (repeatable).")
@click.option("--all", "show_all", is_flag=True, help="Show warnings about shipped files, too.")
@click.option("--strict", is_flag=True, help="Warnings make the exit status 1, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@place_options
@tell_policy_errors
def command(
    files: tuple[str, ...],
    include_service: bool,
    services: tuple[str, ...],
    show_all: bool,
    strict: bool,
    as_json: bool,
    place: Place,
) -> None:
    """Check the whole policy, or FILEs each on its own ("-" is standard input).

    Errors deny every call. Warnings: rules that are never reached, names that do not exist,
    redirections to what cannot be, wildcards that give too much, proxies that serve sources of
    different labels. Those about files that are as shipped are only counted. Exit status 0 without
    errors, 1 with.
    """
    findings: list[Finding] = []
    if files:
        for name in files:
            findings += _lint_file(name, include_service)
    else:
        findings = _lint_set(place, services)
        if not show_all:
            findings = _written_here(findings, place.directories)
    if as_json:
        click.echo(json.dumps([finding.to_json() for finding in findings], indent=2))
    else:
        for finding in findings:
            say(str(finding))
            for line in finding.marked.splitlines():
                say(f"    {line}")
            if finding.hint:
                say(f"    {finding.hint}")
    bad = [f for f in findings if strict or f.severity is Severity.ERROR]
    sys.exit(1 if bad else 0)


def _lint_set(place: Place, service_dirs: tuple[str, ...]) -> list[Finding]:
    errors: list[PolicyError] = []
    policy = place.load(errors.append)
    info = place.info_if_known()
    found = [from_error(error) for error in errors]
    found += [
        Finding(Severity.WARNING, "deprecated", text.partition(": ")[2], *_split(text))
        for text in policy.warnings
    ]
    found += _not_read(place.directories)
    if info is None:
        message = "no domains are known here, so their names were not checked (--system-info FILE)"
        say(f"sluice: {message}", err=True)
    known, everywhere = _services(service_dirs, place)
    return found + lint(policy, info, known, everywhere=everywhere)


def _written_here(findings: list[Finding], directories: tuple[str, ...]) -> list[Finding]:
    """Leave out warnings about nothing but files that are as shipped; say how many."""
    shipped = shipped_files(compat=True)
    paths = {f"{directory}/{name}": name for directory in directories for name in shipped}
    untouched = {path for path, name in paths.items() if _content(path) == shipped[name]}
    shown = []
    for finding in findings:
        concerned = {finding.file, *(place.rpartition(":")[0] for place in finding.related)}
        if finding.severity is Severity.ERROR or not concerned <= untouched:
            shown.append(finding)
    count = len(findings) - len(shown)
    if count:
        noun = f"warning{'s' * (count != 1)}"
        say(f"sluice: {count} {noun} about unchanged shipped files not shown (--all)", err=True)
    return shown


def _content(path: str) -> bytes | None:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError:
        return None


def _not_read(directories: tuple[str, ...]) -> list[Finding]:
    """Return a finding for each file that lies beside the policy files but is none (3.2)."""
    found = []
    for directory in directories:
        for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
            path = os.path.join(directory, name)
            if name.startswith(("README", ".")) or name.endswith(".policy"):
                continue
            if os.path.isfile(path):
                message = "this file is not read: its name does not end in .policy"
                found.append(Finding(Severity.WARNING, "not-read", message, escape(path), None))
    return found


def _split(warning: str) -> tuple[str, int | None]:
    file, _, line = warning.partition(": ")[0].rpartition(":")
    return file, int(line)


def _services(given: tuple[str, ...], place: Place) -> tuple[set[str] | None, bool]:
    """Return the names of services that exist, None where nobody knows, and whether these are all.

    They are those of directories, of a system of Sluice, or of dom0 where this is Qubes' dom0.
    """
    paths = places(place.root)
    if given:
        return _names(given), True
    if place.system_info is None and paths.system_file.exists():
        from sluice.domains.offered import services

        return services(paths), True
    if os.path.exists(QUBESD):
        return _names(d for d in _SERVICE_DIRECTORIES if os.path.isdir(d)), False
    return None, False


def _names(directories: Iterable[str]) -> set[str]:
    return {name.partition("+")[0] for each in directories for name in os.listdir(each)}


def _lint_file(name: str, include_service: bool) -> list[Finding]:
    try:
        with click.open_file(name, "rb") as stream:
            content = stream.read()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        message = "File does not exist." if missing else error.strerror or str(error)
        whole = isinstance(error, IsADirectoryError)
        advice = f"--policy-dir {name} checks a directory as a whole" if whole else ""
        return [Finding(Severity.ERROR, "load", message, name, None, hint=advice)]
    found = lint_text(content, name, service_format=include_service)
    if include_service or any(finding.severity is Severity.ERROR for finding in found):
        return found
    rules = [item for item in parse_file(name, content, None).items if isinstance(item, Rule)]
    return found + lint(Policy(rules))
