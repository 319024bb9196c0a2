"""Checking files line by line, wherever they lie, as ``qubes-policy-lint`` does (21.2)."""

from __future__ import annotations

import re

from sluice.policy.findings import Finding, Severity, from_error
from sluice.policy.loader import parse_whole
from sluice.policy.parser import Directive, Kind
from sluice.policy.problems import PolicyProblem
from sluice.policy.rules import OPT_IN, Rule

# A plain name, or include/NAME.
_PATH = re.compile(r"(include/)?[^/]+")
_FIXED = ("any.Service", "*")


def lint_text(content: bytes, file: str, *, service_format: bool = False) -> list[Finding]:
    """Return every error of a file; includes are not followed, and need not exist.

    ``service_format``: the file is one that ``!include-service`` names (section 8.1).
    """
    parsed = parse_whole(file, content, _FIXED if service_format else None)
    found = []
    for item in parsed.items:
        if isinstance(item, PolicyProblem):
            found.append(from_error(item))
        elif isinstance(item, Directive):
            found += _directive(item)
    first = content.partition(b"\n")[0].strip().decode("utf-8", "replace")
    if first.startswith(OPT_IN.partition(" ")[0]) and not parsed.extensions:
        message = f"the first line looks like {OPT_IN} but is not: extensions are not understood"
        found.insert(0, Finding(Severity.WARNING, "opt-in", message, file, 1))
    if parsed.extensions and not any(_extended(item) for item in parsed.items):
        message = "the file opts into extensions and uses none"
        found.append(Finding(Severity.WARNING, "opt-in", message, file, 1))
    return found


def _extended(item: object) -> bool:
    if isinstance(item, Directive):
        return item.kind in (Kind.INCLUDE, Kind.INCLUDE_DIR, Kind.INCLUDE_SERVICE)
    return isinstance(item, PolicyProblem) or (isinstance(item, Rule) and item.uses_extensions())


def _directive(directive: Directive) -> list[Finding]:
    if directive.kind is Kind.COMPAT:
        message = "!compat-4.0 is deprecated"
        place = (directive.file, directive.line)
        return [Finding(Severity.WARNING, "deprecated", message, *place)]
    if directive.kind is Kind.INCLUDE_DIR or _allowed(directive.path):
        return []
    error = directive.error(f"invalid path {directive.path}: only NAME or include/NAME")
    return [from_error(error)]


def _allowed(path: str) -> bool:
    name = path.rpartition("/")[2]
    return bool(_PATH.fullmatch(path)) and name not in (".", "..")
