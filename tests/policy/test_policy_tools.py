"""explain, lint, tables of cases, reach, diff and graph: what people are told."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tests.support.policy import FIXTURE, brief, expand

from sluice.errors import ConfigError
from sluice.policy import shipped
from sluice.policy.cases import coverage, parse_table, run_case
from sluice.policy.classes import UNKNOWN, World
from sluice.policy.difference import changes_in, group
from sluice.policy.drawing import to_dot, to_html, to_svg
from sluice.policy.evaluation import Deny, Policy
from sluice.policy.explain import explain
from sluice.policy.findings import Severity
from sluice.policy.graph import Common, Edge, Graph, Member, Node, build
from sluice.policy.lint import lint
from sluice.policy.lint_lines import lint_text
from sluice.policy.memory import from_files, parse_text
from sluice.policy.reach import what_can, who_can
from sluice.policy.rules import OPT_IN, Request
from sluice.policy.system_info import Domain, SystemInfo

HEAD = OPT_IN + "\n"


def why(rules: str, source: str, target: str, call: str = "t.S") -> list[str]:
    """Return the reasons why the rules that came near did not decide."""
    found = explain(parse_text(expand(rules)), Request.of(call, source, expand(target)), FIXTURE)
    return [reason for near in found.near for reason in near.reasons]


@pytest.mark.parametrize(
    ("rule", "source", "target", "reason"),
    [
        ("t.S +a work vault allow", "work", "vault", "argument is +, not +a"),
        ("t.S * mail vault allow", "work", "vault", "source is work, not mail"),
        ("t.S * ghost vault allow", "work", "vault",
         "source is work, not ghost, which does not exist"),
        ("t.S * @tag:usb vault allow", "work", "vault",
         "source work lacks the tag usb (it has office)"),
        ("t.S * @tag:usb vault allow", "vault", "vault",
         "source vault lacks the tag usb (it has no tag at all)"),
        ("t.S * @type:TemplateVM vault allow", "work", "vault",
         "source work has class AppVM, not TemplateVM"),
        ("t.S * @dispvm:dvm-web vault allow", "work", "vault",
         "source @dispvm:dvm-web never matches: a running disposable has a name and tags of its "
         "own"),
        ("t.S * work @anyvm allow", "work", "dom0",
         "target is dom0, and @anyvm is everything but dom0"),
        ("t.S * work dom0 allow", "work", "vault", "target is vault, not dom0"),
        ("t.S * work @default allow target=vault", "work", "vault",
         "target is vault: @default matches only calls that name no existing target"),
        ("t.S * work @dispvm allow", "work", "vault", "target is vault, not a new disposable"),
        ("t.S * work @dispvm allow", "work", "@dispvm:dvm-web",
         "target is @dispvm:dvm-web: @dispvm matches only the plain keyword"),
        ("t.S * work @dispvm:dvm-off allow", "work", "@dispvm",
         "target the base of @dispvm is dvm-web, not dvm-off"),
        ("t.S * vault @dispvm:dvm-off allow", "vault", "@dispvm",
         "target is @dispvm and vault has no default disposable base"),
        ("t.S * work @dispvm:@tag:x allow", "work", "@dispvm",
         "target the base of @dispvm is dvm-web, which lacks the tag x (it has dvm-ok)"),
        ("t.S * odd @dispvm:@tag:x allow", "odd", "@dispvm",
         "target the base of @dispvm is vault, which is no disposable base"),
        ("t.S * work @dispvm:U(dvm-web) allow", "work", "@dispvm",
         "target is @dispvm: a base named by UUID matches only when it is named"),
        ("t.S * work @tag:x allow", "work", "@adminvm",
         "target @adminvm is a keyword or unknown, and has no tag x"),
    ],
)  # fmt: skip
def test_reasons(rule: str, source: str, target: str, reason: str) -> None:
    """Why the only rule does not decide the call."""
    assert why(rule, source, target) == [reason]


def test_reasons_of_a_conjunction() -> None:
    """Each part that is missing, and only those."""
    rules = HEAD + "t.S * @tag:office,@tag:usb,@type:TemplateVM vault allow"
    assert why(rules, "work", "vault") == [
        "source work lacks the tag usb (it has office)",
        "source work has class AppVM, not TemplateVM",
    ]


def test_explain() -> None:
    """The decision, where it goes, and the rules that come too late."""
    rules = "t.S * work vault allow\nt.S * work @anyvm deny\nu.S * * * allow\nt.S * mail vault deny"
    found = explain(parse_text(rules), Request.of("t.S", "work", "vault"), FIXTURE)
    assert found.resolution.place == ("policy", 1)
    assert [rule.line for rule in found.overruled] == [2]
    assert [near.rule.line for near in found.near] == [4]
    assert found.direction is not None
    assert found.direction.target == "vault"
    loop = explain(parse_text("* * * * allow"), Request.of("t.S", "work", "work"), FIXTURE)
    assert isinstance(loop.resolution, Deny)
    assert loop.resolution.cause == "LOOPBACK"
    nothing = explain(parse_text("T.s * * * allow"), Request.of("t.S", "x", "vault"), FIXTURE)
    assert any("no rule speaks of" in note for note in nothing.notes)
    assert any("differs in case only" in note for note in nothing.notes)
    assert any("not in the registry" in note for note in nothing.notes)
    refused = explain(parse_text(""), Request.of("t.S", "work", "@tag:x"), FIXTURE)
    assert refused.resolution.cause == "BAD-TARGET"


def notes(rules: str, source: str, target: str, requested: str | None = None) -> str:
    """Return what an explanation adds to the decision."""
    request = Request.of("t.S", source, expand(target), requested)
    return "\n".join(explain(parse_text(rules), request, FIXTURE).notes)


def test_notes() -> None:
    """What a person would not think of: misspelt names, nobody to ask, whose rules count."""
    assert "did you mean vault?" in notes("t.S * work vault ask", "work", "valut")
    assert "did you mean work?" in notes("t.S * work vault ask", "wrok", "vault")
    assert notes("t.S * work vault ask", "work", "vault") == ""
    # policy.md 16.2: without a GuiVM a question is a refusal
    assert "rem1 has no GuiVM" in notes("t.S * rem1 work ask", "relay", "work", "rem1")
    assert "decided as a call of rem1" in notes("t.S * rem1 work allow", "relay", "work", "rem1")
    assert "@dispvm:NAME" in notes("t.S * work vault ask", "work", "@tag:x")


def codes(rules: str, info: SystemInfo | None = FIXTURE, **more: object) -> set[tuple[int, str]]:
    """Return line and code of each finding."""
    policy = parse_text(expand(rules))
    return {(f.line or 0, f.code) for f in lint(policy, info, **more)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("t.S * work @anyvm deny\nt.S +a work vault allow", {(2, "unreachable")}),
        ("* * @anyvm @anyvm deny\nt.S +a work vault allow", {(2, "unreachable")}),
        ("t.S * @tag:office * deny\nt.S * work vault allow", {(2, "unreachable")}),
        ("t.S * work dom0 deny\nt.S * work @adminvm allow", {(2, "unreachable")}),
        ("t.S * work U(vault) deny\nt.S * work vault allow", {(2, "unreachable")}),
        ("t.S * work @dispvm:@tag:dvm-ok deny\nt.S * work @dispvm:dvm-web allow",
         {(2, "unreachable")}),
        ("t.S * work vault deny\nt.S * work @anyvm deny", set()),
        ("t.S * work @dispvm:U(dvm-web) deny\nt.S * work @dispvm:dvm-web deny", set()),
        ("t.S * @tag:office vault deny\nt.S * @tag:usb vault deny\nt.S * work vault allow",
         {(3, "unreachable")}),
        ("t.S * work vault deny\nt.S * mail vault deny\nt.S * @tag:office vault allow",
         {(3, "unreachable-here")}),
        ("t.S * ghost vault allow", {(1, "unknown-domain")}),
        ("t.S * work @dispvm:ghost allow", {(1, "unknown-domain")}),
        ("t.S * @tag:nobody vault allow", {(1, "unknown-tag")}),
        ("t.S * @type:Appvm vault allow", {(1, "unknown-class")}),
        ("t.S * work vault allow target=ghost", {(1, "bad-redirect")}),
        ("t.S * work vault allow target=@dispvm:vault", {(1, "bad-redirect")}),
        ("t.S * vault work allow target=@dispvm", {(1, "bad-redirect")}),
        ("t.S * work vault allow target=@dispvm", set()),
        ("t.S * work vault allow target=work", {(1, "bad-redirect")}),
        ("t.S * work vault allow target=rem2", {(1, "bad-redirect")}),
        ("t.S * work vault allow target=rem1", set()),
        ("t.S * work vault ask default_target=ghost", {(1, "bad-redirect")}),
        ("* * work vault allow", {(1, "wildcard")}),
        ("* * work vault deny", set()),
        ("t.S * work * allow", {(1, "wildcard")}),
        ("qubes.VMShell * @anyvm vault allow", {(1, "wildcard")}),
        ("qubes.VMShell * work @anyvm allow", {(1, "wildcard")}),
        ("qubes.VMShell * work vault allow", set()),
        ("qrexec-proxy * work vault allow", {(1, "wildcard")}),
        ("qrexec-proxy +c+dst+s work vault allow", set()),
        ("t.S * $anyvm vault allow", {(1, "old-keyword"), (1, "unknown-domain")}),
        ("t.S * work dispvm allow", {(1, "old-keyword"), (1, "unknown-domain")}),
        ("t.S * @dispvm:dvm-web vault allow", {(1, "no-match")}),
        ("qubes.FileCopy * work vault ask", {(1, "unknown-service")}),
        (HEAD + "t.S * work vault allow via=ghost+c", {(2, "unknown-domain")}),
        (HEAD + "t.S * work vault allow via=work+c", {(2, "via-self")}),
        (HEAD + "t.S * work vault allow via=dom0+c", {(2, "via-dom0")}),
    ],
)  # fmt: skip
def test_lint(rules: str, expected: set[tuple[int, str]]) -> None:
    """What the linter says of rules, with the registry of the fixture."""
    assert codes(rules) == expected


def test_lint_names_what_shadows() -> None:
    """The rule in front, and for several, all of them."""
    rules = "t.S * work vault deny\nt.S * mail vault deny\nt.S * @tag:office vault allow"
    (finding,) = lint(parse_text(rules), FIXTURE)
    assert finding.related == ("policy:1", "policy:2")
    (finding,) = lint(parse_text("t.S * * * deny\n\nt.S +a work vault ask"))
    assert (finding.line, finding.related) == (3, ("policy:1",))
    assert str(finding).startswith("policy:3: warning: unreachable: policy:1 covers it")


def test_lint_of_a_file_that_is_included_for_several_services() -> None:
    """What holds for all of them is said once; what holds for some names these."""
    files = {
        "/p/a.policy": "t.B * work mail deny\n"
        + "".join(f"!include-service t.{name} * i\n" for name in "ABC"),
        "/p/i": "work mail allow\nwork vualt allow\nwork mail ask\n",
    }
    found = [str(finding) for finding in lint(from_files(files, ("/p",)), FIXTURE)]
    assert found == [
        "/p/i:2: warning: target: there is no domain vualt [unknown-domain]",
        "/p/i:3: warning: unreachable: /p/i:1 covers it wholly (for t.A *, t.C *) [unreachable]",
        "/p/i:1: warning: unreachable: /p/a.policy:1 covers it wholly (for t.B *) [unreachable]",
        "/p/i:3: warning: unreachable: /p/a.policy:1 covers it wholly (for t.B *) [unreachable]",
    ]


def test_lint_services() -> None:
    """Against the services that exist, where they are known."""
    rules = "t.S * work vault ask\nqubes.Filecopy * work vault ask\nmy.Own * work vault ask"
    assert codes(rules, services={"t.S"}) == {(3, "unknown-service")}
    assert codes(rules) == set()


def test_lint_where_only_the_services_of_dom0_are_known() -> None:
    """Nothing is said of what other domains may offer."""
    rules = (
        "t.S * work dom0 allow\nmy.Own * work @adminvm allow\nmy.Own * work vault allow\n"
        "my.Own * work @default allow target=dom0\nmy.Own * mail @default ask\n"
    )
    found = codes(rules, services={"t.S"}, everywhere=False)
    assert found == {(2, "unknown-service"), (4, "unknown-service")}


def test_lint_without_a_registry() -> None:
    """Nothing is said of names that nobody can check."""
    assert codes("t.S * ghost @tag:nobody allow target=gone", None) == set()


def test_shared_proxies() -> None:
    """Sources of different labels that share one, explicitly or by via=."""
    red = dataclasses.replace(FIXTURE.domains["mail"], label="0xff0000")
    info = SystemInfo([*FIXTURE, red])
    rules = HEAD + (
        "t.S * work vault allow via=sys-usb+c\nqrexec-proxy +c+d+s mail sys-usb allow\n"
    )
    assert codes(rules, info) == {(2, "shared-proxy")}
    assert codes(rules) == set()  # there all labels are the same


def test_lint_lines() -> None:
    """Each line alone: includes are not followed, and their places are judged (21.2)."""
    text = (
        b"!include ok\n!include include/ok\n!include /abs/x\n!include include/a/b\n"
        b"!include ../x\n!include include/..\n!include-dir anywhere\nbad\n\n# c\n!compat-4.0\n"
    )
    found = lint_text(text, "f")
    errors = [f for f in found if f.severity is Severity.ERROR]
    assert [(f.line, f.message.split()[0]) for f in errors] == [
        (3, "invalid"), (4, "invalid"), (5, "invalid"), (6, "invalid"), (8, "wrong"),
    ]  # fmt: skip
    assert errors[0].message.startswith("invalid path /abs/x")
    assert str(errors[-1]) == "f:8: error: wrong number of fields"
    assert [f.code for f in found if f.severity is Severity.WARNING] == ["deprecated"]
    service = lint_text(b"$anyvm b allow\n!include x\nt.S * a b deny\n", "f", service_format=True)
    assert [f.line for f in service] == [3]
    assert [f.code for f in lint_text(b"#!sluice 2\n", "f")] == ["opt-in"]


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        ("t.S work vault allow", "SERVICE ARGUMENT SOURCE TARGET ACTION"),
        ("t.S+x * work vault allow", "SERVICE +ARGUMENT"),
        ("t:S * work vault allow", "letters, digits"),
        ("t.S +a/b work vault allow", "letters, digits"),
        ("t.S x work vault allow", "+ARGUMENT, + alone for none"),
        ("t.S * @default vault allow", "a source is a name"),
        ("t.S * work @foo allow", "@dispvm:NAME"),
        ("t.S * work vault allow target=@anyvm", "one domain"),
        ("t.S * work vault allow target=", "one domain"),
        ("t.S * work vault permit", "allow, ask or deny"),
        ("t.S * work vault allow,user=x", "separated by spaces"),
        ("t.S * work vault allow # why", "a line of its own"),
        ("t.S * work vault allow notify", "KEY=VALUE"),
        ("t.S * work vault deny user=x", "deny takes notify="),
        ("t.S * work vault allow default_target=x", "allow takes target="),
        ("t.S * work vault allow via=p+c", "#!sluice 1"),
        ("t.S * work vault deny via=p+c", "deny takes notify="),
        ("t.S * work vault deny reason=x", "#!sluice 1"),
        ("t.S * work @default allow", "names no target"),
        ("!bogus", "!include-service"),
        ("!include a b", "!include PATH"),
        ("t.S * work @tag: deny", ""),
    ],
)
def test_hints(line: str, advice: str) -> None:
    """What an error says is followed by what to write instead."""
    finding = lint_text(line.encode(), "f")[0]
    assert finding.severity is Severity.ERROR
    assert advice in finding.hint
    assert bool(finding.hint) == bool(advice)


TABLE = """
# a comment
!policy policies
!domain dom0
!domain a tags=x,y running=yes default_dispvm=d
!domain b label=0xff0000
!domain d base=yes
a  b  t.S      allow target=b user=u notify=no autostart=yes rule=p.policy:1
a  -  t.S      ask   targets=b,d default=- offers=b
a  b  t.S+q    deny  cause=NO-MATCH notify=yes
"""


def test_cases() -> None:
    """Cases hold or fail one by one; the rules that decided are counted."""
    table = parse_table(TABLE, "t")
    info = SystemInfo(table.domains)
    policy = from_files(
        {"/x/p.policy": "t.S + a b allow user=u\nt.S + a @default ask\nt.S + a d allow\n"},
        ("/x",),
    )
    results = [run_case(case, policy, info) for case in table.cases]
    assert [failure for failure, _ in results] == [None, None, None]
    found = coverage(policy, [rule for _, rule in results])
    assert found.percent == pytest.approx(200 / 3)
    assert [rule.line for rule in found.missed] == [3]


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("a b t.S deny", "deny expected, allow decided"),
        ("a b t.S allow target=d", "target=d expected, 'b' found"),
        ("a b t.S allow user=root", "user=root expected, 'u' found"),
        ("a b t.S allow notify=yes", "notify=yes expected, 'no' found"),
        ("a - t.S ask targets=b", "targets=b expected, 'b,d' found"),
        ("a - t.S ask offers=a", "offers=a expected, 'b,d' found"),
        ("a - t.S ask default=b", "default=b expected, '-' found"),
        ("a b t.S allow rule=p.policy:2", "rule=p.policy:2 expected, '/x/p.policy:1' found"),
        ("a b t.S allow cause=NO-MATCH", "cause=NO-MATCH expected, 'RULE' found"),
    ],
)
def test_failing_cases(case: str, wrong: str) -> None:
    """What was expected, and what came."""
    table = parse_table(TABLE, "t")
    info = SystemInfo(table.domains)
    files = {"/x/p.policy": "t.S + a b allow user=u\nt.S + a @default ask\nt.S + a d allow\n"}
    failure, _ = run_case(parse_table(case, "t").cases[0], from_files(files, ("/x",)), info)
    assert failure is not None
    assert failure.wrong == (wrong,)


@pytest.mark.parametrize(
    "line",
    ["a b", "a b t.S maybe", "a b t.S allow x=y", "a b t.S allow user=a user=b", "!x", "!domain",
     "!domain a running=maybe", "!policy a b"],
)  # fmt: skip
def test_wrong_tables(line: str) -> None:
    """An error with the line of the table."""
    with pytest.raises(ConfigError) as caught:
        parse_table(f"\n\n{line}\n", "t")
    assert (caught.value.file, caught.value.line) == ("t", 3)


@pytest.mark.spec("POL-244")
def test_shipped_policies() -> None:
    """The table that comes with them holds, but for the Admin API it uses every rule."""
    table = parse_table(shipped.CASES.read_text(), str(shipped.CASES))
    files = {f"/p/{name}": content for name, content in shipped.shipped_files().items()}
    policy = from_files(files, ("/p",))
    info = SystemInfo(table.domains)
    results = [run_case(case, policy, info) for case in table.cases]
    assert [failure for failure, _ in results if failure] == []
    missed = coverage(policy, [rule for _, rule in results]).missed
    assert [rule.place for rule in missed if not rule.service.startswith("admin.")] == []


def test_shipped_admin_denials() -> None:
    """Every method of the Admin API is denied to everybody, silently."""
    text = (Path(__file__).parents[2] / "docs/spec/core-stack.md").read_text()
    names = _admin_methods(text)
    assert len(names) > 70
    files = {f"/p/{name}": content for name, content in shipped.shipped_files().items()}
    policy = from_files(files, ("/p",))
    for name in names:
        for target in ("dom0", "@adminvm", "vault", "", "@dispvm"):
            found = policy.evaluate(Request.of(name, "work", target), FIXTURE)
            assert brief(found) == "deny POLICY-DENY silent", name


def _admin_methods(text: str) -> set[str]:
    """Return the methods of the call table of core-stack.md 6.6."""
    import re

    table = text[text.index("### 6.6 Call table") : text.index("### 6.7 Value forms")]
    names: set[str] = set()
    for cell in re.findall(r"^\| (`admin[^|]*) \|", table, re.MULTILINE):
        spelled = [word.strip("`") for word in re.split(r"[ ,]+", cell.replace("`", "")) if word]
        first = spelled[0]
        stem = first.rpartition(".")[0]
        for word in spelled:
            full = word if word.startswith("admin.") else f"{stem}.{word.lstrip('.')}"
            if full.endswith(".CLASS"):
                names |= {full.replace("CLASS", klass) for klass in ("AppVM", "DispVM")}
            else:
                names.add(full)
    return names


def test_compat_file_is_left_out() -> None:
    """It denies everything where there is no legacy directory."""
    assert "35-compat.policy" not in shipped.shipped_files()
    assert shipped.shipped_files(compat=True)["35-compat.policy"].endswith(b"!compat-4.0\n")
    assert "README" in shipped.shipped_files()


def test_shipped_policies_are_clean() -> None:
    """The linter has nothing to say of them."""
    files = {f"/p/{name}": content for name, content in shipped.shipped_files().items()}
    policy = from_files(files, ("/p",))
    net = Domain("sys-net", klass="AppVM", uuid="n")
    assert lint(policy) == []
    assert lint(policy, SystemInfo([*FIXTURE, net])) == []


REACH = """\
svc.Open * work mail allow
svc.Open * mail @default allow target=vault
svc.Copy * vault @dispvm:dvm-web ask
svc.Up * @type:DispVM sys-usb allow
far.S * work rem1 allow
"""


def test_who_can() -> None:
    """By name, by redirect, by question, as a disposable, through a relay."""
    policy = parse_text(REACH)
    world = World(FIXTURE, [policy])

    def who(service: str, domain: str) -> set[str]:
        return {way.source for way in who_can(world, policy, service, None, domain)}

    assert who("svc.Open", "mail") == {"work"}
    assert who("svc.Open", "vault") == {"mail"}
    assert who("svc.Copy", "@dispvm:dvm-web") == {"vault"}
    assert who("svc.Up", "sys-usb") == {"disposable of dvm-web", "disposable of dvm-off"}
    assert who("far.S", "rem1") == {"work"}
    assert who("x.Transport", "relay") == {"work"}
    assert who("svc.Open", "work") == set()
    everybody = parse_text("* * * vault allow")
    world = World(FIXTURE, [everybody])
    assert UNKNOWN in {way.source for way in who_can(world, everybody, "x", None, "vault")}


def test_what_can() -> None:
    """Directly, and through what is reached; the worst case."""
    policy = parse_text(REACH)
    world = World(FIXTURE, [policy])
    steps = {step.domain: step for step in what_can(world, policy, "work")}
    assert {name: step.depth for name, step in steps.items()} == {
        "mail": 1, "rem1": 1, "relay": 1, "vault": 2, "@dispvm:dvm-web": 3, "sys-usb": 4,
    }  # fmt: skip
    assert [way.target for way in steps["sys-usb"].path] == [
        "mail", "vault", "@dispvm:dvm-web", "sys-usb",
    ]  # fmt: skip
    assert {s.domain for s in what_can(world, policy, "work", through=False)} == {
        "mail", "rem1", "relay",
    }  # fmt: skip
    assert {s.domain for s in what_can(world, policy, "work", ask=False)} == {
        "mail", "rem1", "relay", "vault",
    }  # fmt: skip


def test_what_can_counts_proxies_and_relays() -> None:
    """What passes the bytes of a call is reached by it; the path names whom it goes through."""
    policy = parse_text(
        HEAD + "t.V * work vault allow via=sys-usb+c,@dispvm:dvm-web+d\nt.U * sys-usb mail allow\n"
        "t.D * @type:DispVM tmpl allow\nfar.S * work rem1 allow\nt.R * relay odd allow\n"
    )
    world = World(FIXTURE, [policy])
    steps = {step.domain: step for step in what_can(world, policy, "work")}
    assert {name: step.depth for name, step in steps.items()} == {
        "vault": 1, "sys-usb": 1, "@dispvm:dvm-web": 1, "rem1": 1, "relay": 1,
        "mail": 2, "tmpl": 2, "odd": 2,
    }  # fmt: skip
    through = {name: [way.source for way in step.path] for name, step in steps.items()}
    assert through["mail"] == ["work", "sys-usb"]
    assert through["odd"] == ["work", "relay"]
    assert through["tmpl"] == ["work", "disposable of dvm-web"]


def differ(old: str, new: str) -> list[tuple[tuple[str, ...], str, str, set[tuple[str, str]]]]:
    """Return the groups of a difference."""
    policies = [parse_text(old), parse_text(new)]
    world = World(FIXTURE, policies)
    return [(g.calls, g.old, g.new, set(g.pairs)) for g in group(list(changes_in(world)), world)]


def test_diff() -> None:
    """Each group with its calls, its words, and all its pairs."""
    assert differ("t.S * work vault allow", "t.S * work vault allow\n") == []
    assert differ("t.S * work vault allow", "* * work vault deny\nt.S * work mail deny") == [
        (("t.S+*",), "allow", "deny", {("work", "vault")})
    ]
    assert differ("", "t.S +a ghost vault allow user=u\nu.S * ghost vault allow user=u") == [
        (
            ("t.S+a", "u.S+*"),
            "deny",
            "allow user=u",
            {("ghost (not in the registry)", "vault")},
        )
    ]
    assert differ("t.S * work @tag:office ask", "t.S * work @tag:office ask\nt.S * work vault ask")[
        0
    ][:3] == (("t.S+*",), "ask", "ask +vault")
    assert differ("t.S * work vault deny", "t.S * work vault deny notify=no") == [
        (("t.S+*",), "deny", "deny notify=no", {("work", "vault")})
    ]
    # only spelled by UUID: a call of oneself, which by name is refused either way
    ((_, _, _, pairs),) = differ("", "t.S * work work allow")
    assert pairs == {("work", expand("U(work)"))}


def test_diff_order_matters() -> None:
    """The same rules in another order."""
    rules = ["t.S * work vault deny", "t.S * work @anyvm allow"]
    found = differ("\n".join(rules), "\n".join(rules[::-1]))
    assert found == [(("t.S+*",), "deny", "allow", {("work", "vault")})]


GRAPH = """\
t.S * work vault allow
t.S +a work mail ask
t.T * @anyvm dom0 allow
t.C * @anyvm @anyvm ask
"""


def test_graph() -> None:
    """Edges with their services; what all have in common is told, and like is folded."""
    graph = build(parse_text(GRAPH), FIXTURE)
    drawn = {(edge.source, edge.target): (edge.allowed, edge.asked) for edge in graph.edges}
    # a default base that is no base is passed on (POL-135)
    assert drawn.pop(("odd", "@dispvm:vault")) == ((), ("t.C",))
    assert drawn == {("work", "vault"): (("t.S",), ()), ("work", "mail"): ((), ("t.S+a",))}
    told = {(common.target, common.service, common.verb) for common in graph.common}
    assert (None, "t.C", "ask") in told
    assert ("dom0", "t.T", "allow") in told
    assert any(len(node.members) > 3 for node in graph.nodes)
    colours = {member.colour for node in graph.nodes for member in node.members}
    assert colours == {"#cc0000"}


def test_graph_filters() -> None:
    """By service, by domain, without questions."""
    policy = parse_text(GRAPH)
    only = build(policy, FIXTURE, services=["t.S"], fold=False)
    assert {(e.source, e.target) for e in only.edges} == {("work", "vault"), ("work", "mail")}
    only = build(policy, FIXTURE, services=["t.S+b"], fold=False)
    assert {(e.source, e.target) for e in only.edges} == {("work", "vault")}
    only = build(policy, FIXTURE, services=["t.S"], domains=["mail"], fold=False)
    assert {(e.source, e.target) for e in only.edges} == {("work", "mail")}
    only = build(policy, FIXTURE, include_ask=False, services=["t.S"], fold=False)
    assert {(e.source, e.target) for e in only.edges} == {("work", "vault")}


def test_common_has_its_exceptions() -> None:
    """What is told of all is told with those that it does not hold for: nothing is lost."""
    rules = "t.C * work vault deny\nt.C * @anyvm @anyvm allow"
    graph = build(parse_text(rules), FIXTURE)
    (common,) = [c for c in graph.common if c.target is None]
    assert {pair for pair in common.exceptions if pair[1] != "rem2"} == {("work", "vault")}
    assert "work to vault" in str(common)
    inner = {(e.source, e.target) for e in graph.edges if e.target[0] != "@"}
    assert inner == set()


@pytest.mark.parametrize("fold", [True, False])
def test_drawings(fold: bool) -> None:
    """SVG that is well-formed, a page that loads nothing, DOT that is balanced."""
    policy = parse_text(GRAPH + "t.Long * @tag:office @dispvm allow\nt.X * vault work allow\n")
    evil = Domain('<b>"&', label="0x12345z")
    info = SystemInfo([*FIXTURE, evil])
    graph = build(policy, info, fold=fold)
    svg = to_svg(graph, 'a <title> & "more"')
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    texts = "".join(root.itertext())
    assert "vault" in texts
    page = to_html(graph)
    assert "<b>" not in page
    assert "http" not in page.replace("http-equiv", "")
    body = page[page.index("<svg width") : page.index("</svg>") + 6]
    ElementTree.fromstring(body)
    dot = to_dot(graph)
    assert dot.startswith("digraph g {")
    assert dot.count("{") == dot.count("}")
    assert to_svg(graph) == to_svg(build(policy, info, fold=fold))


def test_a_dense_drawing_is_of_a_size_to_look_at() -> None:
    """Neither many lines nor long exceptions make a picture that no screen can show."""
    names = [f"domain{number}" for number in range(40)]
    nodes = tuple(Node((Member(name, "#cc0000"),)) for name in names)
    pairs = [(a, b) for a in names for b in names if a != b]
    edges = tuple(Edge(a, b, (f"s.{a}", "s.S"), ("s.T",)) for a, b in pairs)
    common = (Common(None, "s.C", "allow", tuple(pairs[:500])),)
    graph = Graph(nodes, edges, common)
    root = ElementTree.fromstring(to_svg(graph))
    assert float(root.attrib["width"]) < 6000
    assert float(root.attrib["height"]) < 6000
    told = " ".join("".join(root.itertext()).split())
    assert str(common[0]) in told  # nothing of it is lost
    assert "\n".join(edges[0].allowed) in "".join(root.itertext())  # the tooltip of a line
    assert max(map(len, to_dot(graph).replace("\\l", "\n").splitlines())) < 200


def test_names_within_a_page_are_unique() -> None:
    """A line finds its own arrow head, not the box of the same name."""
    page = to_html(build(parse_text(GRAPH), FIXTURE))
    names = re.findall(r'\bid="([^"]*)"', page)
    assert len(names) == len(set(names))
    used = set(re.findall(r"url\(#([^)]*)\)", page))
    assert used
    assert used == set(re.findall(r'<marker id="([^"]*)"', page))


def test_boxes_do_not_overlap() -> None:
    """A layout of sixty domains keeps its boxes apart."""
    from sluice.policy.layout import arrange

    names = [f"d{number}" for number in range(60)]
    edges = [(names[n], names[(n * 7 + 3) % 60]) for n in range(60)]
    edges += [(names[n], names[(n * n) % 60]) for n in range(60)]
    layout = arrange(dict.fromkeys(names, (80.0, 32.0)), list(dict.fromkeys(edges)))
    boxes = list(layout.boxes.values())
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            apart_x = abs(one.x - other.x) >= (one.width + other.width) / 2
            apart_y = abs(one.y - other.y) >= (one.height + other.height) / 2
            assert apart_x or apart_y
        assert one.x - one.width / 2 >= 0
        assert one.x + one.width / 2 <= layout.width
        assert one.y - one.height / 2 >= 0
        assert one.y + one.height / 2 <= layout.height


def test_empty_policy_has_an_empty_graph() -> None:
    """Nothing to draw is no reason to fail."""
    graph = build(Policy(()), FIXTURE)
    assert graph == ((), (), ())
    ElementTree.fromstring(to_svg(graph))
    assert "</html>" in to_html(graph)
