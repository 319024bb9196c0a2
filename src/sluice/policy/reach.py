"""Who can reach what: directly, and through others (the questions behind every policy).

A source *reaches* a service of a domain if some request of it is allowed, or may be chosen in a
question, and ends there: by name, by redirect, as the default, as a disposable, or through a relay,
where the relay is asked for its transport service. Requests are enumerated by ``classes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from sluice.policy.classes import UNKNOWN, CallClass, World
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

Ends = dict[End, tuple[str, ...]]
"""Where requests end, with the targets that lead there."""


def endings(
    world: World,
    policy: Policy,
    *,
    sources: int | None = None,
    calls: list[CallClass] | None = None,
) -> Iterator[tuple[CallClass, Rule, str, Ends]]:
    """Yield where requests of sources (bits; None: all) end, one of the calls after the other.

    A rule may come several times with a source and a call: once for each of its regions.
    """
    finder = _Finder(world, policy)
    for call in world.calls if calls is None else calls:
        for region in world.regions(policy, call):
            rule = region.rule
            if rule is None or rule.action.verb is Verb.DENY:
                continue
            mask = region.sources if sources is None else region.sources & sources
            for source, ends in finder.ends(call, rule, world.sources_in(mask), region.targets):
                yield call, rule, source, ends


def reaches(
    world: World,
    policy: Policy,
    *,
    sources: int | None = None,
    calls: list[CallClass] | None = None,
) -> Iterator[Reach]:
    """Yield every way in which sources (bits; None: all) reach anything, by the given calls."""
    found: dict[tuple[int, str, End], Reach] = {}
    last: CallClass | None = None
    for call, rule, source, ends in endings(world, policy, sources=sources, calls=calls):
        if call is not last:
            yield from found.values()
            found, last = {}, call
        verb, user = rule.action.verb.value, rule.action.user
        for end, asked in ends.items():
            key = (id(rule), source, end)
            if key in found:  # by another region: what is asked for is put together
                asked = (*found[key].asked, *asked)
            found[key] = Reach(source, call, asked, verb, *end, rule, user)
    yield from found.values()


class _Finder:
    """Finds where requests end. This is the inner loop of most tools: what does not depend on the
    source is found out once."""

    def __init__(self, world: World, policy: Policy) -> None:
        self._world = world
        self._policy = policy
        self._plain: dict[str, End | None] = {}  # by what is called, unless that is a RemoteVM

    def ends(
        self, call: CallClass, rule: Rule, sources: list[str], mask: int
    ) -> Iterator[tuple[str, Ends]]:
        """Yield, for sources of one region, where requests of the targets in ``mask`` end."""
        if not sources:
            return
        targets = tuple(target.text for target in self._world.targets_in(mask))
        if rule.action.verb is Verb.ALLOW:
            yield from self._allowed(call, rule, sources, targets)
            return
        chosen: dict[str, Ends] = {}
        for source in sources:
            # What a question offers is the same whatever was asked for.
            ask = self._world.resolve(self._policy, rule, call, source, targets[0])
            if not isinstance(ask, Ask):
                continue
            ends: Ends = {}
            for candidate in ask.candidates:
                if candidate == source:
                    continue  # a loop
                if candidate not in chosen:
                    chosen[candidate] = self._chosen(ask, candidate, targets)
                ends |= chosen[candidate]
            yield source, ends

    def _allowed(
        self, call: CallClass, rule: Rule, sources: list[str], targets: tuple[str, ...]
    ) -> Iterator[tuple[str, Ends]]:
        """Yield the ends of a rule that allows: but for loops the same for all the sources.

        For they have one disposable base: ``World`` splits its first cells by it.
        """
        ways: dict[tuple[str, End], tuple[str, ...]] = {}
        for target in targets:
            allow = self._world.resolve(self._policy, rule, call, sources[0], target)
            end = self._end(allow) if isinstance(allow, Allow) else None
            if isinstance(allow, Allow) and end is not None:
                way = (allow.target, end)
                ways[way] = (*ways.get(way, ()), target)
        common = _together(ways)
        called = {text for text, _ in ways}
        for source in sources:
            if source in called:
                yield source, _together({way: ways[way] for way in ways if way[0] != source})
            else:
                yield source, common

    def _chosen(self, ask: Ask, candidate: str, targets: tuple[str, ...]) -> Ends:
        """Return where a choice leads, which is offered whichever of ``targets`` is asked for."""
        allow = ask.chosen(candidate)
        assert isinstance(allow, Allow)
        domain = self._world.info.get(candidate)
        if domain is None or domain.klass != "RemoteVM":
            end = self._end(allow)
            return {} if end is None else {end: targets}
        ends: Ends = {}
        for target in targets:  # a relay is told what was asked for
            end = self._end(replace(allow, requested_target=target))
            if end is not None:
                ends[end] = (*ends.get(end, ()), target)
        return ends

    def _end(self, allow: Allow) -> End | None:
        """Return where an allowed call ends, whoever makes it: loops are the caller's business."""
        text = allow.target
        if text in self._plain:
            return self._plain[text]
        directed = direct(replace(allow, source=UNKNOWN), self._world.info)
        end: End | None = None
        if isinstance(directed, Direction):
            name = self._world.info.to_name(text)
            assert name is not None  # direct() denies what does not exist
            if directed.service is not None:
                return name, directed.target, directed.service
            end = (name, None, None)
        self._plain[text] = end
        return end


def _together(ways: dict[tuple[str, End], tuple[str, ...]]) -> Ends:
    """Put ways together that end alike: by name and by UUID."""
    ends: Ends = {}
    for (_, end), asked in ways.items():
        ends[end] = (*ends[end], *asked) if end in ends else asked
    return ends


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
    """A way of each domain that one goes through: their sources name these."""
    ways: tuple[Reach, ...]
    """Every way from the domain before it on the path."""


def what_can(
    world: World, policy: Policy, source: str, *, through: bool = True, ask: bool = True
) -> list[Step]:
    """Return everything that ``source`` reaches, directly first, then through what it reached.

    ``source`` is a name, ``uuid:...`` or, for a new disposable, ``@dispvm:NAME``.

    "Through" supposes that a domain that is reached does whatever its caller wants: the worst case,
    which is what one asks this question for. A disposable that is reached calls as one. Relays and
    the proxies of ``via=`` are reached by the calls that they carry.
    """
    start = source if source in world.sources else node_of(world.info.to_name(source) or source)
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
        for hop in way.rule.action.via:
            if hop.proxy in world.info or node_of(hop.proxy) in world.info:
                found.setdefault(hop.proxy, []).append(way)
    return found


def node_of(target: str) -> str:
    """Return the source that a reached target is afterwards: a disposable calls as one."""
    base = target.removeprefix(DISPVM_PREFIX)
    return target if base == target else f"disposable of {base}"
