"""Which calls change their decision between two policies: all of them, and no other.

Both policies partition the same finite world of requests (``classes``). Where the regions of the
old and the new one meet, the same two rules decide all members; if their actions cannot differ for
anybody, the whole meeting is skipped, otherwise each member is decided by both and compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sluice.policy.classes import CallClass, Region, World
from sluice.policy.decisions import Decision, settle
from sluice.policy.evaluation import Policy
from sluice.policy.rules import Rule, Verb
from sluice.policy.system_info import SystemInfo


class Change(NamedTuple):
    """Requests of a source whose decision differs, all in the same way."""

    call: CallClass
    source: str
    targets: tuple[str, ...]
    """What the requests name."""
    old: Decision
    new: Decision
    old_rule: Rule | None
    new_rule: Rule | None

    @property
    def target(self) -> str:
        """The first target."""
        return self.targets[0]


class Group(NamedTuple):
    """Changes of the same kind: the same calls, the same words before and after."""

    calls: tuple[str, ...]
    old: str
    new: str
    pairs: tuple[tuple[str, str], ...]
    """Sources and targets, targets by name where name and UUID change alike."""
    example: Change


def changes(old: Policy, new: Policy, info: SystemInfo) -> Iterator[Change]:
    """Yield every class of requests that the two policies decide differently."""
    yield from changes_in(World(info, [old, new]))


def changes_in(world: World) -> Iterator[Change]:
    """Yield the differences between the two policies of a world."""
    old, new = world.policies
    for call in world.calls:
        before = old.index.matching_call(*call.sample)
        after = new.index.matching_call(*call.sample)
        if [rule[2:5] for rule in before] == [rule[2:5] for rule in after]:
            continue  # the same rules, perhaps in other files: nothing can differ
        yield from _compare(world, call, world.regions(old, call), world.regions(new, call))


def _compare(
    world: World, call: CallClass, before: list[Region], after: list[Region]
) -> Iterator[Change]:
    old, new = world.policies
    asked: dict[tuple[int, int, str], Decision] = {}

    def decide(side: int, policy: Policy, rule: Rule | None, source: str, target: str) -> Decision:
        if rule is None:
            return _NO_MATCH
        verb = rule.action.verb
        if verb is Verb.DENY:
            return Decision("deny", rule.action.notify)
        key = (side, id(rule), source)
        if verb is Verb.ASK and key in asked:
            return asked[key]
        decision, _ = settle(world.resolve(policy, rule, call, source, target), world.info)
        if verb is Verb.ASK:  # what a question offers does not depend on the target asked for
            asked[key] = decision
        return decision

    for first in before:
        for second in after:
            sources, shared = first.sources & second.sources, first.targets & second.targets
            if not sources or not shared or _equal(first.rule, second.rule):
                continue
            rules = (first.rule, second.rule)
            targets = tuple(target.text for target in world.targets_in(shared))
            if all(_same_for_all_targets(rule, world) for rule in rules):
                parts = [targets]
            else:
                parts = [(target,) for target in targets]
            for source in world.sources_in(sources):
                for part in parts:
                    was = decide(0, old, first.rule, source, part[0])
                    now = decide(1, new, second.rule, source, part[0])
                    if was != now:
                        yield Change(call, source, part, was, now, *rules)


def _same_for_all_targets(rule: Rule | None, world: World) -> bool:
    """Tell whether the decision of a rule does not depend on what the request named."""
    if rule is None or rule.action.verb is not Verb.ALLOW:
        return True
    redirect = rule.action.target
    domain = None if redirect is None else world.info.get(redirect)
    # A relay is told what was asked for.
    return redirect is not None and (domain is None or domain.klass != "RemoteVM")


_NO_MATCH = Decision("deny", True)


def _equal(old: Rule | None, new: Rule | None) -> bool:
    """Tell whether two rules decide alike whoever calls what."""
    if old is None or new is None:
        other = old or new
        return other is None or (other.action.verb is Verb.DENY and other.action.notify)
    if old.action.verb is Verb.ASK and old.action.target is None:
        return False  # what is offered depends on the other rules
    if old.action.verb is Verb.DENY and new.action.verb is Verb.DENY:
        return old.action.notify == new.action.notify
    return old.action._replace(reason=None) == new.action._replace(reason=None)


def group(found: list[Change], world: World) -> list[Group]:
    """Put changes of the same kind together; each group has an example to try out."""
    kinds: dict[tuple[CallClass, str, str], list[Change]] = {}
    for change in found:
        for part in _parts(change):
            kinds.setdefault((change.call, *_words(part)), []).append(part)
    # Calls whose changes are the same in all else share a group.
    merged: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[list[Change]]] = {}
    names: dict[str, str] = {}
    for (_, old, new), members in kinds.items():
        merged.setdefault((old, new, _fold(members, world, names)), []).append(members)
    return [
        Group(tuple(str(members[0].call) for members in lists), old, new, pairs, _example(lists[0]))
        for (old, new, pairs), lists in merged.items()
    ]


def _parts(change: Change) -> list[Change]:
    """Split a change where the words for it differ with the target."""
    if change.old.target is None and change.new.target is None:
        return [change]
    return [change._replace(targets=(target,)) for target in change.targets]


def _example(members: list[Change]) -> Change:
    """Return the change that is the easiest to try out: by name, and not of oneself."""
    candidates = [(member, target) for member in members[:50] for target in member.targets]
    change, target = min(candidates, key=lambda c: ("uuid:" in c[1], c[0].source == c[1]))
    return change._replace(targets=(target,))


def _words(change: Change) -> tuple[str, str]:
    old, new = change.old, change.new
    before, after = old.brief(change.target), new.brief(change.target)
    if old.verb == new.verb == "ask":
        lost = sorted(set(old.candidates) - set(new.candidates))
        gained = sorted(set(new.candidates) - set(old.candidates))
        delta = [f"-{name}" for name in lost] + [f"+{name}" for name in gained]
        after = " ".join([after, *delta])
    return before, after


def _fold(
    members: list[Change], world: World, names: dict[str, str]
) -> tuple[tuple[str, str], ...]:
    """Return source and target of each, without the UUID spelling where the name is there too."""
    pairs = dict.fromkeys(
        (change.source, target) for change in members for target in change.targets
    )
    for _, target in pairs:
        if target not in names:
            names[target] = world.info.to_name(target) or target
    return tuple(
        (world.label(source), target)
        for source, target in pairs
        if names[target] == target or (source, names[target]) not in pairs
    )
