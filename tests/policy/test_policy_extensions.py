"""The extensions of docs/spec/policy.md section 31, and counting for ``limit=``."""

from __future__ import annotations

import logging

import pytest
from tests.policy.test_policy_ask import FakeAgent, settle
from tests.support.policy import FIXTURE, brief, decide, spec_param

from sluice.errors import PolicyError
from sluice.policy.evaluation import Allow, Deny
from sluice.policy.limits import FOLD_SECONDS, CallLimits
from sluice.policy.memory import from_files, parse_text
from sluice.policy.parser import parse_policy
from sluice.policy.problems import PolicySyntaxError
from sluice.policy.response import encode
from sluice.policy.rules import OPT_IN, Hop, Limit, Request, Rule
from sluice.policy.system_info import Domain, SystemInfo
from sluice.policy.tokens import MAX_PARTS

HEAD = OPT_IN + "\n"


def parsed(line: str, *, head: str = HEAD) -> Rule | PolicySyntaxError:
    """Return the first item after the opt-in."""
    return parse_policy(head + line, "f").items[0]  # type: ignore[return-value]


def message(line: str, *, head: str = HEAD) -> str:
    """Return the error of a line, empty if it is good."""
    found = parsed(line, head=head)
    return found.message if isinstance(found, PolicySyntaxError) else ""


@pytest.mark.spec("POL-247")
@pytest.mark.parametrize("head", ["", "\n" + HEAD, " " + HEAD, "#!sluice 2\n", "# sluice 1\n"])
@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("t.S * a b allow via=p+c", "invalid parameters for action Allow: ['via=p+c']"),
        ("t.S * a b ask limit=1/1s", "invalid parameters for action Ask: ['limit=1/1s']"),
        ("t.S * a b deny reason=x", "invalid parameters for action Deny: ['reason=x']"),
        ("t.S * a b deny reason=x y", "invalid action parameter syntax: 'y'"),
        ("t.S * @tag:a,@tag:b b allow", ""),
        ("t.S * @tag:a,b @tag:x,@dispvm allow", ""),
        ("t.S * @anyvm,@tag:b b allow", "invalid source token: '@anyvm,@tag:b'"),
        ("t.S * a,b c allow", ""),
    ],
)
def test_without_opting_in(head: str, line: str, text: str) -> None:
    """As in Qubes: a syntax error, or a literal, or a tag with a comma in its name."""
    assert message(line, head=head) == text


@pytest.mark.spec("POL-247")
def test_opt_in_line() -> None:
    """Its line end may be of any kind, with blanks before it."""
    for head in ("#!sluice 1\r\n", "#!sluice 1\r", "#!sluice 1  \n"):
        assert message("t.S * a b allow via=p+c", head=head) == ""
    assert message("t.S * a b allow via=p+c", head="#!sluice 10\n")


def test_the_opt_in_changes_nothing_else() -> None:
    """Lines without extensions mean the same."""
    for line in ("t.S * a b allow user=via=x", "t.S * @tag:a * deny notify=no"):
        with_head, without = parsed(line), parsed(line, head="")
        assert isinstance(with_head, Rule)
        assert isinstance(without, Rule)
        assert with_head[:5] == without[:5]


@pytest.mark.spec("POL-248")
def test_conjunctions() -> None:
    """What matches every part, and nothing else."""
    info = SystemInfo(
        [
            Domain("both", tags=frozenset({"a", "b"}), template_for_dispvms=True),
            Domain("one", tags=frozenset({"a"}), klass="TemplateVM"),
            Domain("dom0", klass="AdminVM", tags=frozenset({"a", "b"})),
        ]
    )

    def matched(column: str, token: str) -> set[str]:
        found = set()
        for name in ("both", "one", "dom0", "@adminvm", "@dispvm:both", ""):
            source, target = ("one", name) if column == "target" else (name or "x", "one")
            columns = f"* {token}" if column == "target" else f"{token} *"
            if decide(f"{HEAD}t.S * {columns} deny", source, target, info=info).rule:
                found.add(name)
        return found

    assert matched("source", "@tag:a,@tag:b") == {"both", "dom0"}
    assert matched("source", "@tag:b,@tag:a,@anyvm") == {"both"}
    assert matched("source", "@type:AppVM,@tag:a") == {"both"}
    assert matched("target", "@tag:a,@tag:b") == {"both", "dom0"}
    assert matched("target", "@type:TemplateVM,@tag:a") == {"one"}
    assert matched("target", "@dispvm:@tag:a,@dispvm:@tag:b") == {"@dispvm:both"}
    assert matched("target", "@adminvm,*") == {"dom0", "@adminvm"}
    assert matched("target", "@default,@anyvm") == {""}
    assert matched("target", "@default,@adminvm") == set()
    # the same through the candidates of a question
    asked = decide(f"{HEAD}t.S * one @tag:a,@tag:b ask", "one", "both", info=info)
    assert brief(asked, info) == "ask {both,dom0}"


