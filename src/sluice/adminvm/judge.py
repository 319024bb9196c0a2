"""Who decides on calls: the policy store and a snapshot of the registry, joined in one place.

Everything that goes wrong here refuses the call (policy.md 17): an error in a rule file with its
file and line, a policy that does not come to rest, a registry that cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sluice.adminvm.decision import Decision
from sluice.domains.registry import Registry
from sluice.errors import LocatedError, SluiceError
from sluice.policy.evaluation import Policy
from sluice.policy.files import PolicyStore
from sluice.policy.limits import CallLimits
from sluice.policy.resolution import Allow, Ask, Deny, Resolution
from sluice.policy.response import direct
from sluice.policy.rules import Request
from sluice.policy.system_info import SystemInfo
from sluice.wire.names import Trigger

_DENIED = Decision(False)


@dataclass(frozen=True, slots=True)
class Ruling:
    """A decision, the rule that made it (``FILE:LINE``) and, for a refusal, its cause.

    ``reason`` is what the rule says of itself, raw, for the operator's log alone (policy.md 31).
    """

    decision: Decision
    rule: str | None = None
    cause: str = ""
    reason: str | None = None


class Judge(Protocol):
    """Decides on a valid request; what it raises refuses the call."""

    async def decide(self, source: str, trigger: Trigger, running: frozenset[str]) -> Ruling:
        """Decide on ``trigger`` of the domain ``source``, with these domains running."""


class PolicyJudge:
    """Decides by the policy files and the registry."""

    def __init__(
        self, store: PolicyStore, registry: Registry, log: Callable[[str], None] | None = None
    ) -> None:
        """Ask ``store`` for the rules in force at each call, and ``registry`` for the domains."""
        self._store = store
        self._registry = registry
        self._log = log or (lambda text: None)
        self._limits = CallLimits()
        self._loaded: Policy | None = None
        self._snapshot: tuple[frozenset[str], SystemInfo] | None = None

    def registry_changed(self) -> None:
        """Forget the snapshot: a domain, property, feature or tag is another now."""
        self._snapshot = None

    def _info(self, running: frozenset[str]) -> SystemInfo:
        if self._snapshot is None or self._snapshot[0] != running:
            self._snapshot = (running, self._registry.system_info(running))
        return self._snapshot[1]

    async def trouble(self) -> str:
        """Return what is wrong with the policy, with its place; empty where it can be used."""
        try:
            await self._store.current_async()
        except SluiceError as error:
            return str(error)
        return ""

    async def decide(self, source: str, trigger: Trigger, running: frozenset[str]) -> Ruling:
        """Decide by the first matching rule; deny where none matches or anything fails."""
        try:
            policy = await self._store.current_async()
            if policy is not self._loaded:
                self._loaded = policy
                for warning in policy.warnings:  # once a load (policy.md 7)
                    self._log(warning)
            info = self._info(running)
            request = Request.of(trigger.service, source, trigger.target, trigger.source or None)
            return self._rule(policy.evaluate(request, info), info)
        except SluiceError as error:
            return Ruling(_DENIED, _place(error), str(error))

    def _rule(self, resolution: Resolution, info: SystemInfo) -> Ruling:
        rule = None if resolution.rule is None else resolution.rule.place
        reason = resolution.reason
        for warning in resolution.warnings:
            self._log(warning)
        if isinstance(resolution, Ask):
            return Ruling(_DENIED, rule, "ask: there is nobody to ask", reason)
        if isinstance(resolution, Allow):
            if resolution.via:
                return Ruling(_DENIED, rule, "via: proxied calls are not served here", reason)
            direction = direct(resolution, info)
            if not isinstance(direction, Deny):
                counted, _ = self._limits.apply(resolution)
                if isinstance(counted, Deny):
                    return Ruling(_DENIED, rule, f"{counted.cause}: {counted.message}", reason)
                decision = Decision(
                    True,
                    user=direction.user,
                    target=direction.target,
                    target_uuid=direction.target_uuid,
                    requested_target=direction.requested_target,
                    autostart=direction.autostart,
                    service=direction.service,
                    policy_source=direction.policy_source,
                )
                return Ruling(decision, rule, reason=reason)
            resolution = direction
        assert isinstance(resolution, Deny)
        return Ruling(_DENIED, rule, f"{resolution.cause}: {resolution.message}", reason)


def _place(error: SluiceError) -> str | None:
    """Return where in a file an error is, if it is in one."""
    if not isinstance(error, LocatedError) or error.file is None:
        return None
    return error.file if error.line is None else f"{error.file}:{error.line}"
