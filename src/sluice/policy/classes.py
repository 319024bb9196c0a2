"""The requests that a policy can tell apart: finitely many classes (the theory of the analysis).

A policy sees a request only through equality with the words it contains and through facets (see
``system_info``). So, for given policies and a given registry:

* **Calls.** Services that no rule names are all alike; so are, for a service, the arguments that no
  rule names for it. One representative stands for each such rest.
* **Sources.** The domains of the registry; each name that a rule mentions and the registry lacks;
  and one domain that nobody knows. Calls of dom0 are not subject to policy. A call that a relay
  makes for a RemoteVM is decided as that RemoteVM's (section 13.2), so it is among these.
* **Targets.** Each domain by name and by UUID, each disposable base by name and by UUID,
  ``@dispvm``, ``@adminvm`` and ``@default``, which every non-existent name becomes. Illegal
  keywords and ``@dispvm:`` of what is no base are refused whatever the rules say.

``@dispvm`` means another base for another source, so it stands once for each base; then a rule
matches a *rectangle*: some sources times some targets, as bits of two integers. First match means
that a rule decides its rectangle less those before it. ``World.regions`` computes that partition,
and everything else (who can, what can, diff, unreachable rules, coverage) is set algebra on it.

To the domains of the registry the world adds, for each disposable base, one running disposable:
it has facets that nothing else may have, and rules are written for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from sluice.policy.evaluation import Policy, offer_facets, offered_targets
from sluice.policy.index import offered_parts
from sluice.policy.request import Call, normalise
from sluice.policy.resolution import Allow, Ask, Deny
from sluice.policy.rules import Request, Rule, Verb
from sluice.policy.system_info import Domain, SystemInfo, is_dom0
from sluice.policy.tokens import (
    ADMINVM,
    ANYVM,
    DEFAULT,
    DISPVM,
    DISPVM_PREFIX,
    WILDCARD,
    is_literal,
)

UNKNOWN = "a domain not in the registry"
"""The source that nobody knows; no word of a rule has spaces in it."""


class CallClass(NamedTuple):
    """Calls that no rule tells apart. ``service`` and ``argument`` are None for "any other"."""

    service: str | None
    argument: str | None
    sample: tuple[str, str]
    """A service and an argument of the class."""

    def __str__(self) -> str:
        """Return it as ``SERVICE+ARGUMENT``, with ``*`` for "any other"."""
        if self.service is None:
            return "*"
        if self.argument is None:
            return f"{self.service}+*"
        return f"{self.service}{self.argument}"


class Target(NamedTuple):
    """A target that a request can name; ``base`` only of ``@dispvm``: whose base it is."""

    text: str
    base: str | None = None


class Region(NamedTuple):
    """Requests that one rule decides (None: no rule): ``sources`` times ``targets``, as bits."""

    rule: Rule | None
    sources: int
    targets: int


class World:
    """All classes of requests for some policies and a registry."""

    def __init__(
        self, info: SystemInfo, policies: Sequence[Policy], *, disposables: bool = True
    ) -> None:
        """Enumerate the classes. ``disposables``: add one running disposable for each base."""
        domains = list(info)
        if disposables:
            domains += [sample_disposable(d) for d in domains if d.template_for_dispvms]
        self.info = SystemInfo(domains)
        self.policies = tuple(policies)
        self.calls = list(_calls(policies))
        known = [domain.name for domain in self.info if domain.name != "dom0"]
        named = {
            part
            for policy in policies
            for rule in policy.rules
            for part in rule.source.parts
            if is_literal(part) and part not in self.info and not is_dom0(part)
        }
        self.unknown = [*sorted(named), UNKNOWN]
        self.sources = [*known, *self.unknown]
        self._numbers = {source: number for number, source in enumerate(self.sources)}
        self.targets = list(self._targets())
        self._source_facets = [frozenset(self.info.source_facets(name)) for name in self.sources]
        self._target_facets = [
            frozenset(self.info.target_facets(target.text, target.base)) for target in self.targets
        ]
        self._elements = list(self._offered_elements())
        self._element_facets = [frozenset(facets) for _, facets in self._elements]
        self._element_masks: dict[tuple[str, ...], int] = {}
        self._offered_names: dict[int, frozenset[str]] = {}
        # By position of the policy and call: the same partitions are asked for again and again.
        self._regions: dict[tuple[int, CallClass], list[Region]] = {}
        self._offers: dict[tuple[int, CallClass], list[Region]] = {}
        self._source_masks: dict[tuple[str, ...], int] = {}
        self._target_masks: dict[tuple[str, ...], int] = {}
        self._start = self._first_cells()

    def base_of(self, source: str) -> str | None:
        """Return the default disposable base of a source."""
        domain = self.info.get(source)
        return None if domain is None else domain.default_dispvm

    def _targets(self) -> Iterator[Target]:
        for domain in self.info:
            yield Target(domain.name)
            if self._has_alias(domain):
                yield Target(f"uuid:{domain.uuid}")
        yield Target(DEFAULT)
        yield Target(ADMINVM)
        bases = dict.fromkeys(self.base_of(source) for source in self.sources)
        for base in bases:
            yield Target(DISPVM, base)
        for domain in self.info:
            if domain.template_for_dispvms:
                yield Target(DISPVM_PREFIX + domain.name)
                if self._has_alias(domain):
                    yield Target(f"{DISPVM_PREFIX}uuid:{domain.uuid}")

    def _has_alias(self, domain: Domain) -> bool:
        # Of two entries with one UUID the last has the alias, as in section 2.3.
        return domain.uuid is not None and self.info.get(f"uuid:{domain.uuid}") is domain

    def _first_cells(self) -> list[tuple[int, int]]:
        """Return all requests as rectangles: one for each base, with the @dispvm it has."""
        common = sum(1 << n for n, target in enumerate(self.targets) if target.text != DISPVM)
        cells = []
        for number, target in enumerate(self.targets):
            if target.text == DISPVM:
                sources = sum(
                    1 << n
                    for n, source in enumerate(self.sources)
                    if self.base_of(source) == target.base
                )
                cells.append((sources, common | 1 << number))
        return cells

    def source_mask(self, parts: tuple[str, ...]) -> int:
        """Return the sources that a token matches."""
        return _mask(parts, self._source_facets, self._source_masks)

    def target_mask(self, parts: tuple[str, ...]) -> int:
        """Return the targets that a token matches."""
        return _mask(parts, self._target_facets, self._target_masks)

    def regions(self, policy: Policy, call: CallClass) -> list[Region]:
        """Partition all requests of a class of calls by the rule that decides them."""
        key = (id(policy), call)
        if key not in self._regions:
            rules = [
                (rule, self.source_mask(rule.source.parts), self.target_mask(rule.target.parts))
                for rule in policy.index.matching_call(*call.sample)
            ]
            self._regions[key] = _partition(rules, self._start)
        return self._regions[key]

    def candidates(self, policy: Policy, call: CallClass, source: str) -> list[str]:
        """Return what an ``ask`` without ``target=`` offers a source: ``Policy.candidates``.

        What a question offers is a partition like any other, of what can be offered instead of
        what can be asked for; a redirecting rule stands under its redirect (section 12).
        """
        domain = self.info.get(source)
        if domain is None:
            return []
        bit = 1 << self._numbers[source]
        offered = 0
        for rule, sources, elements in self._offered(policy, call):
            if rule is not None and sources & bit and rule.action.verb is not Verb.DENY:
                offered |= elements
        if offered not in self._offered_names:
            names = frozenset(self._elements[number][0] for number in bits(offered))
            self._offered_names[offered] = names
        return offered_targets(set(self._offered_names[offered] - {source}), domain, self.info)

    def _offered(self, policy: Policy, call: CallClass) -> list[Region]:
        key = (id(policy), call)
        if key not in self._offers:
            known, facets = self._element_masks, self._element_facets
            rules = [
                (
                    rule,
                    self.source_mask(rule.source.parts),
                    _mask(offered_parts(rule.target, rule.action), facets, known),
                )
                for rule in policy.index.matching_call(*call.sample)
            ]
            everything = [((1 << len(self.sources)) - 1, (1 << len(self._elements)) - 1)]
            self._offers[key] = _partition(rules, everything)
        return self._offers[key]

    def _offered_elements(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield what section 12 collects, with the words that cover it."""
        for domain in self.info:
            if not domain.internal:
                yield domain.name, offer_facets(domain)
                if domain.template_for_dispvms:
                    facets = (WILDCARD, ANYVM, *domain.base_facets)
                    yield DISPVM_PREFIX + domain.name, facets
        yield DISPVM, (WILDCARD, ANYVM, DISPVM)
        yield ADMINVM, (ADMINVM,)

    def sources_in(self, mask: int) -> list[str]:
        """Return the sources whose bits are set."""
        return [self.sources[number] for number in bits(mask)]

    def targets_in(self, mask: int) -> list[Target]:
        """Return the targets whose bits are set."""
        return [self.targets[number] for number in bits(mask)]

    def call(self, call: CallClass, source: str, target: str) -> Call:
        """Return the normalised request for a member of a class."""
        found = normalise(Request(*call.sample, source, target), self.info)
        assert isinstance(found, Call)  # refused ones are not among the classes
        return found

    def resolve(
        self, policy: Policy, rule: Rule | None, call: CallClass, source: str, target: str
    ) -> Allow | Ask | Deny:
        """Return the answer for a member of a region that ``rule`` decides."""
        candidates = None
        if rule is not None and rule.action.verb is Verb.ASK and rule.action.target is None:
            candidates = self.candidates(policy, call, source)
        return policy.answer(self.call(call, source, target), rule, self.info, candidates)

    def label(self, source: str) -> str:
        """Return how a source is shown: a name that nobody knows is marked as such."""
        if source == UNKNOWN or source not in self.unknown:
            return source
        return f"{source} (not in the registry)"