@pytest.mark.spec("POL-248")
@pytest.mark.parametrize(
    ("line", "text", "marked"),
    [
        ("t.S * @tag:a,work b deny", "a name cannot be part of a conjunction: 'work'", "work"),
        ("t.S * a,b c deny", "a name cannot be part of a conjunction: 'a'", "a"),
        ("t.S * @tag:a,@default b deny", "invalid source token: '@default'", "@default"),
        ("t.S * @tag:a,@dispvm b deny", "invalid source token: '@dispvm'", "@dispvm"),
        ("t.S * a @tag:a,@foo deny", "invalid target token: '@foo'", "@foo"),
        ("t.S * a @tag:,@tag:b deny", "invalid empty @tag: token: '@tag:'", "@tag:"),
        ("t.S * @tag:a, b deny", "invalid empty source token", None),
        (
            "t.S * a @default,@anyvm allow",
            "allow action for @default rule must specify target= option",
            "@default,@anyvm",
        ),
    ],
)
def test_bad_conjunctions(line: str, text: str, marked: str | None) -> None:
    """A part that the column does not allow is an error, and is marked."""
    found = parsed(line)
    assert isinstance(found, PolicySyntaxError)
    assert found.message == text
    if marked is not None:
        assert line[found.column - 1 :][: found.width] == marked


@pytest.mark.spec("POL-248")
@pytest.mark.parametrize("column", ["source", "target"])
def test_conjunctions_are_bounded(column: str) -> None:
    """As many parts as anybody writes; more are an error, not a crash of the index."""
    for count in (MAX_PARTS, MAX_PARTS + 1, 5000):
        token = ",".join(f"@tag:t{number}" for number in range(count))
        line = f"t.S * {token} b deny" if column == "source" else f"t.S * a {token} deny"
        if count <= MAX_PARTS:
            assert len(getattr(parse_text(HEAD + line).rules[0], column).parts) == count
            continue
        with pytest.raises(PolicySyntaxError) as caught:
            parse_text(HEAD + line)
        assert caught.value.message == f"a conjunction of {count} parts: at most {MAX_PARTS}"
        assert line[caught.value.column - 1 :][: caught.value.width] == token


@pytest.mark.spec("POL-248")
def test_conjunction_with_default_after_a_good_action() -> None:
    """What the quick pass knows does not let row 15 be passed by."""
    text = HEAD + ("t.S * a @default,@anyvm deny\nt.S * a b allow\nt.S * a @default,@anyvm allow\n")
    errors = [item for item in parse_policy(text, "f").items if not isinstance(item, Rule)]
    assert [error.line for error in errors] == [4]


@pytest.mark.spec("POL-249")
def test_via() -> None:
    """Proxies and chains, in order; on allow and ask."""
    for verb in ("allow", "ask"):
        rule = parsed(f"t.S * a b {verb} via=p+one-way,@dispvm:d+x.y_Z user=u")
        assert isinstance(rule, Rule)
        assert rule.action.via == (Hop("p", "one-way"), Hop("@dispvm:d", "x.y_Z"))
    found = decide(f"{HEAD}t.S * work vault allow via=sys-usb+c", "work", "vault")
    assert found.via == (Hop("sys-usb", "c"),)
    assert decide("t.S * work vault allow", "work", "vault").via == ()


@pytest.mark.spec("POL-249")
@pytest.mark.parametrize(
    ("word", "marked"),
    [
        ("via=", None),
        ("via=p", "p"),
        ("via=p+", None),
        ("via=+c", "+c"),
        ("via=p+c,", None),
        ("via=p+c,q", "q"),
        ("via=p+c d", None),
        ("via=p+a/b", "a/b"),
        ("via=@dispvm+c", "@dispvm+c"),
        ("via=@tag:x+c", "@tag:x+c"),
        ("via=uuid:x+c", "uuid:x+c"),
        ("via=1p+c", "1p+c"),
        ("via=p+" + "c" * 65, "c" * 65),
        ("via=" + "p" * 32 + "+c", "p" * 32 + "+c"),
        ("via=p+c+d", "c+d"),
    ],
)
def test_bad_via(word: str, marked: str | None) -> None:
    """Anything else is an error with its column."""
    line = f"t.S * a b allow {word}"
    found = parsed(line)
    assert isinstance(found, PolicySyntaxError)
    assert found.column > len("t.S * a b allow")
    if marked is not None:
        assert line[found.column - 1 :][: found.width] == marked


