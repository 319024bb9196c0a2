"""Why a call is decided as it is: the deciding rule, and why those that came near did not decide.

A rule *comes near* if only one of its columns stands in the way. The reasons are computed from the
same facets that the engine matches with, so they cannot tell another story than it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sluice.policy.confirmation import guivm_for
from sluice.policy.evaluation import Policy
from sluice.policy.hints import did_you_mean
from sluice.policy.request import Call, normalise
from sluice.policy.resolution import Allow, Ask, Cause, Deny
from sluice.policy.response import Direction, direct
from sluice.policy.rules import Request, Rule
from sluice.policy.system_info import Domain, SystemInfo, is_dom0
from sluice.policy.tokens import (
    ADMINVM,
    ANYVM,
    DEFAULT,
    DISPVM,
    DISPVM_PREFIX,
    DISPVM_TAG_PREFIX,
    TAG_PREFIX,
    TYPE_PREFIX,
    WILDCARD,
)
from sluice.wire.names import escape


class Near(NamedTuple):
    """A rule that did not decide, and what stood in the way."""

    rule: Rule
    reasons: tuple[str, ...]


class Explanation(NamedTuple):
    """Everything there is to say about the decision of one request."""

    request: Request
    resolution: Allow | Ask | Deny
    direction: Direction | None
    """Where an allowed call goes."""
    near: tuple[Near, ...]
    """Rules with this service that one column kept from matching, in order."""
    overruled: tuple[Rule, ...]
    """Rules that match as well, but come after the one that decides."""
    notes: tuple[str, ...]


def explain(policy: Policy, request: Request, info: SystemInfo) -> Explanation:
    """Decide a request and say why."""
    resolution = policy.evaluate(request, info)
    direction: Direction | None = None
    if isinstance(resolution, Allow):
        directed = direct(resolution, info)
        if isinstance(directed, Deny):
            resolution = directed
        else:
            direction = directed
    call = normalise(request, info)
    if isinstance(call, Deny):
        return Explanation(request, resolution, None, (), (), tuple(_notes(resolution, info)))
    near, overruled = _neighbours(policy, call, resolution.rule, info)
    notes = [*_notes(resolution, info), *(direction.warnings if direction else ())]
    if not any(rule.service in (WILDCARD, request.service) for rule in policy.rules):
        notes.append(f"no rule speaks of the service {escape(request.service)}")
        notes += [
            f"{rule.place} speaks of {rule.service}, which differs in case only"
            for rule in policy.rules
            if rule.service.lower() == request.service.lower()
        ][:3]
    return Explanation(request, resolution, direction, near, overruled, tuple(notes))


def _notes(resolution: Allow | Ask | Deny, info: SystemInfo) -> Iterator[str]:
    """Yield what one should know of the source, the target and the answer."""
    request, source = resolution.request, resolution.source
    yield from resolution.warnings
    if resolution.warnings and resolution.requested_target == DEFAULT:
        alike = did_you_mean(request.target, info)
        if alike:
            yield f"the target {escape(request.target)} may be misspelt{alike}"
    if resolution.cause is Cause.BAD_TARGET:
        yield "a call names NAME, uuid:UUID, @adminvm, @dispvm, @dispvm:NAME, @default or nothing"
    for name in dict.fromkeys((request.source, source)):
        if is_dom0(name):
            yield "calls made by dom0 itself are not subject to policy"
        elif name not in info:
            yield f"the source {escape(name)} is not in the registry{did_you_mean(name, info)}"
    if source != request.source:
        yield f"decided as a call of {escape(source)}, for which {escape(request.source)} calls"
    if isinstance(resolution, Ask) and guivm_for(resolution, info) is None:
        yield f"{escape(source)} has no GuiVM: there is nobody to ask, so the call is refused"


def _neighbours(
    policy: Policy, call: Call, decider: Rule | None, info: SystemInfo
) -> tuple[tuple[Near, ...], tuple[Rule, ...]]:
    request = call.request
    sources, targets = frozenset(call.source_facets), frozenset(call.target_facets)
    near = []
    overruled = []
    for rule in policy.rules:
        if rule.service != request.service and rule.service != WILDCARD:
            continue
        fits_argument = rule.argument in (WILDCARD, request.argument)
        fits_source = sources.issuperset(rule.source.parts)
        fits_target = targets.issuperset(rule.target.parts)
        if fits_argument + fits_source + fits_target == 3:
            if rule is not decider:
                overruled.append(rule)
        elif fits_argument + fits_source + fits_target == 2:
            reasons = []
            if not fits_argument:
                reasons.append(f"argument is {escape(request.argument)}, not {rule.argument}")
            if not fits_source:
                reasons += _missing(rule.source.parts, sources, call.source, "source", call, info)
            if not fits_target:
                reasons += _missing(rule.target.parts, targets, call.target, "target", call, info)
            near.append(Near(rule, tuple(reasons)))
    return tuple(near), tuple(overruled)


def _missing(
    parts: tuple[str, ...],
    facets: frozenset[str],
    name: str,
    column: str,
    call: Call,
    info: SystemInfo,
) -> list[str]:
    return [
        f"{column} {_why(part, name, column, call, info)}" for part in parts if part not in facets
    ]


def _why(part: str, name: str, column: str, call: Call, info: SystemInfo) -> str:
    """Say why ``part`` is not a facet of ``name``."""
    domain = info.get(name)
    shown = escape(name)
    if column == "source" and part.startswith(DISPVM_PREFIX):
        return f"{part} never matches: a running disposable has a name and tags of its own"
    if part == ANYVM:
        return f"is {shown}, and {ANYVM} is everything but dom0"
    if part.startswith(TAG_PREFIX):
        return f"{shown} {_tags(domain, part[len(TAG_PREFIX) :])}"
    if part.startswith(TYPE_PREFIX):
        wanted = part[len(TYPE_PREFIX) :]
        have = f"has class {domain.klass}" if domain else "is not a domain of the registry"
        return f"{shown} {have}, not {wanted}"
    if part == DEFAULT:
        return f"is {shown}: {DEFAULT} matches only calls that name no existing target"
    if part.startswith(DISPVM):
        return _why_disposable(part, name, call, info)
    if part == ADMINVM or is_dom0(part):
        return f"is {shown}, not dom0"
    if part not in info:
        return f"is {shown}, not {part}, which does not exist"
    return f"is {shown}, not {part}"


def _why_disposable(part: str, name: str, call: Call, info: SystemInfo) -> str:
    shown = escape(name)
    if not name.startswith(DISPVM):
        return f"is {shown}, not a new disposable"
    if part == DISPVM:
        return f"is {shown}: {DISPVM} matches only the plain keyword"
    base = call.base if name == DISPVM else name[len(DISPVM_PREFIX) :]
    if base is None:
        return f"is {DISPVM} and {escape(call.source)} has no default disposable base"
    whose = f"the base of {shown} is {escape(base)}" if name == DISPVM else f"is {shown}"
    if part.startswith(DISPVM_TAG_PREFIX):
        domain = info.get(base)
        if domain is None or not domain.template_for_dispvms:
            return f"{whose}, which is no disposable base"
        return f"{whose}, which {_tags(domain, part[len(DISPVM_TAG_PREFIX) :])}"
    if name == DISPVM and part.startswith(DISPVM_PREFIX + "uuid:"):
        return f"is {DISPVM}: a base named by UUID matches only when it is named"
    return f"{whose}, not {part[len(DISPVM_PREFIX) :]}"


def _tags(domain: Domain | None, wanted: str) -> str:
    if domain is None:
        return f"is a keyword or unknown, and has no tag {wanted}"
    have = ", ".join(sorted(domain.tags)) or "no tag at all"
    return f"lacks the tag {wanted} (it has {have})"
