"""Properties that hold for every policy and every registry, tried on random ones.

The reference here is the slow and plain reading of docs/spec/policy.md sections 10 and 12: a loop
over all rules with one function for each kind of token. The engine has neither.
"""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.policy import uuid_of

from sluice.policy.classes import World
from sluice.policy.decisions import settle
from sluice.policy.difference import changes, group
from sluice.policy.evaluation import Allow, Ask, Deny, Policy
from sluice.policy.lint import lint
from sluice.policy.memory import parse_text
from sluice.policy.options import Word, parse_action, quick_action
from sluice.policy.parser import parse_policy
from sluice.policy.reach import reaches, who_can
from sluice.policy.request import Call, normalise
from sluice.policy.response import direct
from sluice.policy.rules import OPT_IN, Request, Rule
from sluice.policy.system_info import Domain, SystemInfo

FAST = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

NAMES = ("a", "b", "c", "r")
TAGS = ("t", "u")
SERVICES = ("s.S", "s.T")
ARGUMENTS = ("+", "+x", "+y")
KLASSES = ("AppVM", "TemplateVM")


@st.composite
def registries(draw: st.DrawFn) -> SystemInfo:
    """Return a small registry: bases, tags, a RemoteVM, odd references."""
    domains = [
        Domain(
            "dom0",
            klass="AdminVM",
            tags=frozenset(draw(st.sets(st.sampled_from(TAGS)))),
            power_state="Running",
        )
    ]
    for number, name in enumerate(draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1))):
        remote = name == "r"
        domains.append(
            Domain(
                name,
                klass="RemoteVM" if remote else draw(st.sampled_from(KLASSES)),
                tags=frozenset(draw(st.sets(st.sampled_from(TAGS)))),
                uuid=uuid_of(number + 1),
                template_for_dispvms=draw(st.booleans()),
                default_dispvm=draw(st.sampled_from((None, *NAMES))),
                power_state=draw(st.sampled_from(("Running", "Halted"))),
                internal=draw(st.integers(0, 5)) == 0,
                relayvm=draw(st.sampled_from((None, "a", "b"))) if remote else None,
                transport_rpc=draw(st.sampled_from((None, "s.T"))) if remote else None,
            )
        )
    return SystemInfo(domains)


def literals() -> st.SearchStrategy[str]:
    """Return names and UUIDs, some of which exist."""
    uuids = [f"uuid:{uuid_of(number)}" for number in (1, 2, 9)]
    nil = "uuid:00000000-0000-0000-0000-000000000000"
    return st.sampled_from([*NAMES, "ghost", "dom0", *uuids, nil])


def keywords() -> st.SearchStrategy[str]:
    """Return keywords that both columns allow."""
    return st.sampled_from(
        ["@anyvm", "@adminvm", *(f"@tag:{tag}" for tag in TAGS), *(f"@type:{k}" for k in KLASSES)]
    )


BASES = st.one_of(literals().map(lambda name: f"@dispvm:{name}"))
SOURCES = st.one_of(literals(), keywords(), st.just("*"), st.just("@anyvm"), BASES)
TARGETS = st.one_of(
    literals(),
    keywords(),
    BASES,
    st.sampled_from(["*", "@anyvm", "@default", "@dispvm", "@dispvm:@tag:t", "@dispvm:@tag:u"]),
)
CONJUNCTIONS = st.lists(st.one_of(keywords(), st.just("*")), min_size=2, max_size=3).map(",".join)
REDIRECTS = st.one_of(literals(), BASES, st.sampled_from(["@adminvm", "@dispvm"]))


@st.composite
def actions(draw: st.DrawFn, target: str, *, extensions: bool = False) -> str:
    """Return an action that is legal for the target column."""
    verb = draw(st.sampled_from(("allow", "ask", "deny", "deny")))
    options = []
    if verb != "deny":
        if draw(st.booleans()) or (verb == "allow" and "@default" in target.split(",")):
            options.append(f"target={draw(REDIRECTS)}")
        if verb == "ask" and draw(st.booleans()):
            options.append(f"default_target={draw(REDIRECTS)}")
        options += draw(st.sampled_from(([], [], ["autostart=no"], ["user=u"], ["user="])))
        if extensions:
            options += draw(st.sampled_from(([], [], ["limit=1/1h"], ["via=a+c,@dispvm:b+d"])))
    options += draw(st.sampled_from(([], [], ["notify=yes"], ["notify=no"])))
    draw(st.randoms(use_true_random=False)).shuffle(options)
    if extensions and draw(st.integers(0, 3)) == 0:
        options.append("reason=because of  this, notify=yes")
    return " ".join([verb, *options])


