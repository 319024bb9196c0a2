"""What the engine answers: allow, ask or deny, as values (sections 11, 16.2 and 17.1)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sluice.policy.rules import Hop, Limit, Request, Rule
from sluice.wire.names import escape


class Cause(StrEnum):
    """Why a call is decided as it is; the labels of section 17.1, and ours for what they lack."""

    RULE = "RULE"  # an allow or ask rule decides
    USER_ALLOW = "USER-ALLOW"  # the question was answered yes
    NO_MATCH = "NO-MATCH"
    POLICY_DENY = "POLICY-DENY"
    NO_TARGET = "NO-TARGET"
    NO_DVM = "NO-DVM"
    NOT_TEMPLATE = "NOT-TEMPLATE"
    AUTOSTART = "AUTOSTART"
    NO_ASK_TARGETS = "NO-ASK-TARGETS"
    USER_DENY = "USER-DENY"
    BAD_CHOICE = "BAD-CHOICE"
    BAD_ANSWER = "BAD-ANSWER"
    LOOPBACK = "LOOPBACK"
    NO_RELAY = "NO-RELAY"
    NO_TRANSPORT = "NO-TRANSPORT"
    RS_UNKNOWN = "RS-UNKNOWN"
    RS_NOT_REMOTE = "RS-NOT-REMOTE"
    RS_WRONG_RELAY = "RS-WRONG-RELAY"
    BAD_TARGET = "BAD-TARGET"
    LIMIT = "limit"  # over the limit= of the rule; spelled as in section 31
    POLICY_SYNTAX = "POLICY-SYNTAX"  # the policy has a syntax error: silent
    POLICY_LOAD = "POLICY-LOAD"  # the policy cannot be read: notified
    SYSTEM_INFO = "SYSTEM-INFO"  # there is no system information: silent


@dataclass(frozen=True, slots=True)
class Resolution:
    """What all three answers have in common.

    ``source`` is the policy source: the caller, or the RemoteVM that it stands for (section 13.2).
    ``requested_target`` is the target after normalisation, or as received where the call failed
    before. ``warnings`` are for the log.
    """

    request: Request
    source: str
    requested_target: str
    rule: Rule | None
    cause: Cause
    notify: bool
    warnings: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str, int | None] | None:
        """File and line of the deciding rule, or None where no rule decided."""
        return None if self.rule is None else (self.rule.file, self.rule.line)

    @property
    def via(self) -> tuple[Hop, ...]:
        """The proxies that the call passes, in order (section 31)."""
        return () if self.rule is None else self.rule.action.via

    @property
    def limit(self) -> Limit | None:
        """The limit of the rule; who carries out the call counts (``sluice.policy.limits``)."""
        return None if self.rule is None else self.rule.action.limit

    @property
    def reason(self) -> str | None:
        """The operator's reason, raw: escape it where it is shown, never send it to the source."""
        return None if self.rule is None else self.rule.action.reason

    def deny(self, cause: Cause, message: str, *, notify: bool = True) -> Deny:
        """Return a denial of the same call."""
        return Deny(
            self.request, self.source, self.requested_target, self.rule, cause, notify, (), message
        )


@dataclass(frozen=True, slots=True)
class Deny(Resolution):
    """Refused. ``message`` is for the log; it is safe there, and the caller never sees it."""

    message: str = ""
    # So that a log can print the same fields of every answer.
    target: None = None
    user: None = None
    autostart: None = None


@dataclass(frozen=True, slots=True)
class Allow(Resolution):
    """Allowed: call ``target`` (a name, ``uuid:...``, ``@dispvm:X`` or ``dom0``) as ``user``.

    Whether the call can be carried out is told by ``sluice.policy.response.direct``.
    """

    target: str = ""
    user: str | None = None
    autostart: bool = True


@dataclass(frozen=True, slots=True)
class Ask(Resolution):
    """To be asked: which of ``candidates`` (sorted), with ``default_target`` preselected."""

    candidates: tuple[str, ...] = ()
    default_target: str | None = None
    user: str | None = None
    autostart: bool = True
    target: None = None

    def chosen(self, untrusted_target: str) -> Allow | Deny:
        """Return the outcome when the question was answered yes with this target (11.3)."""
        if untrusted_target not in self.candidates:
            message = f"target {escape(untrusted_target)} was not among those offered"
            return self.deny(Cause.BAD_CHOICE, message)
        return Allow(
            self.request,
            self.source,
            self.requested_target,
            self.rule,
            Cause.USER_ALLOW,
            self.notify,
            (),
            untrusted_target,
            self.user,
            self.autostart,
        )

    def refused(self) -> Deny:
        """Return the outcome when the question was answered no, or there is nobody to ask."""
        assert self.rule is not None
        message = f"denied by the user, asked by {self.rule.place}"
        return self.deny(Cause.USER_DENY, message, notify=self.notify)

    def answered(self, untrusted_answer: str) -> Allow | Deny:
        """Return the outcome for the agent's answer, ``deny`` or ``allow:TARGET`` (16.2)."""
        if untrusted_answer == "deny":
            return self.refused()
        word, colon, untrusted_target = untrusted_answer.partition(":")
        if word == "allow" and colon:
            return self.chosen(untrusted_target)
        message = f"invalid answer of the agent: {escape(untrusted_answer)}"
        return self.deny(Cause.BAD_ANSWER, message)
