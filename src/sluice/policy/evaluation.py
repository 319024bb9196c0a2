"""From a request to an answer (sections 10 to 12). Pure: same arguments, same answer, no I/O.

1. The request is normalised (``request``), or refused.
2. The first rule in list order that matches decides (``index``). There is no other precedence.
3. Its action is carried out: deny; allow, which resolves the target; ask, which collects what may
   be chosen.

What an allowed call then needs (loopback, relays, the text of the answer) is in ``response``.
"""

from __future__ import annotations

from collections.abc import Iterable

from sluice.policy.index import NOWHERE, Index, first_of
from sluice.policy.parser import not_collecting
from sluice.policy.request import Call, NotTemplate, normalise, normalise_target, startable_free
from sluice.policy.resolution import Allow, Ask, Cause, Deny, Resolution
from sluice.policy.rules import Request, Rule, Verb
from sluice.policy.system_info import Domain, SystemInfo, is_dom0
from sluice.policy.tokens import ADMINVM, DEFAULT, DISPVM, DISPVM_PREFIX

__all__ = ["Allow", "Ask", "Cause", "Deny", "Policy", "Resolution"]


class Policy:
    """An ordered list of rules, indexed. Immutable."""

    __slots__ = ("index", "rules", "warnings")

    def __init__(self, rules: Iterable[Rule], warnings: Iterable[str] = ()) -> None:
        """Take the rules in their order; ``warnings`` are what loading them had to say."""
        self.rules = tuple(rules)
        self.warnings = tuple(warnings)
        with not_collecting():
            self.index = Index(self.rules)

    def evaluate(self, request: Request, info: SystemInfo) -> Allow | Ask | Deny:
        """Decide a request. Never raises for anything that a request or a registry may hold."""
        call = normalise(request, info)
        if isinstance(call, Deny):
            return call
        return self.answer(call, self.find(call), info)

    def find(self, call: Call) -> Rule | None:
        """Return the first rule that matches a normalised request, or None (section 10)."""
        request = call.request
        position = self.index.first(
            request.service, request.argument, call.source_facets, call.target_facets
        )
        return None if position == NOWHERE else self.rules[position]

    def answer(
        self,
        call: Call,
        rule: Rule | None,
        info: SystemInfo,
        candidates: list[str] | None = None,
    ) -> Allow | Ask | Deny:
        """Carry out the action of the rule that decides ``call``, None for none (section 11).

        ``candidates`` is what ``self.candidates`` gives for the call, where that is known already.
        """
        if rule is None:
            return _deny(call, None, Cause.NO_MATCH, "no matching rule found")
        verb = rule.action.verb
        if verb is Verb.ALLOW:
            return _allow(call, rule, info)
        if verb is Verb.ASK:
            return self._ask(call, rule, info, candidates)
        return _deny(
            call, rule, Cause.POLICY_DENY, f"denied by {rule.place}", notify=rule.action.notify
        )

    def _ask(
        self, call: Call, rule: Rule, info: SystemInfo, candidates: list[str] | None
    ) -> Ask | Deny:
        action = rule.action
        if action.target is not None:
            candidates = _explicit_candidate(action.target, call.base, info)
        elif candidates is None:
            candidates = self.candidates(call, info)
        if not action.autostart:
            candidates = [target for target in candidates if startable_free(target, info)]
        if not candidates:
            message = f"no targets to ask for, asked by {rule.place}"
            return _deny(call, rule, Cause.NO_ASK_TARGETS, message)
        default = _default_target(action.default_target, call.base)
        warnings = call.warnings
        if default is not None and default not in candidates:
            warnings += (
                f"{rule.place}: default target {default} is not among {', '.join(candidates)}",
            )
            default = None
        return Ask(
            call.request,
            call.source,
            call.target,
            rule,
            Cause.RULE,
            action.notify,
            warnings,
            tuple(candidates),
            default,
            action.user,
            action.autostart,
        )

    def candidates(self, call: Call, info: SystemInfo) -> list[str]:
        """Return what an ``ask`` without ``target=`` offers, sorted (section 12).

        Walking all rules from last to first, adding and removing, gives each possible target the
        verb of the *first* rule that covers it; so each is looked up like a call.
        """
        source = info.get(call.source)
        if source is None:
            return []
        request = call.request
        offers = self.index.offers(request.service, request.argument, call.source_facets)

        def offered(facets: tuple[str, ...]) -> bool:
            position = first_of(offers, facets)
            return position != NOWHERE and self.rules[position].action.verb is not Verb.DENY

        chosen = set()
        for domain in info:
            if domain.internal:
                continue
            if domain is not source and offered(offer_facets(domain)):
                chosen.add(domain.name)
            if domain.template_for_dispvms and offered(("*", "@anyvm", *domain.base_facets)):
                chosen.add(DISPVM_PREFIX + domain.name)
        chosen |= {keyword for keyword, facets in _KEYWORDS if offered(facets)}
        return offered_targets(chosen, source, info)


