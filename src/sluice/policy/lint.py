"""What is wrong, or odd, with a set of rules. Pure: rules and registry in, findings out.

Without a registry only what holds in every registry is said: rules that an earlier one covers
wholly, words that cannot mean what they look like, wildcards that give too much. With one, also
names that do not exist, redirections to what cannot be, and rules that decide no call of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from sluice.policy.classes import World
from sluice.policy.evaluation import Policy
from sluice.policy.findings import Finding, at
from sluice.policy.index import NOWHERE, offered_parts
from sluice.policy.known_services import CLASSES, DANGEROUS, KNOWN_TAGS, known_services
from sluice.policy.rules import Rule, Verb
from sluice.policy.system_info import ADMIN_FACETS, SystemInfo, is_dom0
from sluice.policy.tokens import (
    ANYVM,
    DEFAULT,
    DISPVM,
    DISPVM_PREFIX,
    DISPVM_TAG_PREFIX,
    TAG_PREFIX,
    TYPE_PREFIX,
    WILDCARD,
    Token,
    is_literal,
)

PROXY = "qrexec-proxy"
_ALL = (WILDCARD, ANYVM)
# Findings that already say why a rule decides nothing.
_EXPLAINS = frozenset({"unreachable", "unknown-domain", "unknown-tag", "unknown-class", "no-match"})
_OLD_WORDS = frozenset({"anyvm", "dispvm", "default", "adminvm"})


def lint(
    policy: Policy,
    info: SystemInfo | None = None,
    services: Iterable[str] | None = None,
    *,
    everywhere: bool = True,
) -> list[Finding]:
    """Return every finding about a policy, in the order of its rules.

    ``services`` are names of services that exist: anywhere, or, unless ``everywhere``, in dom0;
    None where nobody knows.
    """
    known = None if services is None else frozenset(services) | known_services()
    place = {id(rule): number for number, rule in enumerate(policy.rules)}
    found: list[tuple[int, Finding]] = []
    for number, rule in enumerate(policy.rules):
        findings: list[Finding] = []
        shadow = _shadow(policy, rule, number, info)
        if shadow is not None and rule.line is not None:
            findings.append(
                at(rule, "unreachable", f"unreachable: {shadow.place} covers it wholly", shadow)
            )
        findings += _words(rule)
        findings += _wildcards(rule)
        findings += _services(rule, known, info, everywhere)
        if info is not None:
            findings += _names(rule, info)
            findings += _redirects(rule, info)
        found += [(number, finding) for finding in findings]
    if info is not None:
        world = World(info, [policy])
        explained = {number for number, finding in found if finding.code in _EXPLAINS}
        found += [
            (place[id(rule)], finding)
            for rule, finding in _never(policy, world)
            if place[id(rule)] not in explained
        ]
        found += [(NOWHERE, finding) for finding in _shared_proxies(policy, world, info)]
    found.sort(key=lambda entry: entry[0])
    return _once(found, policy)


def _once(found: list[tuple[int, Finding]], policy: Policy) -> list[Finding]:
    """Say once what holds for a line wherever it is included; else for which calls it holds."""
    times = Counter((rule.file, rule.line) for rule in policy.rules)
    calls: dict[Finding, list[str]] = {}
    for number, finding in found:
        given = calls.setdefault(finding._replace(related=()), [])
        if number != NOWHERE:
            given.append(f"{policy.rules[number].service} {policy.rules[number].argument}")
    said = []
    for _, finding in found:
        key = finding._replace(related=())
        if key not in calls:
            continue
        given = calls.pop(key)
        if given and len(given) < times[finding.file, finding.line]:
            message = f"{finding.message} (for {', '.join(dict.fromkeys(given))})"
            finding = finding._replace(message=message)
        said.append(finding)
    return said


def _cover(token: Token, info: SystemInfo | None, *, source: bool) -> list[str]:
    """Return the words that match whatever ``token`` matches: its facets, as far as they are sure.

    A rule whose parts are all among them matches all that the token does.
    """
    covers = {WILDCARD, *token.parts}
    for part in token.parts:
        if is_dom0(part):
            covers.update(ADMIN_FACETS)
        elif is_literal(part):
            covers.add(ANYVM)
            domain = None if info is None else info.get(part)
            if domain is not None:
                covers.update(domain.facets)
        elif part.startswith(TYPE_PREFIX):
            if part != TYPE_PREFIX + "AdminVM":
                covers.add(ANYVM)
        elif part.startswith(DISPVM_PREFIX) or part in (DEFAULT, DISPVM, ANYVM):
            covers.add(ANYVM)
    if info is not None and not source and len(token.parts) == 1:
        covers.update(_base_cover(token.parts[0], info))
    return sorted(covers)


def _base_cover(part: str, info: SystemInfo) -> tuple[str, ...]:
    base = info.get(part.removeprefix(DISPVM_PREFIX)) if part.startswith(DISPVM_PREFIX) else None
    if base is None or part.startswith(DISPVM_TAG_PREFIX):
        return ()
    # @dispvm:NAME also matches plain @dispvm, which @dispvm:uuid:UUID does not.
    return tuple(f for f in base.base_facets if not f.startswith(DISPVM_PREFIX + "uuid:"))


def _shadow(policy: Policy, rule: Rule, number: int, info: SystemInfo | None) -> Rule | None:
    """Return the earlier rule that matches whatever this one does, or None."""
    first = policy.index.first(
        rule.service,
        rule.argument,
        _cover(rule.source, info, source=True),
        _cover(rule.target, info, source=False),
    )
    return policy.rules[first] if first < number else None


def _never(policy: Policy, world: World) -> Iterator[tuple[Rule, Finding]]:
    """Yield the rules that decide no call of this registry, with those that take their calls."""
    deciding: set[int] = set()
    for call in world.calls:
        deciding.update(id(region.rule) for region in world.regions(policy, call))
    for rule in policy.rules:
        if id(rule) in deciding or rule.line is None:
            continue
        sources = world.source_mask(rule.source.parts)
        targets = world.target_mask(rule.target.parts)
        if not sources or not targets:
            if any(part.endswith(tag) for tag in KNOWN_TAGS for part in _parts(rule)):
                continue  # a tag that other systems have, in a rule that is shipped
            column = "source" if not sources else "target"
            word = (rule.source if not sources else rule.target).text
            yield rule, at(rule, "no-match", f"matches nothing here: no {column} is {word}")
            continue
        takers = _takers(policy, world, rule, sources, targets)
        names = ", ".join(taker.place for taker in takers)
        message = f"decides no call of this registry: {names} come first"
        yield rule, at(rule, "unreachable-here", message, *takers)


def _parts(rule: Rule) -> tuple[str, ...]:
    return rule.source.parts + rule.target.parts


def _takers(policy: Policy, world: World, rule: Rule, sources: int, targets: int) -> list[Rule]:
    found: dict[int, Rule] = {}
    for call in world.calls:
        if not rule.matches_call(*call.sample):
            continue
        for region in world.regions(policy, call):
            if region.rule and region.sources & sources and region.targets & targets:
                found[id(region.rule)] = region.rule
    return list(found.values())


def _words(rule: Rule) -> Iterator[Finding]:
    """Words that mean something else than they look like."""
    for column, token in (("source", rule.source), ("target", rule.target)):
        for part in token.parts:
            if part.startswith("$") or part in _OLD_WORDS:
                message = f"{column} {part} is the name of a domain here, not a keyword"
                yield at(rule, "old-keyword", f"{message}: did you mean @{part.lstrip('$')}?")
            if part.startswith(TYPE_PREFIX) and part[len(TYPE_PREFIX) :] not in CLASSES:
                message = f"there is no class {part[len(TYPE_PREFIX) :]}"
                yield at(rule, "unknown-class", message)
    if any(part.startswith(DISPVM_PREFIX) for part in rule.source.parts):
        message = f"source {rule.source.text} never matches: use @type:DispVM or a tag"
        yield at(rule, "no-match", message)


def _wildcards(rule: Rule) -> Iterator[Finding]:
    """Rules that allow more than one should."""
    if rule.action.verb is not Verb.ALLOW:
        return
    anyone = rule.source.text in _ALL
    anywhere = rule.target.text in _ALL and rule.action.target is None
    to_dom0 = rule.target.text == WILDCARD and rule.action.target is None
    if rule.service == WILDCARD:
        yield at(rule, "wildcard", "allows every service, those that run any command included")
    if to_dom0 and rule.service != WILDCARD:
        yield at(rule, "wildcard", "target * includes dom0: write @anyvm if it is not meant")
    if rule.service in DANGEROUS and (anyone or anywhere):
        what = "any source" if anyone else "any target"
        message = f"allows {rule.service} with {what}: it {DANGEROUS[rule.service]}"
        yield at(rule, "wildcard", message)
    if rule.service == PROXY and rule.argument == WILDCARD:
        message = f"{PROXY} with any argument: the source chooses the chain and the target"
        yield at(rule, "wildcard", message)


def _services(
    rule: Rule, known: frozenset[str] | None, info: SystemInfo | None, everywhere: bool
) -> Iterator[Finding]:
    ordinary = known_services()
    if rule.service == WILDCARD or rule.service in ordinary:
        return
    alike = next((name for name in sorted(ordinary) if name.lower() == rule.service.lower()), None)
    if alike is not None:
        yield at(rule, "unknown-service", f"service {rule.service}: did you mean {alike}?")
    elif known is not None and rule.service not in known:
        ends = _classes_of_ends(rule, info)
        # What the domains of another machine offer is not known here; or, where only the services
        # of dom0 are, what any other domain offers.
        surely_missing = ends != {"RemoteVM"} if everywhere else ends == {"AdminVM"}
        if surely_missing:
            yield at(rule, "unknown-service", f"no service {rule.service} is known")


def _classes_of_ends(rule: Rule, info: SystemInfo | None) -> set[str]:
    """Return the classes of the domains that a rule may lead to by name."""
    parts = offered_parts(rule.target, rule.action)
    return {d.klass for d in info or () if frozenset(d.facets).issuperset(parts)}


def _names(rule: Rule, info: SystemInfo) -> Iterator[Finding]:
    """Domains and tags that do not exist."""
    tags = {tag for domain in info for tag in domain.tags}
    for column, token in (("source", rule.source), ("target", rule.target)):
        for part in token.parts:
            tag = next((part[len(p) :] for p in _TAGS if part.startswith(p)), None)
            if tag is not None:
                if tag not in tags and tag not in KNOWN_TAGS:
                    yield at(rule, "unknown-tag", f"{column}: no domain has the tag {tag}")
                continue
            name = part.removeprefix(DISPVM_PREFIX)
            if is_literal(name) and name not in info and not is_dom0(name):
                yield at(rule, "unknown-domain", f"{column}: there is no domain {name}")
    for hop in rule.action.via:
        name = hop.proxy.removeprefix(DISPVM_PREFIX)
        if name not in info:
            yield at(rule, "unknown-domain", f"via: there is no domain {name}")
        elif is_dom0(name):
            yield at(rule, "via-dom0", "via: dom0 must not be a proxy: it would read the bytes")
        elif hop.proxy == rule.source.text:
            yield at(rule, "via-self", "via: source and proxy are the same: always refused")


_TAGS = (DISPVM_TAG_PREFIX, TAG_PREFIX)


def _redirects(rule: Rule, info: SystemInfo) -> Iterator[Finding]:
    """Redirections to what cannot be."""
    action = rule.action
    for key, value in (("target", action.target), ("default_target", action.default_target)):
        if value is None or is_dom0(value):
            continue
        name = value.removeprefix(DISPVM_PREFIX)
        if value == DISPVM:
            if key == "target":
                yield from _without_base(rule, info)
        elif name not in info:
            yield at(rule, "bad-redirect", f"{key}={value}: there is no domain {name}")
        elif value != name and not getattr(info.get(name), "template_for_dispvms", False):
            yield at(rule, "bad-redirect", f"{key}={value}: {name} is no disposable base")
        elif key == "target":
            yield from _bad_target(rule, value, info)


def _without_base(rule: Rule, info: SystemInfo) -> Iterator[Finding]:
    lacking = [
        domain.name
        for domain in info
        if not domain.default_dispvm
        and domain.name != "dom0"
        and frozenset(domain.facets).issuperset(rule.source.parts)
    ]
    if lacking:
        names = ", ".join(lacking[:5]) + (" and others" if len(lacking) > 5 else "")
        message = f"target=@dispvm: no default disposable base has {names}"
        yield at(rule, "bad-redirect", message)


def _bad_target(rule: Rule, value: str, info: SystemInfo) -> Iterator[Finding]:
    domain = info.get(value)
    if domain is None:
        return
    if rule.source.text in (domain.name, f"uuid:{domain.uuid}"):
        yield at(rule, "bad-redirect", f"target={value}: source and target are the same")
    if domain.klass == "RemoteVM" and not (domain.relayvm and domain.transport_rpc):
        lacks = "relayvm" if not domain.relayvm else "transport_rpc"
        yield at(rule, "bad-redirect", f"target={value}: the RemoteVM has no {lacks}")


def _shared_proxies(policy: Policy, world: World, info: SystemInfo) -> Iterator[Finding]:
    """Proxies that serve sources of different labels: each is as trusted as the most trusted."""
    users: dict[str, dict[str, list[str]]] = {}
    rules: dict[str, list[Rule]] = {}
    for rule in policy.rules:
        if rule.action.verb is Verb.DENY:
            continue
        proxies = {hop.proxy for hop in rule.action.via if not hop.proxy.startswith(DISPVM)}
        if rule.service == PROXY:
            target = rule.action.target or rule.target.text
            if target in info:
                proxies.add(target)
        for proxy in proxies:
            rules.setdefault(proxy, []).append(rule)
            for source in world.sources_in(world.source_mask(rule.source.parts)):
                domain = info.get(source)
                if domain is not None and domain.label:
                    names = users.setdefault(proxy, {}).setdefault(domain.label, [])
                    if source not in names and source != proxy:
                        names.append(source)
    for proxy, labels in users.items():
        used = {label: names for label, names in labels.items() if names}
        if len(used) > 1:
            shown = "; ".join(f"{label}: {', '.join(names[:4])}" for label, names in used.items())
            message = f"sources of different labels share the proxy {proxy} ({shown})"
            yield at(rules[proxy][0], "shared-proxy", message, *rules[proxy][1:])