@pytest.mark.spec("POL-249", "POL-250")
@pytest.mark.parametrize("option", ["via=p+c", "limit=1/1s"])
def test_not_on_deny(option: str) -> None:
    """A denied call passes nothing."""
    expected = f"invalid parameters for action Deny: ['{option}']"
    assert message(f"t.S * a b deny {option}") == expected
    assert message(f"t.S * a b allow {option} {option}").startswith("parameter given twice")


@pytest.mark.spec("POL-250")
@pytest.mark.parametrize(
    ("word", "limit"),
    [
        ("5/10s", Limit(5, 10, "5/10s")),
        ("1/2m", Limit(1, 120, "1/2m")),
        ("10/1h", Limit(10, 3600, "10/1h")),
        ("3/7d", Limit(3, 604800, "3/7d")),
        *[(bad, None) for bad in (
            "", "5", "5/", "/1h", "0/1h", "-1/1h", "1/0s", "1/1", "1/1w", "1/h", "1.5/1h",
            "1/1h1m", "5 /1h", "٣/1h", "1/400d", "99999999/1h",
        )],
    ],
)  # fmt: skip
def test_limit(word: str, limit: Limit | None) -> None:
    """N/DURATION with s, m, h, d; nothing else."""
    found = parsed(f"t.S * a b allow limit={word}")
    assert (found.action.limit if isinstance(found, Rule) else None) == limit


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limited(text: str, source: str = "work") -> Allow:
    """Return an allowed call of a limited rule."""
    found = decide(HEAD + f"t.S * @anyvm vault allow {text}", source, "vault")
    assert isinstance(found, Allow)
    return found


@pytest.mark.spec("POL-250")
def test_any_interval() -> None:
    """No interval of the duration has more than N calls, however it is laid."""
    clock = Clock()
    limits = CallLimits(clock)
    call = limited("limit=3/10s")
    passed = []
    for _ in range(200):
        if limits.take(call).passed:
            passed.append(clock.now)
        clock.now += 0.7
    for start in passed:
        assert sum(1 for at in passed if start <= at < start + 10) <= 3
    assert len(passed) >= 40  # and no fewer than the limit allows


@pytest.mark.spec("POL-250")
def test_each_source_counts_for_itself() -> None:
    """One source's calls do not use up another's, nor one rule's another's."""
    limits = CallLimits(Clock())
    assert limits.take(limited("limit=1/1h")).passed
    assert not limits.take(limited("limit=1/1h")).passed
    assert limits.take(limited("limit=1/1h", "mail")).passed
    assert limits.take(limited("limit=1/2h")).passed
    assert limits.take(limited("")).passed
    moved = decide(HEAD + "\n\nt.S * @anyvm vault allow limit=1/1h", "work", "vault")
    assert isinstance(moved, Allow)
    assert not limits.take(moved).passed  # the same rule, three lines further down


@pytest.mark.spec("POL-250")
def test_refusals_are_folded() -> None:
    """The first is logged; the others are counted, and the count comes with the next."""
    clock = Clock()
    limits = CallLimits(clock)
    call = limited("limit=1/1h")
    limits.take(call)
    denied, verdict = limits.apply(call)
    assert isinstance(denied, Deny)
    assert (denied.cause, denied.notify, verdict.log) == ("limit", False, True)
    assert "policy:2" in denied.message
    assert verdict.retry_after == 3600
    assert [limits.take(call).log for _ in range(50)] == [False] * 50
    clock.now += FOLD_SECONDS
    verdict = limits.take(call)
    assert (verdict.log, verdict.folded) == (True, 50)
    clock.now += 3600
    assert limits.apply(call)[0] is call


@pytest.mark.spec("POL-250")
def test_memory_of_limits_is_bounded() -> None:
    """Sources come and go; what holds nobody back any more is forgotten."""
    clock = Clock()
    limits = CallLimits(clock, max_keys=10)
    info = SystemInfo([Domain("vault")])

    def call(number: int) -> Allow:
        rules = HEAD + "t.S * @anyvm vault allow limit=1/10s"
        found = decide(rules, f"disp{number}", "vault", info=info)
        assert isinstance(found, Allow)
        return found

    assert all(limits.take(call(number)).passed for number in range(10))
    assert not limits.take(call(10)).passed
    clock.now += 10
    assert limits.take(call(11)).passed
    assert len(limits) <= 10


