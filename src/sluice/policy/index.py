"""The index: which rules match a call, without looking at all of them.

A rule matches a call when its service and argument fit and when all parts of its source token are
*facets* of the source, and all parts of its target token facets of the target (see
``system_info``). So rules are kept in three levels of dictionaries:

    (service, argument) -> source parts -> target parts -> the first rule with these

A call looks up three keys on the first level, and on the other two the facets of its source and
target, of which there are as many as a domain has names and tags, however many rules there are.
Parts of a conjunction are sorted, and so are kept as a path of a trie; the walk goes only along
paths whose every part is a facet. Of several rules with equal columns only the first can ever
decide, so one position is enough.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Generic, TypeVar

from sluice.policy.rules import Action, Rule
from sluice.policy.tokens import WILDCARD, Token

Value = TypeVar("Value")
NOWHERE = 1 << 62
"""Greater than the position of any rule."""


class Trie(Generic[Value]):
    """Values under sorted tuples of parts; finds those whose parts are all among given facets."""

    __slots__ = ("conjunctions", "single")

    def __init__(self) -> None:
        """Start empty."""
        self.single: dict[str, Value] = {}
        # first part -> trie of the remaining parts; conjunctions are rare
        self.conjunctions: dict[str, Trie[Value]] = {}

    def get(self, parts: Sequence[str]) -> Value | None:
        """Return the value under exactly these parts."""
        if len(parts) == 1:
            return self.single.get(parts[0])
        below = self.conjunctions.get(parts[0])
        return None if below is None else below.get(parts[1:])

    def put(self, parts: Sequence[str], value: Value) -> None:
        """Set the value under exactly these parts."""
        if len(parts) == 1:
            self.single[parts[0]] = value
        else:
            self.conjunctions.setdefault(parts[0], Trie()).put(parts[1:], value)

    def values(self) -> Iterator[Value]:
        """Yield every value."""
        yield from self.single.values()
        for below in self.conjunctions.values():
            yield from below.values()

    def find(self, facets: Collection[str]) -> Iterator[Value]:
        """Yield every value whose parts are all among ``facets``."""
        single = self.single
        for facet in facets:
            if facet in single:
                yield single[facet]
        if self.conjunctions:
            for first in facets:
                below = self.conjunctions.get(first)
                if below is not None:
                    yield from below.find(facets)


class Sources:
    """The rules of one service and argument from one source token."""

    __slots__ = ("first", "offers", "rules", "targets")

    def __init__(self, first: int) -> None:
        """Start with the position of the first of these rules."""
        self.first = first
        self.rules: list[int] = []
        self.targets: Trie[int] = Trie()
        self.offers: Trie[int] | None = None


class Index:
    """Finds rules by the facets of a call. Built once; never changed afterwards."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        """Index ``rules``; positions are those in this sequence."""
        self._rules = rules
        self._calls: dict[tuple[str, str], Trie[Sources]] = {}
        calls = self._calls
        for position, rule in enumerate(rules):
            key = (rule[0], rule[1])
            trie = calls.get(key)
            if trie is None:
                trie = calls[key] = Trie()
            parts = rule.source.parts
            sources = trie.get(parts)
            if sources is None:
                sources = Sources(position)
                trie.put(parts, sources)
            sources.rules.append(position)
            targets = rule.target.parts
            if len(targets) == 1:
                sources.targets.single.setdefault(targets[0], position)
            elif sources.targets.get(targets) is None:
                sources.targets.put(targets, position)

    def _sources(self, service: str, argument: str, facets: Collection[str]) -> Iterator[Sources]:
        calls = self._calls
        keys = [(WILDCARD, WILDCARD)]
        if service != WILDCARD:
            keys = [(service, argument), (service, WILDCARD), (WILDCARD, WILDCARD)]
        for key in keys:
            trie = calls.get(key)
            if trie is not None:
                yield from trie.find(facets)

    def first(
        self,
        service: str,
        argument: str,
        source_facets: Collection[str],
        target_facets: Collection[str],
    ) -> int:
        """Return the position of the first rule that matches, or NOWHERE."""
        best = NOWHERE
        for sources in self._sources(service, argument, source_facets):
            if sources.first < best:
                for position in sources.targets.find(target_facets):
                    if position < best:
                        best = position
        return best

    def matching_call(self, service: str, argument: str) -> list[Rule]:
        """Return all rules that speak of this service and argument, in order."""
        positions: list[int] = []
        for key in ((service, argument), (service, WILDCARD), (WILDCARD, WILDCARD)):
            if key in self._calls:
                positions += [n for sources in self._calls[key].values() for n in sources.rules]
        return [self._rules[position] for position in sorted(positions)]

    def offers(
        self, service: str, argument: str, source_facets: Collection[str]
    ) -> list[Trie[int]]:
        """Return, for the rules that match but for the target, what each offers (section 12).

        Like the targets, but a rule with ``target=`` stands under that instead of its column. Made
        when the first question needs it, and kept: that changes no answer.
        """
        found = []
        for sources in self._sources(service, argument, source_facets):
            if sources.offers is None:
                offers: Trie[int] = Trie()
                for position in sources.rules:
                    rule = self._rules[position]
                    parts = offered_parts(rule.target, rule.action)
                    if offers.get(parts) is None:
                        offers.put(parts, position)
                sources.offers = offers
            found.append(sources.offers)
        return found


def offered_parts(target: Token, action: Action) -> tuple[str, ...]:
    """Return the parts of what a rule offers: its redirect if it has one, else its target."""
    return target.parts if action.target is None else (action.target,)


def first_of(tries: Sequence[Trie[int]], facets: Collection[str]) -> int:
    """Return the lowest position in any of ``tries`` whose parts are all among ``facets``."""
    best = NOWHERE
    for trie in tries:
        for position in trie.find(facets):
            if position < best:
                best = position
    return best