@st.composite
def rules(draw: st.DrawFn, *, extensions: bool = False) -> str:
    """Return one rule as text."""
    service = draw(st.sampled_from((*SERVICES, *SERVICES, "*")))
    argument = "*" if service == "*" else draw(st.sampled_from(("*", "*", *ARGUMENTS)))
    columns = (SOURCES, TARGETS)
    if extensions:
        columns = (SOURCES | CONJUNCTIONS, TARGETS | CONJUNCTIONS)
    source, target = draw(columns[0]), draw(columns[1])
    action = draw(actions(target, extensions=extensions))
    return f"{service} {argument} {source} {target} {action}"


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Return a policy, with extensions or without."""
    extensions = draw(st.booleans())
    lines = draw(st.lists(rules(extensions=extensions), max_size=8))
    return parse_text("\n".join([OPT_IN if extensions else "# plain", *lines]))


# --- the plain reading of the specification -------------------------------------------------


def same(a: str, b: str, info: SystemInfo) -> bool:
    """Section 10.1."""
    if a.startswith("uuid:") == b.startswith("uuid:"):
        return a == b
    if a.startswith("uuid:"):
        a, b = b, a
    domain = info.get(a)
    return domain is not None and f"uuid:{domain.uuid}" == b


ADMIN = ("dom0", "@adminvm", "uuid:00000000-0000-0000-0000-000000000000")


def matches(token: str, value: str, info: SystemInfo, source: str, *, column: str) -> bool:
    """Sections 10.2 and 10.3, for one part of a token."""
    domain = info.get(value)
    if token == "*":
        return True
    if token == "@anyvm":
        return value not in ADMIN
    if token in ADMIN:
        return value in ADMIN
    if token.startswith("@tag:"):
        return domain is not None and token[5:] in domain.tags
    if token.startswith("@type:"):
        return domain is not None and token[6:] == domain.klass
    if token.startswith("@dispvm:"):
        return column == "target" and disposable(token[8:], value, info, source)
    if token.startswith("@"):
        return value == token
    return not value.startswith("@") and same(token, value, info)


def disposable(wanted: str, value: str, info: SystemInfo, source: str) -> bool:
    """Rule tokens ``@dispvm:X`` and ``@dispvm:@tag:T``."""
    caller = info.get(source)
    base = caller.default_dispvm if caller else None
    if value.startswith("@dispvm:"):
        base = value[8:]
    elif value != "@dispvm":
        return False
    if base is None:
        return False
    if wanted.startswith("@tag:"):
        domain = info.get(base)
        return bool(domain and domain.template_for_dispvms and wanted[5:] in domain.tags)
    return base == wanted if value == "@dispvm" else same(wanted, base, info)


def all_match(parts: tuple[str, ...], *rest: object, column: str) -> bool:
    """A conjunction matches what every part matches."""
    return all(matches(part, *rest, column=column) for part in parts)  # type: ignore[arg-type]


def plain_find(policy: Policy, call: Call, info: SystemInfo) -> Rule | None:
    """The first matching rule, by looking at each."""
    for rule in policy.rules:
        if (
            rule.matches_call(call.request.service, call.request.argument)
            and all_match(rule.source.parts, call.source, info, call.source, column="source")
            and all_match(rule.target.parts, call.target, info, call.source, column="target")
        ):
            return rule
    return None


def expansion(part: str, info: SystemInfo) -> set[str]:
    """The table of section 12."""
    names = {domain.name for domain in info}
    bases = {f"@dispvm:{domain.name}" for domain in info if domain.template_for_dispvms}
    if part == "*":
        return names | bases | {"@dispvm"}
    if part == "@anyvm":
        return (names - {"dom0"}) | bases | {"@dispvm"}
    if part in ("@adminvm", "@dispvm"):
        return {part}
    if part == "@default":
        return set()
    if part.startswith("@dispvm:@tag:"):
        return {f"@dispvm:{d.name}" for d in info if d.template_for_dispvms and part[13:] in d.tags}
    if part.startswith("@dispvm:"):
        base = info.get(part[8:])
        return {f"@dispvm:{base.name}"} if base and base.template_for_dispvms else set()
    if part.startswith("@tag:"):
        return {domain.name for domain in info if part[5:] in domain.tags}
    if part.startswith("@type:"):
        return {domain.name for domain in info if part[6:] == domain.klass}
    domain = info.get(part)
    return {domain.name} if domain else set()


def plain_candidates(policy: Policy, call: Call, info: SystemInfo) -> set[str]:
    """Section 12, step by step."""
    chosen: set[str] = set()
    for rule in reversed(policy.rules):
        if not rule.matches_call(call.request.service, call.request.argument):
            continue
        if not all_match(rule.source.parts, call.source, info, call.source, column="source"):
            continue
        target = rule.action.target
        parts = rule.target.parts if target is None else (target,)
        elements = set.intersection(*(expansion(part, info) for part in parts))
        if rule.action.verb.value == "deny":
            chosen -= elements
        else:
            chosen |= elements
    source = info.get(call.source)
    assert source is not None
    if "@dispvm" in chosen:
        chosen.discard("@dispvm")
        if source.default_dispvm and source.default_dispvm in info:
            chosen.add(f"@dispvm:{source.default_dispvm}")
    if "@adminvm" in chosen:
        chosen.discard("@adminvm")
        chosen.add("dom0")
    chosen -= {source.name, f"uuid:{source.uuid}"}

    def hidden(target: str) -> bool:
        domain = info.get(target.removeprefix("@dispvm:"))
        return domain is not None and domain.internal

    return {target for target in chosen if not hidden(target)}


REQUESTED = st.one_of(
    literals(), BASES, st.sampled_from(["", "@default", "@dispvm", "@adminvm", "@anyvm", "$x"])
)
REQUESTS = st.builds(
    Request,
    st.sampled_from((*SERVICES, "o.Other")),
    st.sampled_from((*ARGUMENTS, "+zz")),
    literals(),
    REQUESTED,
    st.sampled_from((None, None, None, "r", "a")),
)


@FAST
@given(policies(), registries(), st.lists(REQUESTS, min_size=1, max_size=20))
def test_index_gives_what_a_plain_loop_gives(
    policy: Policy, info: SystemInfo, requests: list[Request]
) -> None:
    """The same rule decides, and the same targets are offered."""
    for request in requests:
        call = normalise(request, info)
        if isinstance(call, Deny):
            continue
        assert policy.find(call) is plain_find(policy, call, info)
        if call.source in info:
            assert set(policy.candidates(call, info)) == plain_candidates(policy, call, info)


@FAST
@given(policies(), registries(), st.lists(REQUESTS, max_size=20))
def test_answers_are_pure_and_whole(
    policy: Policy, info: SystemInfo, requests: list[Request]
) -> None:
    """No request raises; the same question has the same answer; an answer can be settled."""
    for request in requests:
        first = policy.evaluate(request, info)
        assert first == policy.evaluate(request, info)
        if isinstance(first, Allow):
            direct(first, info)
        if isinstance(first, Ask):
            assert first.candidates
            assert first.default_target is None or first.default_target in first.candidates
            for candidate in first.candidates:
                chosen = first.chosen(candidate)
                assert isinstance(chosen, Allow)
                direct(chosen, info)


@FAST
@given(st.lists(rules(), max_size=6), st.lists(rules(extensions=True), max_size=6))
def test_parse_print_parse(plain: list[str], extended: list[str]) -> None:
    """The text form reads back as the same rules."""
    for head, lines in (("# plain", plain), (OPT_IN, extended)):
        first = parse_text("\n".join([head, *lines]))
        again = parse_text("\n".join([head, *map(str, first.rules)]))
        assert again.rules == first.rules
        assert [str(rule) for rule in again.rules] == [str(rule) for rule in first.rules]


OPTION_WORDS = """
    allow ask deny Allow target=a target= target=@anyvm target=@dispvm:x default_target=b user=
    user=u=v notify=yes notify=no notify=x autostart=no x=y =z zz via=a+b limit=1/1s #