@pytest.mark.spec("POL-251")
def test_reason_takes_the_rest() -> None:
    """The text as it stands; nothing after it is an option."""
    rule = parsed("t.S * a b allow user=u reason=see  ticket 5, notify=yes # all of it  ")
    assert isinstance(rule, Rule)
    assert rule.action.reason == "see  ticket 5, notify=yes # all of it"
    assert (rule.action.user, rule.action.notify) == ("u", False)
    assert isinstance(parsed("t.S * a b deny reason="), Rule)
    assert isinstance(parsed("t.S * a b deny notify=no reason=x"), Rule)


@pytest.mark.spec("POL-251")
def test_reason_is_for_the_operator(caplog: pytest.LogCaptureFixture) -> None:
    """In the log, escaped; never in the answer."""
    rules = HEAD + "t.S * work vault allow reason=why \x1b[31mnot\nt.S * work mail deny reason=no!"
    caplog.set_level(logging.INFO, "policy")
    found = settle(rules, "work", "vault", FakeAgent())
    assert found.resolution.reason == "why \x1b[31mnot"
    assert "why" not in found.text
    assert "why \\x1b[31mnot" in caplog.text
    assert "\x1b" not in caplog.text
    denied = settle(rules, "work", "mail", FakeAgent())
    assert denied.text == "result=deny"
    assert "(no!)" in caplog.text
    allow = decide(rules, "work", "vault")
    assert isinstance(allow, Allow)
    assert "why" not in encode(allow, FIXTURE)


EXTENDED = "t.S * a b allow limit=1/1s"


@pytest.mark.spec("POL-252")
def test_files_opt_in_each_for_itself() -> None:
    """Neither a neighbour nor an include is read differently."""
    with pytest.raises(PolicyError) as caught:
        from_files({"/p/a.policy": HEAD + EXTENDED, "/p/b.policy": EXTENDED}, ("/p",))
    assert str(caught.value).startswith("/p/b.policy:1: invalid parameters")
    with pytest.raises(PolicyError) as caught:
        from_files({"/p/a.policy": HEAD + "!include i", "/p/i": EXTENDED}, ("/p",))
    assert str(caught.value).startswith("/p/i:1: invalid parameters")


@pytest.mark.spec("POL-252")
@pytest.mark.parametrize(
    ("directive", "included"),
    [
        ("!include i", "/p/i"),
        ("!include-dir sub", "/p/sub/x.policy"),
        ("!include-service t.S * i", "/p/i"),
    ],
)
def test_opted_in_include(directive: str, included: str) -> None:
    """Allowed from a file that opts in; otherwise an error at the directive."""
    files = {included: HEAD + "# nothing more\n"}
    assert not from_files({**files, "/p/a.policy": HEAD + directive}, ("/p",)).rules
    with pytest.raises(PolicySyntaxError) as caught:
        from_files({**files, "/p/a.policy": "\n" + directive}, ("/p",))
    assert str(caught.value).startswith("/p/a.policy:2: ")
    assert "extensions" in str(caught.value)


@pytest.mark.spec("POL-252")
def test_opted_in_include_two_levels_down() -> None:
    """The parent counts, not the top-level file."""
    files = {"/p/a.policy": HEAD + "!include i", "/p/i": "!include j", "/p/j": HEAD}
    with pytest.raises(PolicySyntaxError) as caught:
        from_files(files, ("/p",))
    assert str(caught.value).startswith("/p/i:1: ")


CASES = [
    spec_param("249", "via=p+c", "via=p+c"),
    spec_param("250", "limit=1/1s  via=p+c", "via=p+c limit=1/1s"),
    spec_param("251", "reason=a  b", "reason=a  b"),
]


@pytest.mark.parametrize(("options", "text"), CASES)
def test_text_form(options: str, text: str) -> None:
    """After the options of Qubes, the reason last."""
    rule = parsed(f"t.S * a b allow {options}")
    assert isinstance(rule, Rule)
    assert str(rule) == f"t.S\t*\ta\tb\tallow {text}"
    assert rule.uses_extensions()


def test_request_of_a_limited_rule_is_pure() -> None:
    """Evaluating counts nothing."""
    policy = parse_text(HEAD + "t.S * work vault allow limit=1/1h")
    request = Request.of("t.S", "work", "vault")
    assert policy.evaluate(request, FIXTURE) == policy.evaluate(request, FIXTURE)