_KEYWORDS = ((DISPVM, ("*", "@anyvm", DISPVM)), (ADMINVM, (ADMINVM,)))


def offered_targets(chosen: set[str], source: Domain, info: SystemInfo) -> list[str]:
    """Replace the keywords among what is offered to ``source``: steps 3, 4 and 6 of section 12."""
    if DISPVM in chosen:
        chosen.discard(DISPVM)
        base = info.get(source.default_dispvm) if source.default_dispvm else None
        if base is not None and not base.internal:
            chosen.add(f"{DISPVM_PREFIX}{source.default_dispvm}")
    if ADMINVM in chosen:
        chosen.discard(ADMINVM)
        dom0 = info.get("dom0")
        if source.name != "dom0" and (dom0 is None or not dom0.internal):
            chosen.add("dom0")
    return sorted(chosen)


def offer_facets(domain: Domain) -> tuple[str, ...]:
    """Return the words that offer a domain by its name (section 12).

    The keyword ``@adminvm`` is an element of its own there: it is turned into dom0 at the end, so a
    rule about ``@adminvm`` neither adds nor removes the dom0 that ``*`` offered.
    """
    if domain.name != "dom0":
        return domain.facets
    return tuple(facet for facet in domain.facets if facet != ADMINVM)


def _deny(
    call: Call, rule: Rule | None, cause: Cause, message: str, *, notify: bool = True
) -> Deny:
    return Deny(call.request, call.source, call.target, rule, cause, notify, call.warnings, message)


def _allow(call: Call, rule: Rule, info: SystemInfo) -> Allow | Deny:
    """Resolve the target of an ``allow`` (section 11.2)."""
    action = rule.action
    target = call.target
    if action.target is not None:
        try:
            target = normalise_target(action.target, info)
        except NotTemplate as error:
            return _deny(call, rule, Cause.NOT_TEMPLATE, f"{rule.place}: {error}")
    if target == DEFAULT:
        message = f"no target: {rule.place} allows, but neither it nor the caller names one"
        return _deny(call, rule, Cause.NO_TARGET, message)
    if target == DISPVM:
        if call.base is None:
            message = f"{rule.place}: the caller has no default disposable base"
            return _deny(call, rule, Cause.NO_DVM, message)
        target = DISPVM_PREFIX + call.base
    elif target == ADMINVM:
        target = "dom0"
    if not action.autostart and not startable_free(target, info):
        message = f"{target} is not running and {rule.place} says not to start it"
        return _deny(call, rule, Cause.AUTOSTART, message, notify=action.notify)
    return Allow(
        call.request,
        call.source,
        call.target,
        rule,
        Cause.RULE,
        action.notify,
        call.warnings,
        target,
        action.user,
        action.autostart,
    )


def _explicit_candidate(redirect: str, base: str | None, info: SystemInfo) -> list[str]:
    """Return what ``ask target=`` offers: one target, or none if there is no such (Q-7)."""
    if is_dom0(redirect):
        return ["dom0"]
    if redirect == DISPVM:
        known = base is not None and base in info
        return [f"{DISPVM_PREFIX}{base}"] if known else []
    name = info.to_name(redirect)
    if name is None or name.removeprefix(DISPVM_PREFIX) not in info:
        return []
    return [name]


def _default_target(default: str | None, base: str | None) -> str | None:
    if default is None or not (default == DISPVM or is_dom0(default)):
        return default
    if default != DISPVM:
        return "dom0"
    return None if base is None else DISPVM_PREFIX + base
