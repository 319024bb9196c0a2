"""Permitted calls as a graph: who reaches whom, with which services. Drawn by ``drawing``.

Nodes are domains, dom0 and new disposables; an edge carries the services by which its source
reaches its target. Two things keep a picture readable where rules speak of ``@anyvm``, and lose
nothing: what (nearly) any two domains may do is told once, with its exceptions, instead of being
drawn between all of them; and domains that are treated alike (swap two of them, and the graph is
the same) are folded into one node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from sluice.policy.classes import CallClass, World
from sluice.policy.evaluation import Policy
from sluice.policy.reach import calls_of, endings
from sluice.policy.rules import Verb
from sluice.policy.system_info import SystemInfo
from sluice.policy.tokens import DISPVM_PREFIX

PLAIN_COLOUR = "#888888"


class Member(NamedTuple):
    """A domain in a node: its name and its colour as ``#RRGGBB``."""

    name: str
    colour: str


class Node(NamedTuple):
    """One box of the drawing; several members if they were folded."""

    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        """The name of the first member, which tells nodes apart."""
        return self.members[0].name


class Edge(NamedTuple):
    """Everything that one node may call of another; of itself, if it was folded."""

    source: str
    target: str
    allowed: tuple[str, ...]
    """Services, ``SERVICE+ARGUMENT`` where the rules tell arguments apart."""
    asked: tuple[str, ...]


class Common(NamedTuple):
    """A service that any domain may call of any other (or of ``target``), with the exceptions."""

    target: str | None
    service: str
    verb: str
    exceptions: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """Return it in words; domains that are excepted altogether are named once."""
        sources = {source for source, _ in self.exceptions}
        targets = {target for _, target in self.exceptions}
        if not self.exceptions:
            but = ""
        elif len(sources) == 1 < len(targets):
            but = f", but not from {min(sources)} to {', '.join(sorted(targets))}"
        elif len(targets) == 1:
            but = f", but not from {', '.join(sorted(sources))} to {min(targets)}"
        else:
            into: dict[str, list[str]] = {}
            for source, target in self.exceptions:
                into.setdefault(target, []).append(source)
            but = ", but not " + "; ".join(f"{', '.join(a)} to {b}" for b, a in into.items())
        return f"{self.service}: {'asked' if self.verb == 'ask' else 'allowed'}{but}"


