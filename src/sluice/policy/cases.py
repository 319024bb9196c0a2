"""Tables of calls and expected decisions: tests of a policy, with coverage of its rules.

One case a line, words separated by spaces, ``#`` begins a comment line:

    SOURCE  TARGET  SERVICE[+ARGUMENT]  allow|ask|deny  [KEY=VALUE ...]

``-`` as target is a call without one. Each key must hold as well:

    target=NAME      what is called in the end           user=USER        the account
    service=CALL     what the relay of a RemoteVM runs   autostart=yes|no
    targets=A,B      all that the question offers        notify=yes|no
    offers=A,B       some of what it offers              cause=LABEL      of section 17.1
    default=NAME     what it preselects; - for nothing   rule=FILE[:LINE] the deciding rule
    via=HOPS         the proxies, as in the rule         limit=N/DURATION as in the rule

``from=REMOTE`` is no expectation: the call is made for that RemoteVM (section 13.2).

Directives say what the cases are about. Paths are relative to the table:

    !policy DIRECTORY        read rules from here (repeatable; the first one wins for equal names)
    !legacy DIRECTORY        what !compat-4.0 reads; - for an empty directory
    !system-info FILE        domains, as JSON of internal.GetSystemInfo
    !domain NAME [KEY=VALUE] one domain: type= tags=A,B base=yes|no default_dispvm= running=yes|no
                             label= guivm= relayvm= transport_rpc= internal=yes|no uuid=
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sluice.errors import ConfigError
from sluice.policy.decisions import settle
from sluice.policy.evaluation import Policy
from sluice.policy.resolution import Allow, Ask, Deny
from sluice.policy.response import direct
from sluice.policy.rules import Request, Rule
from sluice.policy.system_info import Domain, SystemInfo

_VERBS = ("allow", "ask", "deny")
_REPLY_KEYS = ("target", "service", "user", "autostart", "notify", "via", "limit")
_ASK_KEYS = ("targets", "offers", "default")
_KEYS = frozenset({*_REPLY_KEYS, *_ASK_KEYS, "cause", "rule", "from"})
_FLAGS = ("base", "running", "internal")
_TEXTS = ("default_dispvm", "label", "guivm", "relayvm", "transport_rpc", "uuid")
_DOMAIN_KEYS = frozenset({*_FLAGS, *_TEXTS, "type", "tags"})


class Case(NamedTuple):
    """One line of a table."""

    request: Request
    verb: str
    expected: Mapping[str, str]
    file: str
    line: int
    text: str


@dataclass
class Table:
    """A whole file of cases; the paths are as written."""

    file: str
    cases: list[Case] = field(default_factory=list)
    policy: list[str] = field(default_factory=list)
    legacy: str | None = None
    system_info: str | None = None
    domains: list[Domain] = field(default_factory=list)


class Failure(NamedTuple):
    """A case that did not hold: what was expected, and what came."""

    case: Case
    wrong: tuple[str, ...]
    resolution: Allow | Ask | Deny


class Coverage(NamedTuple):
    """Which rules decided at least one call, of all that have a line."""

    decided: frozenset[tuple[str, int]]
    missed: tuple[Rule, ...]

    @property
    def percent(self) -> float:
        """The share of rules that decided something; 100 for a policy without rules."""
        total = len(self.decided) + len(self.missed)
        return 100.0 * len(self.decided) / total if total else 100.0


def parse_table(text: str, file: str) -> Table:
    """Read a table. Raises ConfigError with the line of whatever is wrong with it."""
    table = Table(file)
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0].startswith("!"):
            _directive(table, words, number)
        else:
            table.cases.append(_case(words, file, number, line.strip()))
    return table


def _wrong(file: str, line: int, message: str, suggestion: str | None = None) -> ConfigError:
    return ConfigError(message, file=file, line=line, suggestion=suggestion)


def _pairs(words: Iterable[str], known: frozenset[str], file: str, line: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            choice = "one of " + ", ".join(sorted(known))
            raise _wrong(file, line, f"unknown word {word}", f"KEY=VALUE, KEY {choice}")
        if key in found:
            raise _wrong(file, line, f"{key} is given twice")
        found[key] = value
    return found


def _case(words: list[str], file: str, line: int, text: str) -> Case:
    if len(words) < 4 or words[3] not in _VERBS:
        suggestion = "SOURCE TARGET SERVICE[+ARGUMENT] allow|ask|deny [KEY=VALUE ...]"
        raise _wrong(file, line, "not a case", suggestion)
    source, target, call, verb = words[:4]
    expected = _pairs(words[4:], _KEYS, file, line)
    requested_source = expected.pop("from", None)
    request = Request.of(call, source, "" if target == "-" else target, requested_source)
    return Case(request, verb, expected, file, line, text)


def _directive(table: Table, words: list[str], line: int) -> None:
    name, rest = words[0], words[1:]
    if name == "!domain" and rest:
        table.domains.append(_domain(rest, table.file, line))
    elif name in ("!policy", "!legacy", "!system-info") and len(rest) == 1:
        if name == "!policy":
            table.policy.append(rest[0])
        elif name == "!legacy":
            table.legacy = rest[0]
        else:
            table.system_info = rest[0]
    else:
        choice = "!policy, !legacy, !system-info with a path, or !domain NAME [KEY=VALUE ...]"
        raise _wrong(table.file, line, f"unknown directive {name}", choice)


def _domain(words: list[str], file: str, line: int) -> Domain:
    given = _pairs(words[1:], _DOMAIN_KEYS, file, line)
    for key in _FLAGS:
        if given.get(key, "no") not in ("yes", "no"):
            raise _wrong(file, line, f"{key} is yes or no, not {given[key]}")
    klass = given.get("type", "AdminVM" if words[0] == "dom0" else "AppVM")
    return Domain(
        name=words[0],
        klass=klass,
        tags=frozenset(filter(None, given.get("tags", "").split(","))),
        uuid=given.get("uuid"),
        template_for_dispvms=given.get("base") == "yes",
        default_dispvm=given.get("default_dispvm") or None,
        power_state="Running" if given.get("running") == "yes" else "Halted",
        label=given.get("label"),
        guivm=given.get("guivm", "dom0"),
        relayvm=given.get("relayvm"),
        transport_rpc=given.get("transport_rpc"),
        internal=given.get("internal") == "yes",
    )


def run_case(case: Case, policy: Policy, info: SystemInfo) -> tuple[Failure | None, Rule | None]:
    """Decide a case; return the failure, if it is one, and the rule that decided."""
    resolution = policy.evaluate(case.request, info)
    rule = resolution.rule
    if isinstance(resolution, Allow):
        settled = direct(resolution, info)
        if isinstance(settled, Deny):
            resolution = settled
    actual = _actual(resolution, info)
    wrong = []
    if actual["verb"] != case.verb:
        wrong.append(f"{case.verb} expected, {actual['verb']} decided")
    for key, value in case.expected.items():
        if not _holds(key, value, actual):
            wrong.append(f"{key}={value} expected, {actual.get(_SHOWN.get(key, key), '')!r} found")
    return (Failure(case, tuple(wrong), resolution) if wrong else None), rule


_SHOWN = {"offers": "targets"}


def _actual(resolution: Allow | Ask | Deny, info: SystemInfo) -> dict[str, str]:
    """Return everything that a case can expect, as text."""
    decision, direction = settle(resolution, info)
    found = {
        "verb": decision.verb,
        "notify": "yes" if decision.notify else "no",
        "cause": str(resolution.cause),
        "autostart": "yes" if decision.autostart else "no",
        "user": decision.user or "",
        "target": decision.target or "",
        "targets": ",".join(decision.candidates),
        "default": decision.default_target or "-",
        "via": decision.via.removeprefix("via="),
        "limit": decision.limit.removeprefix("limit="),
        "service": (direction.service if direction else None) or "",
    }
    if resolution.rule is not None:
        found["rule"] = resolution.rule.place
    return found


def _holds(key: str, value: str, actual: Mapping[str, str]) -> bool:
    if key in ("targets", "offers"):
        have, want = set(actual["targets"].split(",")), set(filter(None, value.split(",")))
        have.discard("")
        return have == want if key == "targets" else have >= want
    if key == "rule":
        place = actual.get("rule", "")
        file = place.rpartition(":")[0]
        wanted = place if value.rpartition(":")[2].isdigit() else file
        return wanted == value or wanted.endswith("/" + value)
    return actual.get(key, "") == value


def coverage(policy: Policy, deciding: Iterable[Rule | None]) -> Coverage:
    """Return which rules decided, given the deciding rule of every case."""
    decided = frozenset(
        (rule.file, rule.line) for rule in deciding if rule is not None and rule.line is not None
    )
    missed: dict[tuple[str, int], Rule] = {}
    for rule in policy.rules:
        if rule.line is not None and (rule.file, rule.line) not in decided:
            missed.setdefault((rule.file, rule.line), rule)
    return Coverage(decided, tuple(missed.values()))
