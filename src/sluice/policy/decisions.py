"""Decisions as they can be compared and printed: what a call is given, not why."""

from __future__ import annotations

from typing import NamedTuple

from sluice.policy.resolution import Allow, Ask, Deny
from sluice.policy.response import Direction, direct
from sluice.policy.rules import Rule
from sluice.policy.system_info import SystemInfo, is_dom0
from sluice.policy.tokens import DEFAULT, DISPVM, DISPVM_PREFIX


class Decision(NamedTuple):
    """What a request is given. Two that are equal cannot be told apart by anybody but the log."""

    verb: str
    """``allow``, ``ask`` or ``deny``."""
    notify: bool
    target: str | None = None
    """What is called, as resolved."""
    delivered: tuple[str, str | None] | None = None
    """Where the call really goes and the service that it is there, if that is another one."""
    candidates: tuple[str, ...] = ()
    default_target: str | None = None
    user: str | None = None
    autostart: bool = True
    via: str = ""
    limit: str = ""

    def options(self) -> list[str]:
        """Return what differs from the ordinary, as words."""
        words = []
        if self.default_target:
            words.append(f"default={self.default_target}")
        if self.user:
            words.append(f"user={self.user}")
        if self.verb != "deny" and self.notify:
            words.append("notify=yes")
        if self.verb == "deny" and not self.notify:
            words.append("notify=no")
        if not self.autostart:
            words.append("autostart=no")
        words += [word for word in (self.via, self.limit) if word]
        return words

    def brief(self, requested: str) -> str:
        """Return it in a few words; a target that is simply the requested one is left out."""
        words = [self.verb]
        if self.target is not None and not same_target(self.target, requested):
            words.append(f"target={self.target}")
        return " ".join(words + self.options())

    def __str__(self) -> str:
        """Return it in full."""
        words = [self.verb]
        if self.target is not None:
            words.append(f"target={self.target}")
        if self.verb == "ask":
            words.append("{" + ", ".join(self.candidates) + "}")
        return " ".join(words + self.options())


def same_target(target: str, requested: str) -> bool:
    """Tell whether a resolved target is what the request named, no redirect in between."""
    if target == requested or (is_dom0(target) and is_dom0(requested)):
        return True
    return requested == DISPVM and target.startswith(DISPVM_PREFIX) and requested != DEFAULT


def settle(resolution: Allow | Ask | Deny, info: SystemInfo) -> tuple[Decision, Direction | None]:
    """Return the decision of a resolution, and where an allowed call goes."""
    rule = resolution.rule
    if isinstance(resolution, Allow):
        directed = direct(resolution, info)
        if isinstance(directed, Deny):
            return Decision("deny", directed.notify), None
        return _allowed(resolution, directed, rule), directed
    if isinstance(resolution, Deny):
        return Decision("deny", resolution.notify), None
    via, limit = _extensions(rule)
    return Decision(
        "ask",
        resolution.notify,
        candidates=resolution.candidates,
        default_target=resolution.default_target,
        user=resolution.user,
        autostart=resolution.autostart,
        via=via,
        limit=limit,
    ), None


def _allowed(allow: Allow, directed: Direction, rule: Rule | None) -> Decision:
    via, limit = _extensions(rule)
    elsewhere = directed.service is not None
    return Decision(
        "allow",
        allow.notify,
        target=allow.target,
        delivered=(directed.target, directed.service) if elsewhere else None,
        user=None if directed.user == "DEFAULT" else directed.user,
        autostart=allow.autostart,
        via=via,
        limit=limit,
    )


def _extensions(rule: Rule | None) -> tuple[str, str]:
    if rule is None:
        return "", ""
    action = rule.action
    via = "via=" + ",".join(map(str, action.via)) if action.via else ""
    return via, f"limit={action.limit}" if action.limit else ""
