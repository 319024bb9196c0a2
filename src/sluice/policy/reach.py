"""Who can reach what: directly, and through others (the questions behind every policy).

A source *reaches* a service of a domain if some request of it is allowed, or may be chosen in a
question, and ends there: by name, by redirect, as the default, as a disposable, or through a relay,
where the relay is asked for its transport service. Requests are enumerated by ``classes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sluice.policy.classes import CallClass, World
from sluice.policy.evaluation import Policy
from sluice.policy.resolution import Allow, Ask, Deny
from sluice.policy.response import Direction, direct
from sluice.policy.rules import Rule, Verb
from sluice.policy.tokens import DISPVM_PREFIX


class Reach(NamedTuple):
    """One way in which a source reaches a service of a domain."""

    source: str
    call: CallClass
    asked: str
    """The target that the request names."""
    verb: str
    """``allow`` or ``ask``."""
    target: str
    """What is called: a name, ``dom0``, or ``@dispvm:NAME``."""
    relay: str | None
    """The domain that carries the call to a RemoteVM, if it is one."""
    service: str | None
    """What the relay is asked for."""
    rule: Rule
    user: str | None


def reaches(
    world: World,
    policy: Policy,
    *,
    sources: int | None = None,
    calls: list[CallClass] | None = None,
) -> Iterator[Reach]:
    """Yield every way in which sources (bits; None: all) reach anything, by the given calls."""
    for call in world.calls if calls is None else calls:
        for region in world.regions(policy, call):
            if region.rule is None or region.rule.action.verb is Verb.DENY:
                continue
            mask = region.sources if sources is None else region.sources & sources
            for source in world.sources_in(mask):
                for target in world.targets_in(region.targets):
                    yield from _ways(world, policy, region.rule, call, source, target.text)


def _ways(
    world: World, policy: Policy, rule: Rule, call: CallClass, source: str, target: str
) -> Iterator[Reach]:
    info = world.info
    resolution = world.resolve(policy, rule, call, source, target)
    if isinstance(resolution, Deny):
        return
    outcomes: list[Allow | Deny]
    if isinstance(resolution, Ask):
        outcomes = [resolution.chosen(candidate) for candidate in resolution.candidates]
    else:
        outcomes = [resolution]
    verb = rule.action.verb.value
    for outcome in outcomes:
        assert isinstance(outcome, Allow)  # a candidate is always among the candidates
        directed = direct(outcome, info)
        if not isinstance(directed, Direction):
            continue
        name = info.to_name(outcome.target)
        assert name is not None
        relay = directed.target if directed.service is not None else None
        reached = (name if name not in _DOM0 else "dom0", relay, directed.service)
        yield Reach(source, call, target, verb, *reached, rule, outcome.user)


_DOM0 = ("@adminvm",)


def calls_of(world: World, service: str, argument: str | None) -> list[CallClass]:
    """Return the classes of calls that a service, or a service and argument, falls into."""
    same = [call for call in world.calls if call.service == service]
    if not same:
        return [call for call in world.calls if call.service is None]
    if argument is None:
        return same
    exact = [call for call in same if call.argument == argument]
    return exact or [call for call in same if call.argument is None]


def who_can(
    world: World, policy: Policy, service: str, argument: str | None, domain: str
) -> list[Reach]:
    """Return every way in which anybody reaches ``service`` of ``domain``.

    ``domain`` is a name, ``uuid:...`` or ``@dispvm:NAME``. Without an argument, whatever the
    argument. A relay is reached, for its transport service, by calls of its RemoteVMs.
    """
    name = world.info.to_name(domain) or domain
    found = [
        way
        for way in reaches(world, policy, calls=calls_of(world, service, argument))
        if way.target == name
    ]
    remotes = {
        remote.name
        for remote in world.info
        if remote.klass == "RemoteVM" and remote.relayvm == name and remote.transport_rpc == service
    }
    if remotes:
        found += [
            way
            for way in reaches(world, policy)
            if way.relay == name and way.target in remotes and _carries(way, service, argument)
        ]
    return found


def _carries(way: Reach, service: str, argument: str | None) -> bool:
    return argument is None or way.service == service + argument


class Step(NamedTuple):
    """A domain that a source reaches, and the shortest way there."""

    domain: str
    depth: int
    """1 for what is reached directly."""
    path: tuple[Reach, ...]
    ways: tuple[Reach, ...]
    """Every way from the domain before it on the path."""


def what_can(
    world: World, policy: Policy, source: str, *, through: bool = True, ask: bool = True
) -> list[Step]:
    """Return everything that ``source`` reaches, directly first, then through what it reached.

    "Through" supposes that a domain that is reached does whatever its caller wants: the worst case,
    which is what one asks this question for. A disposable that is reached calls as one.
    """
    start = source if source in world.sources else world.info.to_name(source) or source
    paths: dict[str, tuple[Reach, ...]] = {start: ()}
    steps: list[Step] = []
    frontier = [start]
    depth = 0
    while frontier and (through or depth == 0):
        depth += 1
        reached: list[str] = []
        for name in frontier:
            for domain, ways in _direct_ways(world, policy, name, ask).items():
                node = node_of(domain)
                if node in paths:
                    continue
                paths[node] = (*paths[name], ways[0])
                steps.append(Step(domain, depth, paths[node], tuple(ways)))
                reached.append(node)
        frontier = reached
    return steps


def _direct_ways(world: World, policy: Policy, source: str, ask: bool) -> dict[str, list[Reach]]:
    found: dict[str, list[Reach]] = {}
    if source not in world.sources:
        return found
    mask = 1 << world.sources.index(source)
    for way in reaches(world, policy, sources=mask):
        if way.verb == "ask" and not ask:
            continue
        found.setdefault(way.target, []).append(way)
        if way.relay is not None:
            found.setdefault(way.relay, []).append(way)
    return found


def node_of(target: str) -> str:
    """Return the source that a reached target is afterwards: a disposable calls as one."""
    base = target.removeprefix(DISPVM_PREFIX)
    return target if base == target else f"disposable of {base}"
