"""Whole answers against a plain reading of docs/spec/policy.md sections 9, 11, 13 and 14.

Where ``test_policy_properties`` takes the engine's normalised request, nothing of the engine but
its rules is used here: what comes out is the text of the answer, or the label of section 17.1.
"""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st
from tests.policy.test_policy_properties import (
    ADMIN,
    FAST,
    NAMES,
    REQUESTS,
    plain_candidates,
    plain_find,
    policies,
    registries,
)

from sluice.policy.evaluation import Allow, Ask, Deny, Policy
from sluice.policy.request import Call
from sluice.policy.response import direct
from sluice.policy.rules import Request, Rule
from sluice.policy.system_info import SystemInfo


class Refused(Exception):
    """A denial; the text is its label."""


def normalised(target: str, info: SystemInfo) -> str:
    """Section 9 step 3."""
    if target in ("@adminvm", "@default", "@dispvm"):
        return target
    if target.startswith("@dispvm:"):
        base = info.get(target[8:])
        if base is None or not base.template_for_dispvms:
            raise Refused("NOT-TEMPLATE")
        return target
    return target if target in info else "@default"


def plain_call(request: Request, info: SystemInfo) -> Call:
    """Sections 9 and 13.2."""
    target = request.target or "@default"
    keyword = target[0] == "@" and target not in ("@adminvm", "@default", "@dispvm")
    if target == "*" or (keyword and not target.startswith("@dispvm:")):
        raise Refused("BAD-TARGET")
    target = normalised(target, info)
    source = request.source
    if request.requested_source:
        source = request.requested_source
        remote = info.get(source)
        if remote is None:
            raise Refused("RS-UNKNOWN")
        if remote.klass != "RemoteVM":
            raise Refused("RS-NOT-REMOTE")
        if remote.relayvm != request.source:
            raise Refused("RS-WRONG-RELAY")
    caller = info.get(source)
    return Call(request, source, target, caller and caller.default_dispvm, (), (), ())


def free(target: str, info: SystemInfo) -> bool:
    """Section 11.2 step 6: whether nothing has to be started."""
    domain = info.get(target)
    running = domain is not None and domain.power_state == "Running"
    return target in ADMIN or (not target.startswith("@dispvm") and running)


def allowed(rule: Rule, call: Call, info: SystemInfo) -> str:
    """Section 11.2: the target that is called."""
    target = normalised(rule.action.target or call.target, info)
    if target == "@default":
        raise Refused("NO-TARGET")
    if target == "@dispvm":
        if call.base is None:
            raise Refused("NO-DVM")
        target = "@dispvm:" + call.base
    if target == "@adminvm":
        target = "dom0"
    if not rule.action.autostart and not free(target, info):
        raise Refused("AUTOSTART")
    return target


def asked(policy: Policy, rule: Rule, call: Call, info: SystemInfo) -> tuple[set[str], str | None]:
    """Section 11.3, with Q-7: what is offered, and what of it is preselected."""
    redirect, default = rule.action.target, rule.action.default_target
    own = None if call.base is None else "@dispvm:" + call.base
    if redirect is None:
        offered = plain_candidates(policy, call, info) if call.source in info else set()
    elif redirect in ADMIN:
        offered = {"dom0"}
    elif redirect == "@dispvm":
        offered = {own} if own and call.base in info else set()
    else:
        prefix = "@dispvm:" if redirect.startswith("@dispvm:") else ""
        domain = info.get(redirect.removeprefix(prefix))
        offered = {prefix + domain.name} if domain else set()
    if not rule.action.autostart:
        offered = {target for target in offered if free(target, info)}
    if not offered:
        raise Refused("NO-ASK-TARGETS")
    if default in ADMIN:
        default = "dom0"
    elif default == "@dispvm":
        default = own
    return offered, default if default in offered else None


def response(rule: Rule, target: str, call: Call, info: SystemInfo) -> str:
    """Sections 13.1 and 14."""
    if target == call.source:
        raise Refused("LOOPBACK")
    user, service, end = rule.action.user or "DEFAULT", [], target
    domain = info.get(target.removeprefix("@dispvm:"))
    if domain is not None and domain.klass == "RemoteVM" and target[0] != "@":
        relay = info.get(domain.relayvm or "")
        if relay is None:
            raise Refused("NO-RELAY")
        if not domain.transport_rpc:
            raise Refused("NO-TRANSPORT")
        text = f"{domain.transport_rpc}+{call.target}+{call.request.service}{call.request.argument}"
        user, service, end, domain = "DEFAULT", [f"service={text}"], relay.name, relay
    lines = [f"user={user}", "result=allow"]
    tail = [f"autostart={rule.action.autostart}", f"requested_target={call.target}", *service]
    if target in ADMIN:
        return "\n".join([*lines, "target=dom0", *tail])
    if domain is None:
        raise Refused("NOT-TEMPLATE")
    uuid = ("@dispvm:" if end[0] == "@" else "") + f"uuid:{domain.uuid}"
    if call.request.requested_source:
        tail.append(f"policy_source={call.source}")
    return "\n".join([*lines, f"target={end}", f"target_uuid={uuid}", *tail])


def plainly(policy: Policy, request: Request, info: SystemInfo) -> object:
    """Return the answer by the specification: text, offer or label."""
    try:
        call = plain_call(request, info)
        rule = plain_find(policy, call, info)
        if rule is None:
            return "NO-MATCH"
        if rule.action.verb.value == "deny":
            return "POLICY-DENY"
        if rule.action.verb.value == "ask":
            return asked(policy, rule, call, info)
        return response(rule, allowed(rule, call, info), call, info)
    except Refused as refused:
        return str(refused)


def pointed(policy: Policy, info: SystemInfo) -> Iterator[Request]:
    """Yield requests that the rules speak of: random ones hardly ever get beyond NO-MATCH."""
    calls = {
        (rule.service.replace("*", "s.S"), rule.argument.replace("*", "+")) for rule in policy.rules
    }
    targets = [*info.domains, "", "@adminvm", "@dispvm", *(f"@dispvm:{name}" for name in NAMES)]
    remotes = [(d.relayvm, d.name) for d in info if d.klass == "RemoteVM" and d.relayvm]
    for service, argument in calls:
        for source, remote in [*((name, None) for name in info.domains), *remotes]:
            for target in targets:
                yield Request(service, argument, source, target, remote)


@FAST
@given(policies(), registries(), st.lists(REQUESTS, max_size=10))
def test_answers_are_those_of_the_specification(
    policy: Policy, info: SystemInfo, requests: list[Request]
) -> None:
    """Text of what is allowed, offer and default of what is asked, label of what is denied."""
    for request in (*requests, *pointed(policy, info)):
        found: object = policy.evaluate(request, info)
        if isinstance(found, Allow):
            found = direct(found, info)
        if isinstance(found, Ask):
            found = (set(found.candidates), found.default_target)
        else:
            found = str(found.cause) if isinstance(found, Deny) else str(found)
        assert found == plainly(policy, request, info)
