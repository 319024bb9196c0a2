"""Who can reach what: directly, and through others (the questions behind every policy).

A source *reaches* a service of a domain if some request of it is allowed, or may be chosen in a
question, and ends there: by name, by redirect, as the default, as a disposable, or through a relay,
where the relay is asked for its transport service. Requests are enumerated by ``classes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sluice.policy.classes import CallClass, Region, World
from sluice.policy.evaluation import Policy
from sluice.policy.resolution import Allow, Ask
from sluice.policy.response import Direction, direct
from sluice.policy.rules import Rule, Verb
from sluice.policy.tokens import DISPVM_PREFIX


class Reach(NamedTuple):
    """The ways in which a source reaches a service of a domain by one rule."""

    source: str
    call: CallClass
    asked: tuple[str, ...]
    """The targets that the request may name."""
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


End = tuple[str, str | None, str | None]
"""Target, relay, and what the relay is asked for."""


def reaches(
    world: World,
    policy: Policy,
    *,
    sources: int | None = None,
    calls: list[CallClass] | None = None,
) -> Iterator[Reach]:
    """Yield every way in which sources (bits; None: all) reach anything, by the given calls."""
    for call in world.calls if calls is None else calls:
        # A rule may have several regions: what is asked for is put together.
        found: dict[tuple[int, str, End], Reach] = {}
        for region in world.regions(policy, call):
            rule = region.rule
            if rule is None or rule.action.verb is Verb.DENY:
                continue
            mask = region.sources if sources is None else region.sources & sources
            for source in world.sources_in(mask):
                for end, asked in _ends(world, policy, call, region, rule, source).items():
                    key = (id(rule), source, end)
                    if key in found:
                        asked = (*found[key].asked, *asked)
                    verb, user = rule.action.verb.value, rule.action.user
                    found[key] = Reach(source, call, asked, verb, *end, rule, user)
        yield from found.values()


def _ends(
    world: World, policy: Policy, call: CallClass, region: Region, rule: Rule, source: str
) -> dict[End, tuple[str, ...]]:
    """Return where the requests of a source in a region end, with the targets that lead there."""
    targets = tuple(target.text for target in world.targets_in(region.targets))
    if rule.action.verb is Verb.ASK:
        # What a question offers, and where its answer leads, is the same whatever was asked for,
        # but for what a relay is told.
        resolution = world.resolve(policy, rule, call, source, targets[0])
        if not isinstance(resolution, Ask):
            return {}
        found: dict[End, tuple[str, ...]] = {}
        for candidate in resolution.candidates:
            if candidate == source:
                continue  # a loop
            name = candidate.removeprefix(DISPVM_PREFIX)
            domain = world.info.get(name)
            if domain is not None and domain.klass == "RemoteVM" and name == candidate:
                return _each(world, policy, call, rule, source, targets)
            if domain is not None or candidate == "dom0":
                found[candidate, None, None] = targets
        return found
    return _each(world, policy, call, rule, source, targets)


def _each(
    world: World,
    policy: Policy,
    call: CallClass,
    rule: Rule,
    source: str,
    targets: tuple[str, ...],
) -> dict[End, tuple[str, ...]]:
    found: dict[End, tuple[str, ...]] = {}
    for target in targets:
        resolution = world.resolve(policy, rule, call, source, target)
        outcomes = [resolution]
        if isinstance(resolution, Ask):
            outcomes = [resolution.chosen(candidate) for candidate in resolution.candidates]
        for outcome in outcomes:
            end = _end(world, outcome) if isinstance(outcome, Allow) else None
            if end is not None:
                found[end] = (*found.get(end, ()), target)
    return found


def _end(world: World, allow: Allow) -> End | None:
    directed = direct(allow, world.info)
    if not isinstance(directed, Direction):
        return None
    name = world.info.to_name(allow.target)
    assert name is not None  # direct() denies what does not exist
    return name, directed.target if directed.service is not None else None, directed.service


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
    bases = {world.base_of(source) for source in world.sources}
    everything = {*world.info.domains, *(f"disposable of {base}" for base in bases if base)}
    while frontier and (through or depth == 0) and not everything <= paths.keys():
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