def sample_disposable(base: Domain) -> Domain:
    """Return a running disposable based on ``base``, as qubesd makes it for a call of @dispvm.

    docs/spec/core-stack.md 2.9: tags of the template and those of the creation, which the daemon
    does in the name of dom0; its own default base is its template.
    """
    return Domain(
        name=f"disposable of {base.name}",
        klass="DispVM",
        tags=base.tags | {"created-by-dom0", "disp-created-by-dom0"},
        default_dispvm=base.name,
        power_state="Running",
        icon=base.icon.replace("app", "disp"),
        label=base.label,
        guivm=base.guivm,
    )


def bits(mask: int) -> Iterator[int]:
    """Yield the numbers of the bits that are set, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _partition(
    rules: Iterable[tuple[Rule, int, int]], cells: list[tuple[int, int]]
) -> list[Region]:
    """Give each rule, in order, what of its rectangle no rule before it took."""
    found: list[Region] = []
    for rule, sources, targets in rules:
        if not sources or not targets:
            continue
        rest = []
        for cell in cells:
            common = cell[0] & sources
            hit = cell[1] & targets
            if not common or not hit:
                rest.append(cell)
                continue
            found.append(Region(rule, common, hit))
            if cell[0] != common:
                rest.append((cell[0] & ~common, cell[1]))
            if cell[1] != hit:
                rest.append((common, cell[1] & ~hit))
        cells = rest
        if not cells:
            break
    return found + [Region(None, sources, targets) for sources, targets in cells]


def _mask(
    parts: tuple[str, ...], facets: Sequence[frozenset[str]], known: dict[tuple[str, ...], int]
) -> int:
    mask = known.get(parts)
    if mask is None:
        mask = sum(1 << n for n, have in enumerate(facets) if have.issuperset(parts))
        known[parts] = mask
    return mask


def _calls(policies: Iterable[Policy]) -> Iterator[CallClass]:
    """Yield the classes of calls, sorted; the rest of all services comes last."""
    named: dict[str, set[str]] = {}
    for policy in policies:
        for rule in policy.rules:
            if rule.service != WILDCARD:
                arguments = named.setdefault(rule.service, set())
                if rule.argument != WILDCARD:
                    arguments.add(rule.argument)
    for service in sorted(named):
        arguments = named[service]
        for argument in sorted(arguments):
            yield CallClass(service, argument, (service, argument))
        other = "+" if "+" not in arguments else _fresh("+other", arguments)
        yield CallClass(service, None, (service, other))
    yield CallClass(None, None, (_fresh("any.Other", named), "+"))


def _fresh(stem: str, taken: Iterable[str]) -> str:
    taken = set(taken)
    number = 0
    while (name := f"{stem}{number or ''}") in taken:
        number += 1
    return name