"""
WORDS = st.sampled_from(OPTION_WORDS.split())


@FAST
@given(st.lists(WORDS, min_size=1, max_size=6))
def test_quick_and_careful_agree(words: list[str]) -> None:
    """The quick reading of options is the careful one, or none."""
    rest = " ".join(words)
    faults: list[str] = []
    line = f"s.S * a b {rest}"
    starts = [line.index(rest) + rest.index(" ".join(words[n:])) for n in range(len(words))]
    careful = parse_action(
        [Word(word, start) for word, start in zip(words, starts, strict=True)],
        line,
        lambda message, start, width: faults.append(message),
        extensions=False,
    )
    try:
        quick = quick_action(rest)
    except ValueError:
        quick = None
    assert quick is None or quick == careful
    assert (careful is None) == bool(faults)
    if careful is not None:
        assert quick == careful


@FAST
@given(st.lists(st.one_of(rules(extensions=True), st.text(max_size=30)), max_size=8))
def test_lines_do_not_influence_each_other(lines: list[str]) -> None:
    """Each line is parsed as if it were alone: what the quick pass remembers changes nothing."""
    lines = [line.replace("\n", "").replace("\r", "") for line in lines]
    together = parse_policy("\n".join([OPT_IN, *lines]), "f").items
    alone = []
    for line in lines:
        alone += parse_policy("\n".join([OPT_IN, line]), "f").items

    def text(item: object) -> str:
        return getattr(item, "message", None) or str(item)

    assert [text(item) for item in together if isinstance(item, Rule)] == [
        text(item) for item in alone if isinstance(item, Rule)
    ]
    assert len(together) == len(alone)


# --- the analysis against asking for everything -------------------------------------------------

UNKNOWN_SOURCES = (*NAMES, "ghost", "nobody at all", *(f"uuid:{uuid_of(n)}" for n in (1, 2, 9)))
UNKNOWN_TARGETS = ("ghost", f"uuid:{uuid_of(9)}", "", "@default")


def everything(info: SystemInfo) -> list[tuple[str, str]]:
    """Return every source and target there is, and some that are not."""
    sources = [domain.name for domain in info if domain.name != "dom0"]
    sources += [name for name in UNKNOWN_SOURCES if name not in info]
    targets = [name for domain in info for name in (domain.name, f"uuid:{domain.uuid}")]
    targets += [f"@dispvm:{name}" for name in targets] + ["@dispvm", "@adminvm"]
    targets += [name for name in UNKNOWN_TARGETS if name not in info]
    targets = [name for name in targets if "None" not in name]
    return [(source, target) for source in sources for target in targets]


CALLS = [(s, a) for s in (*SERVICES, "o.Other") for a in (*ARGUMENTS, "+zz")]


def shown(target: str) -> str:
    """Return what a target is after normalisation, for those that do not exist."""
    return "@default" if target in ("", "ghost", f"uuid:{uuid_of(9)}") else target


@SLOW
@given(policies(), policies(), registries())
def test_diff_is_exact(old: Policy, new: Policy, info: SystemInfo) -> None:
    """Every request that is decided differently is in a class that is reported; no other is."""
    world = World(info, [old, new])
    found = list(changes(old, new, info))
    reported = {(c.call, c.source, target) for c in found for target in c.targets}
    assert len(reported) == sum(len(change.targets) for change in found)
    expected = set()
    for service, argument in CALLS:
        kinds = [
            call
            for call in world.calls
            if (call.service == service or (call.service is None and _unnamed(world, service)))
            and (
                call.argument == argument
                or (call.argument is None and _other(world, service, argument))
            )
        ]
        assert len(kinds) == 1
        for source, target in everything(world.info):
            request = Request(service, argument, source, target)
            before = settle(old.evaluate(request, world.info), world.info)[0]
            after = settle(new.evaluate(request, world.info), world.info)[0]
            member = source if source in world.sources else world.unknown[-1]
            spelled = shown(target) if target not in world.info else target
            if before != after:
                expected.add((kinds[0], member, spelled))
    assert reported == expected
    assert sum(len(g.pairs) > 0 for g in group(found, world)) == len(group(found, world))


def _unnamed(world: World, service: str) -> bool:
    return all(call.service != service for call in world.calls)


def _other(world: World, service: str, argument: str) -> bool:
    named = {call.argument for call in world.calls if call.service == service}
    return argument not in named


@SLOW
@given(policies(), registries(), st.sampled_from(SERVICES), st.sampled_from((None, *ARGUMENTS)))
def test_who_can_is_exact(
    policy: Policy, info: SystemInfo, service: str, argument: str | None
) -> None:
    """Who is listed can, and who can is listed, for every domain and disposable."""
    world = World(info, [policy])
    targets = [domain.name for domain in world.info]
    targets += [f"@dispvm:{domain.name}" for domain in world.info]
    expected: dict[str, set[str]] = {target: set() for target in targets}
    for source, target in everything(world.info):
        for one, other in CALLS:
            resolution = policy.evaluate(Request(one, other, source, target), world.info)
            for reached, relay, carried in _ends(resolution, world.info):
                member = source if source in world.sources else world.unknown[-1]
                if one == service and argument in (None, other):
                    expected.setdefault(reached, set()).add(member)
                exact = carried == f"{service}{argument}" or argument is None
                if relay and carried.partition("+")[0] == service and exact:
                    expected.setdefault(relay, set()).add(member)
    for target in targets:
        found = {way.source for way in who_can(world, policy, service, argument, target)}
        assert found == expected[target], target


def _ends(resolution: Allow | Ask | Deny, info: SystemInfo) -> list[tuple[str, str | None, str]]:
    outcomes: list[Allow | Deny] = []
    if isinstance(resolution, Ask):
        outcomes = [resolution.chosen(candidate) for candidate in resolution.candidates]
    elif isinstance(resolution, Allow):
        outcomes = [resolution]
    ends = []
    for outcome in outcomes:
        assert isinstance(outcome, Allow)
        directed = direct(outcome, info)
        if not isinstance(directed, Deny):
            name = info.to_name(outcome.target)
            assert name is not None
            relay = directed.target if directed.service else None
            ends.append((name, relay, directed.service or ""))
    return ends


@SLOW
@given(policies(), registries())
def test_regions_are_a_partition(policy: Policy, info: SystemInfo) -> None:
    """Each request lies in exactly one region, that of the rule that decides it."""
    world = World(info, [policy])
    for call in world.calls:
        seen: dict[tuple[int, int], Rule | None] = {}
        for region in world.regions(policy, call):
            for s in range(len(world.sources)):
                for t in range(len(world.targets)):
                    if region.sources >> s & 1 and region.targets >> t & 1:
                        assert (s, t) not in seen
                        seen[s, t] = region.rule
        for (s, t), rule in seen.items():
            member = world.call(call, world.sources[s], world.targets[t].text)
            assert policy.find(member) is rule
        applicable = sum(
            target.text != "@dispvm" or target.base == world.base_of(source)
            for source in world.sources
            for target in world.targets
        )
        assert len(seen) == applicable


@SLOW
@given(policies(), registries())
def test_unreachable_rules_decide_nothing(policy: Policy, info: SystemInfo) -> None:
    """What the linter calls unreachable decides no request, with a registry and without."""
    named = {
        (finding.code, finding.line)
        for findings in (lint(policy, info), lint(policy))
        for finding in findings
        if finding.code in ("unreachable", "unreachable-here", "no-match")
    }
    lines = {line for _, line in named}
    world = World(info, [policy])
    for source, target in everything(world.info):
        for service, argument in CALLS:
            found = policy.evaluate(Request(service, argument, source, target), world.info)
            assert found.rule is None or found.rule.line not in lines


@SLOW
@given(policies(), registries())
def test_reaches_are_exact(policy: Policy, info: SystemInfo) -> None:
    """Each way that is listed is a request that ends there, and each such request is listed."""
    world = World(info, [policy])
    found = [
        (way.call, way.source, asked, id(way.rule), way.target, way.relay, way.service)
        for way in reaches(world, policy)
        for asked in way.asked
    ]
    expected = set()
    for call in world.calls:
        for source in world.sources:
            for asked in dict.fromkeys(target.text for target in world.targets):
                request = Request(*call.sample, source, asked)
                resolution = policy.evaluate(request, world.info)
                for name, relay, service in _ends(resolution, world.info):
                    end = (id(resolution.rule), name, relay, service or None)
                    expected.add((call, source, asked, *end))
    assert set(found) == expected
    assert len(found) == len(expected)
