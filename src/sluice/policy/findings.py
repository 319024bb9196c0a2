"""What the linter says: findings, and their text (section 21.2)."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

from sluice.errors import PolicyError
from sluice.policy.hints import hint
from sluice.policy.problems import PolicyProblem, PolicySyntaxError
from sluice.policy.rules import Rule


class Severity(Enum):
    """How bad it is. Errors deny every call; warnings are what a person should look at."""

    ERROR = "error"
    WARNING = "warning"


class Finding(NamedTuple):
    """One thing that the linter found."""

    severity: Severity
    code: str
    message: str
    file: str
    line: int | None
    column: int = 0
    marked: str = ""
    """The line and a mark below it; empty where there is none."""
    related: tuple[str, ...] = ()
    """``FILE:LINE`` of other rules that have to do with it."""
    hint: str = ""
    """What to write instead, for people."""

    def __str__(self) -> str:
        """Return ``FILE:LINE: error: MESSAGE`` (section 21.2); warnings also name their code."""
        tail = "" if self.severity is Severity.ERROR else f" [{self.code}]"
        return f"{self.file}:{self.line or 0}: {self.severity.value}: {self.message}{tail}"

    def to_json(self) -> dict[str, Any]:
        """Return it as an object for machines."""
        return {
            "severity": self.severity.value,
            "code": self.code,
            "message": self.message,
            "file": self.file,
            "line": self.line,
            "column": self.column or None,
            "related": list(self.related),
            "hint": self.hint or None,
        }


def from_error(error: PolicyError) -> Finding:
    """Turn an error of loading into a finding."""
    code = "syntax" if isinstance(error, PolicySyntaxError) else "load"
    place = (error.file or "<unknown>", error.line)
    marked = (error.column, error.marked()) if isinstance(error, PolicyProblem) else (0, "")
    return Finding(Severity.ERROR, code, error.message, *place, *marked, hint=hint(error))


def at(rule: Rule, code: str, message: str, *related: Rule) -> Finding:
    """Return a warning about a rule."""
    places = tuple(other.place for other in related)
    return Finding(Severity.WARNING, code, message, rule.file, rule.line, related=places)
