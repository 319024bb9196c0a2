"""Rules and requests: the values that everything in this package speaks of (sections 4 to 6, 9).

A rule is one line of a policy: five columns and options. Rules are immutable and know the place
that they were read from. Their text form (section 5.3) reads back as the same rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from sluice.policy.tokens import WILDCARD, Token

OPT_IN = "#!sluice 1"
"""The very first line of a file that uses the extensions of section 31."""


class Verb(Enum):
    """What a rule does with the calls it decides. The value is the word in the rule."""

    ALLOW = "allow"
    ASK = "ask"
    DENY = "deny"


class Hop(NamedTuple):
    """One proxy of ``via=``: the domain (or ``@dispvm:NAME``) and the chain in it (section 31)."""

    proxy: str
    chain: str

    def __str__(self) -> str:
        """Return it as written in a rule."""
        return f"{self.proxy}+{self.chain}"


class Limit(NamedTuple):
    """``limit=N/DURATION``: at most ``calls`` in any interval of ``seconds``, for each source."""

    calls: int
    seconds: int
    text: str

    def __str__(self) -> str:
        """Return it as written in a rule."""
        return self.text


class Action(NamedTuple):
    """The last column of a rule: the verb and its options (section 6)."""

    verb: Verb
    target: str | None = None
    """``target=``: replaces the requested target once the rule has matched."""
    default_target: str | None = None
    """``default_target=``: what a question preselects."""
    user: str | None = None
    """``user=``: the account; None where it is not given or empty."""
    notify: bool = False
    autostart: bool = True
    via: tuple[Hop, ...] = ()
    limit: Limit | None = None
    reason: str | None = None
    """``reason=``: for the operator only; it is escaped wherever it is shown."""

    def options(self) -> list[str]:
        """Return the options that differ from their defaults, in the order of section 5.3."""
        given = [
            f"{key}={value}"
            for key, value in (
                ("target", self.target),
                ("default_target", self.default_target),
                ("user", self.user),
            )
            if value is not None
        ]
        if self.notify != (self.verb is Verb.DENY):
            given.append("notify=yes" if self.notify else "notify=no")
        if not self.autostart:
            given.append("autostart=no")
        if self.via:
            given.append("via=" + ",".join(map(str, self.via)))
        if self.limit is not None:
            given.append(f"limit={self.limit}")
        if self.reason is not None:
            given.append(f"reason={self.reason}")
        return given

    def __str__(self) -> str:
        """Return the last field of the text form: verb and options, separated by spaces."""
        return " ".join([self.verb.value, *self.options()])


class Rule(NamedTuple):
    """One rule. ``line`` is None for the denials implied by legacy files (section 8.3)."""

    service: str
    """A service name, or ``*``."""
    argument: str
    """``+`` and the argument, ``+`` alone for the empty one, or ``*``."""
    source: Token
    target: Token
    action: Action
    file: str
    line: int | None

    @property
    def place(self) -> str:
        """``FILE:LINE`` as it is cited; the line of an implied rule shows as ``None``."""
        return f"{self.file}:{self.line}"

    def __str__(self) -> str:
        """Return the text form of section 5.3: five fields separated by tabs."""
        return "\t".join(
            (self.service, self.argument, self.source.text, self.target.text, str(self.action))
        )

    def matches_call(self, service: str, argument: str) -> bool:
        """Tell whether the rule speaks of this service and argument (section 10)."""
        return (self.service == WILDCARD or self.service == service) and (
            self.argument == WILDCARD or self.argument == argument
        )

    def uses_extensions(self) -> bool:
        """Tell whether the rule can be written only in a file that opts in (section 31)."""
        action = self.action
        return bool(
            action.via
            or action.limit is not None
            or action.reason is not None
            or self.source.parts != (self.source.text,)
            or self.target.parts != (self.target.text,)
        )


@dataclass(frozen=True, slots=True)
class Request:
    """A call that somebody wants to make (section 9), as received.

    ``argument`` begins with ``+``; the empty text stands for no argument, which is the same as
    ``+``. ``target`` may be empty. ``requested_source`` is None or empty where nobody presents one.
    """

    service: str
    argument: str
    source: str
    target: str
    requested_source: str | None = None

    def __post_init__(self) -> None:
        """Normalise the argument; raise ValueError for one that does not begin with ``+``."""
        if not self.argument:
            object.__setattr__(self, "argument", "+")
        elif self.argument[0] != "+":
            raise ValueError("the argument of a request begins with +")

    @classmethod
    def of(
        cls,
        service_and_argument: str,
        source: str,
        target: str,
        requested_source: str | None = None,
    ) -> Request:
        """Build a request from ``SERVICE[+ARGUMENT]``, split at the first ``+`` (POL-096, 097)."""
        service, plus, argument = service_and_argument.partition("+")
        return cls(service, plus + argument, source, target, requested_source)

    @property
    def call(self) -> str:
        """``SERVICE+ARGUMENT``; a call without argument ends in ``+``."""
        return self.service + self.argument