class Graph(NamedTuple):
    """Nodes in the order of the registry, edges, and what is the same for all domains."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    common: tuple[Common, ...] = ()


Pairs = dict[tuple[str, str], tuple[frozenset[str], frozenset[str]]]


def build(
    policy: Policy,
    info: SystemInfo,
    *,
    services: Collection[str] = (),
    domains: Collection[str] = (),
    include_ask: bool = True,
    fold: bool = True,
) -> Graph:
    """Return the graph of all calls that are allowed, or asked about.

    ``services`` are ``SERVICE`` or ``SERVICE+ARGUMENT``, ``domains`` names; each empty for all. An
    edge is kept if one of its ends is among the domains.
    """
    world = World(info, [policy], disposables=False)
    pairs = _pairs(world, policy, _calls(world, services), include_ask)
    if domains:
        pairs = {pair: labels for pair, labels in pairs.items() if set(pair) & set(domains)}
    used = {name for pair in pairs for name in pair}
    order = [domain.name for domain in info if domain.name in used]
    order += sorted(used.difference(order))
    common: tuple[Common, ...] = ()
    if fold:
        members = [name for name in order if name in info and name != "dom0"]
        pairs, common = _common(pairs, members)
    groups = _fold(order, pairs) if fold else [[name] for name in order]
    nodes = tuple(Node(tuple(Member(name, _colour(name, info)) for name in g)) for g in groups)
    return Graph(nodes, tuple(_edges(groups, pairs)), common)


def _common(pairs: Pairs, names: list[str]) -> tuple[Pairs, tuple[Common, ...]]:
    """Take out what at least two thirds of all domains have in common: a call of each other, or
    a call of dom0 or of one disposable."""
    kept = dict(pairs)
    found: list[Common] = []
    if len(names) < 4:
        return kept, ()
    targets = sorted({target for _, target in pairs}.difference(names))
    for target in (None, *targets):
        if target is None:
            everyone = [(a, b) for a in names for b in names if a != b]
        else:
            everyone = [(name, target) for name in names]
        found += _take_out(kept, target, everyone)
    return {pair: labels for pair, labels in kept.items() if any(labels)}, tuple(found)


def _take_out(pairs: Pairs, target: str | None, everyone: list[tuple[str, str]]) -> list[Common]:
    count: dict[tuple[int, str], set[tuple[str, str]]] = {}
    for pair in everyone:
        for number, labels in enumerate(pairs.get(pair, ())):
            for label in labels:
                count.setdefault((number, label), set()).add(pair)
    found = []
    for (number, label), having in sorted(count.items()):
        if len(having) * 3 < len(everyone) * 2:
            continue
        exceptions = tuple(pair for pair in everyone if pair not in having)
        found.append(Common(target, label, ("allow", "ask")[number], exceptions))
    gone = [frozenset(c.service for c in found if c.verb == verb) for verb in ("allow", "ask")]
    for pair in everyone:
        if pair in pairs:
            pairs[pair] = (pairs[pair][0] - gone[0], pairs[pair][1] - gone[1])
    return found


def _calls(world: World, services: Collection[str]) -> list[CallClass] | None:
    if not services:
        return None
    found: dict[CallClass, None] = {}
    for text in services:
        service, plus, argument = text.partition("+")
        found |= dict.fromkeys(calls_of(world, service, plus + argument if plus else None))
    return list(found)


def _pairs(world: World, policy: Policy, calls: list[CallClass] | None, include_ask: bool) -> Pairs:
    labels: dict[tuple[str, str], tuple[set[str], set[str]]] = {}
    unknown = set(world.unknown)
    call, label = None, ""
    for this, rule, source, ends in endings(world, policy, calls=calls):
        kind = rule.action.verb is Verb.ASK
        if source in unknown or (kind and not include_ask):
            continue
        if this is not call:
            call, label = this, _label(this)
        for target, _, _ in ends:
            if target == source:
                continue  # of oneself, by UUID: nobody gains anything by it
            if (source, target) not in labels:
                labels[source, target] = (set(), set())
            labels[source, target][kind].add(label)
    found = {}
    for pair, (allowed, asked) in labels.items():
        free = _widest(allowed)
        asked = {a for a in asked if a.partition(" ")[0].partition("+")[0] not in free}
        found[pair] = (frozenset(free), frozenset(_widest(asked) - free))
    return found


def _label(call: CallClass) -> str:
    if call.service is None:
        return "any other service"
    return call.service + (" *" if call.argument is None else call.argument)


def _widest(labels: Iterable[str]) -> set[str]:
    """Leave out ``S+a`` where every argument of S is there, and show ``S *`` as ``S``."""
    wide = {label[:-2] for label in labels if label.endswith(" *")}
    narrow = {label for label in labels if not label.endswith(" *")}
    return wide | {label for label in narrow if label.partition("+")[0] not in wide}


def _colour(name: str, info: SystemInfo) -> str:
    domain = info.get(name.removeprefix(DISPVM_PREFIX))
    label = None if domain is None else domain.label
    if label is None or len(label) != 8 or not label.startswith("0x"):
        return PLAIN_COLOUR
    try:
        return f"#{int(label[2:], 16):06x}"
    except ValueError:
        return PLAIN_COLOUR


def _fold(order: list[str], pairs: Pairs) -> list[list[str]]:
    """Put names together that can be swapped without changing the graph."""
    out: dict[str, dict[str, object]] = {name: {} for name in order}
    into: dict[str, dict[str, object]] = {name: {} for name in order}
    for (source, target), labels in pairs.items():
        out[source][target] = labels
        into[target][source] = labels

    def without(edges: dict[str, object], *names: str) -> dict[str, object]:
        return {name: labels for name, labels in edges.items() if name not in names}

    def alike(one: str, other: str) -> bool:
        if (one[0] == "@") != (other[0] == "@") or "dom0" in (one, other):
            return False
        both = (one, other)
        return (
            len(out[one]) == len(out[other])
            and len(into[one]) == len(into[other])
            and without(out[one], *both) == without(out[other], *both)
            and without(into[one], *both) == without(into[other], *both)
            and out[one].get(other) == out[other].get(one)
            and out[one].get(one) == out[other].get(other)
        )

    groups: list[list[str]] = []
    for name in order:
        for group in groups:
            if all(alike(name, member) for member in group):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _edges(groups: list[list[str]], pairs: Pairs) -> Iterable[Edge]:
    first = {name: group[0] for group in groups for name in group}
    drawn: dict[tuple[str, str], Edge] = {}
    for (source, target), (allowed, asked) in pairs.items():
        ends = (first[source], first[target])
        if ends not in drawn:
            only_asked = asked - allowed
            drawn[ends] = Edge(*ends, tuple(sorted(allowed)), tuple(sorted(only_asked)))
    return drawn.values()
