"""One request from beginning to end (section 17): decide, ask, check, notify, answer.

The order of the checks is that of section 17.1. Who talks to people is given (``Agent``), so this
module does no I/O of its own and the daemon, the one-shot evaluator and the AdminVM share it.
Nothing that goes wrong here lets a call through: whatever is raised, the answer is a denial.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from sluice.errors import PolicyError
from sluice.policy.confirmation import guivm_for, notice, question
from sluice.policy.evaluation import Policy
from sluice.policy.problems import PolicySyntaxError
from sluice.policy.resolution import Allow, Ask, Cause, Deny
from sluice.policy.response import ALLOWED, DENIED, Direction, assume_yes, direct
from sluice.policy.rules import Request
from sluice.policy.system_info import SystemInfo
from sluice.wire.names import escape

log = logging.getLogger("policy")


class Agent(Protocol):
    """Who reaches the policy agent of a GuiVM (section 16.1)."""

    async def ask(self, guivm: str, question: Mapping[str, Any]) -> str:
        """Put the question and return the answer's text. Raises whatever it likes if it cannot."""

    async def notify(self, guivm: str, notice: Mapping[str, Any]) -> None:
        """Show the notice. What it raises is logged and changes nothing."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended: ``text`` is the response, ``resolution`` what decided it."""

    resolution: Allow | Deny
    direction: Direction | None
    text: str

    @property
    def allowed(self) -> bool:
        """Whether the call may be made."""
        return isinstance(self.resolution, Allow)


def prefix(request: Request, *, source: str | None = None, target: str | None = None) -> str:
    """Return how a log line about a request begins (section 17)."""
    shown = [escape(text) for text in (request.call, source or request.source)]
    asked = escape(request.target if target is None else target)
    return f"qrexec: {shown[0]}: {shown[1]} -> {asked}:"


def load_failure(request: Request, error: PolicyError) -> Deny:
    """Return the denial of a request whose policy cannot be loaded (steps 4 and 5)."""
    syntax = isinstance(error, PolicySyntaxError)
    cause = Cause.POLICY_SYNTAX if syntax else Cause.POLICY_LOAD
    return Deny(
        request,
        request.source,
        request.target,
        None,
        cause,
        not syntax,
        (),
        escape(str(error), 500),
    )


class Pipeline:
    """Settles requests. ``agent`` asks and notifies."""

    def __init__(self, agent: Agent) -> None:
        """Take who talks to people."""
        self._agent = agent

    async def settle(
        self,
        request: Request,
        policy: Policy | PolicyError,
        info: SystemInfo,
        *,
        just_evaluate: bool = False,
        assume_yes_for_ask: bool = False,
    ) -> Outcome:
        """Decide a request and return its outcome; never raises but when cancelled.

        ``policy`` is the error where the policy could not be loaded.
        """
        if isinstance(policy, PolicyError):
            resolution: Allow | Ask | Deny = load_failure(request, policy)
        else:
            resolution = policy.evaluate(request, info)
        for warning in resolution.warnings:
            log.warning("%s %s", prefix(request), warning)
        if isinstance(resolution, Ask):
            if assume_yes_for_ask:
                resolution = assume_yes(resolution)
            elif just_evaluate:
                return Outcome(resolution.refused(), None, DENIED)
            else:
                resolution = await self._ask(resolution, info)
        if isinstance(resolution, Deny):
            return await self._denied(resolution, info, silent=just_evaluate)
        if just_evaluate:
            return Outcome(resolution, None, ALLOWED)
        return await self._allowed(resolution, info)

    async def _ask(self, ask: Ask, info: SystemInfo) -> Allow | Deny:
        guivm = guivm_for(ask, info)
        if guivm is None:
            log.error("%s nobody to ask: the source has no GuiVM", prefix(ask.request))
            return ask.refused()
        try:
            untrusted_answer = await self._agent.ask(guivm, question(ask, info))
        except Exception as error:  # the agent is a program of another domain: anything can happen
            log.error("%s asking failed: %s", prefix(ask.request), escape(str(error)))
            message = "the question could not be put"
            return ask.deny(Cause.BAD_ANSWER, message)
        settled = ask.answered(untrusted_answer)
        if isinstance(settled, Deny) and settled.cause is Cause.BAD_ANSWER:
            log.error("%s %s", prefix(ask.request), settled.message)
        return settled

    async def _allowed(self, allow: Allow, info: SystemInfo) -> Outcome:
        request, rule = allow.request, allow.rule
        why = f" ({escape(rule.action.reason)})" if rule and rule.action.reason else ""
        asked = prefix(request, source=allow.source, target=allow.requested_target)
        log.info("%s allowed to %s%s", asked, allow.target, why)
        if allow.notify:
            await self._notify(allow, info)
        direction = direct(allow, info)
        if isinstance(direction, Deny):
            return await self._denied(direction, info, silent=False)
        for warning in direction.warnings:
            log.warning("%s %s", prefix(request), warning)
        return Outcome(allow, direction, str(direction))

    async def _denied(self, deny: Deny, info: SystemInfo, *, silent: bool) -> Outcome:
        if deny.cause in (Cause.POLICY_SYNTAX, Cause.BAD_TARGET):
            log.error("%s error loading policy: %s", prefix(deny.request), deny.message)
        else:
            why = f" ({escape(deny.reason)})" if deny.reason else ""
            log.info("%s denied: %s%s", prefix(deny.request), deny.message, why)
        if deny.notify and not silent:
            await self._notify(deny, info)
        return Outcome(deny, None, DENIED)

    async def _notify(self, resolution: Allow | Deny, info: SystemInfo) -> None:
        guivm = guivm_for(resolution, info)
        if guivm is None:
            return
        try:
            await self._agent.notify(guivm, notice(resolution))
        except Exception as error:  # a notice must never change the outcome
            log.error("%s notifying failed: %s", prefix(resolution.request), escape(str(error)))
