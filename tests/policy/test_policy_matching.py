"""Requests and matching: docs/spec/policy.md sections 9 and 10, its tables included."""

from __future__ import annotations

import re

import pytest
from tests.support.policy import FIXTURE, brief, decide, expand, rows, section, spec_param

from sluice.policy.rules import Request
from sluice.policy.system_info import Domain, SystemInfo

EVERY_TARGET = (
    "vault", "U(vault)", "dom0", "U(dom0)", "@adminvm", "", "ghost", "@dispvm",
    "@dispvm:dvm-web", "@dispvm:U(dvm-web)",
)  # fmt: skip
ADMIN = ("dom0", "U(dom0)", "@adminvm")

# (rules, source, target, call, expected); the policy is the same fixture as in section 25.
CASES = [
    # 9: the request
    spec_param("090", "t.S * work @default ask target=vault", "work", "", "t.S", "ask {vault}"),
    spec_param("090 022", "t.S * work vault allow", "work", "", "t.S", "deny NO-MATCH"),
    spec_param("091", "t.S * work @default allow target=vault", "work", "gone", "t.S",
               "allow vault"),
    spec_param("091", "t.S * work @default allow target=vault", "work",
               "uuid:00000099-0000-4000-8000-000000000000", "t.S", "allow vault"),
    spec_param("093", "* * * * allow", "work", "@dispvm:ghost", "t.S", "deny NOT-TEMPLATE"),
    spec_param("093", "* * * * allow", "work", "@dispvm:vault", "t.S", "deny NOT-TEMPLATE"),
    spec_param("095", "t.S * work @default allow target=vault", "work", "$dispvm", "t.S",
               "allow vault"),
    spec_param("095", "t.S * work @dispvm allow", "work", "$dispvm", "t.S", "deny NO-MATCH"),
    spec_param("096", "t.S + work vault allow", "work", "vault", "t.S", "allow vault"),
    spec_param("097", "t.S +a+b+c work vault allow", "work", "vault", "t.S+a+b+c", "allow vault"),
    spec_param("042", "* * * * allow", "work", "*", "t.S", "deny BAD-TARGET silent"),
    spec_param("042", "* * * * allow", "work", "@anyvm", "t.S", "deny BAD-TARGET silent"),
    spec_param("042", "* * * * allow", "work", "@tag:office", "t.S", "deny BAD-TARGET silent"),
    spec_param("042", "* * * * allow", "work", "@type:AppVM", "t.S", "deny BAD-TARGET silent"),
    spec_param("042", "* * * * allow", "work", "@dispvm:@tag:dvm-ok", "t.S",
               "deny BAD-TARGET silent"),
    # 10: first match
    spec_param("098", "t.S * work @anyvm deny\nt.S +a work vault allow", "work", "vault", "t.S+a",
               "deny POLICY-DENY"),
    spec_param("098", "t.S * @anyvm @anyvm allow\nt.S +a work vault deny", "work", "vault",
               "t.S+a", "allow vault"),
    spec_param("098", "* * work vault deny\nt.S +a work vault allow", "work", "vault", "t.S+a",
               "deny POLICY-DENY"),
    spec_param("099", "u.T * work vault allow", "work", "vault", "t.S", "deny NO-MATCH"),
    spec_param("032", "t.s * work vault allow", "work", "vault", "t.S", "deny NO-MATCH"),
    spec_param("032", "t.S +A work vault allow", "work", "vault", "t.S+a", "deny NO-MATCH"),
    spec_param("033", "t.S + work vault allow", "work", "vault", "t.S+", "allow vault"),
    spec_param("033", "t.S + work vault allow", "work", "vault", "t.S", "allow vault"),
    spec_param("033", "t.S + work vault allow", "work", "vault", "t.S++", "deny NO-MATCH"),
    spec_param("034", "t.S * work vault allow", "work", "vault", "t.S", "allow vault"),
    spec_param("034", "t.S * work vault allow", "work", "vault", "t.S+x", "allow vault"),
    spec_param("035", "t.S * work $anyvm allow", "work", "vault", "t.S", "deny NO-MATCH"),
    spec_param("035", "t.S * $anyvm vault allow", "work", "vault", "t.S", "deny NO-MATCH"),
    spec_param("036", "t.S * anyvm anyvm allow", "work", "vault", "t.S", "deny NO-MATCH"),
    spec_param("036", "t.S * work dispvm allow", "work", "@dispvm", "t.S", "deny NO-MATCH"),
    spec_param("048", "t.S * @dispvm:dvm-web vault allow", "dvm-web", "vault", "t.S",
               "deny NO-MATCH"),
    spec_param("048", "t.S * @dispvm:@tag:dvm-ok vault allow", "dvm-web", "vault", "t.S",
               "deny NO-MATCH"),
    spec_param("102", "t.S * @anyvm vault allow", "ghost", "vault", "t.S", "allow vault"),
    spec_param("104", "t.S * work U(vault) allow", "work", "vault", "t.S", "allow vault"),
    spec_param("105", "t.S * U(work) vault allow", "work", "vault", "t.S", "allow vault"),
    spec_param("105", "t.S * U(mail) vault allow", "work", "vault", "t.S", "deny NO-MATCH"),
    spec_param("106", "t.S * work @tag:office allow", "work", "mail", "t.S", "allow mail"),
    spec_param("106", "t.S * work @tag:office allow", "work", "vault", "t.S", "deny NO-MATCH"),
    spec_param("106", "t.S * work @tag:dvm-ok allow", "work", "@dispvm:dvm-web", "t.S",
               "deny NO-MATCH"),
    spec_param("106", "t.S * work @tag:dvm-ok allow", "work", "@dispvm", "t.S", "deny NO-MATCH"),
    spec_param("107", "t.S * work @type:TemplateVM allow", "work", "tmpl", "t.S", "allow tmpl"),
    spec_param("107", "t.S * work @type:AppVM allow", "work", "@dispvm:dvm-web", "t.S",
               "deny NO-MATCH"),
    spec_param("107", "t.S * work @type:AppVM allow", "work", "@default", "t.S", "deny NO-MATCH"),
    spec_param("109", "t.S * @type:AppVM vault allow", "ghost", "vault", "t.S", "deny NO-MATCH"),
    spec_param("109", "t.S * @tag:office vault allow", "ghost", "vault", "t.S", "deny NO-MATCH"),
    spec_param("111", "t.S * work @dispvm allow", "work", "@dispvm:dvm-web", "t.S",
               "deny NO-MATCH"),
    spec_param("112", "t.S * work @dispvm:dvm-web allow", "work", "@dispvm", "t.S",
               "allow @dispvm:dvm-web"),
    spec_param("113", "t.S * work @dispvm:dvm-off allow", "work", "@dispvm", "t.S",
               "deny NO-MATCH"),
    spec_param("113", "t.S * vault @dispvm:dvm-web allow", "vault", "@dispvm", "t.S",
               "deny NO-MATCH"),
    spec_param("113", "t.S * ghost @dispvm:dvm-web allow", "ghost", "@dispvm", "t.S",
               "deny NO-MATCH"),
    spec_param("114", "t.S * work @dispvm:U(dvm-web) allow", "work", "@dispvm:dvm-web", "t.S",
               "allow @dispvm:dvm-web"),
    spec_param("114", "t.S * work @dispvm:U(dvm-web) allow", "work", "@dispvm", "t.S",
               "deny NO-MATCH"),
    spec_param("115", "t.S * work @dispvm:@tag:dvm-ok allow", "work", "@dispvm:dvm-web", "t.S",
               "allow @dispvm:dvm-web"),
    spec_param("115", "t.S * work @dispvm:@tag:dvm-ok allow", "work", "@dispvm", "t.S",
               "allow @dispvm:dvm-web"),
    spec_param("116", "t.S * work @dispvm:@tag:other allow", "work", "@dispvm:dvm-web", "t.S",
               "deny NO-MATCH"),
    spec_param("116", "t.S * odd @dispvm:@tag:dvm-ok allow", "odd", "@dispvm", "t.S",
               "deny NO-MATCH"),
    spec_param("117", "t.S +a work vault allow", "work", "vault", "t.S+a", "allow vault"),
    spec_param("117", "u.S +a work vault allow", "work", "vault", "t.S+a", "deny NO-MATCH"),
    spec_param("117", "t.S +b work vault allow", "work", "vault", "t.S+a", "deny NO-MATCH"),
    spec_param("117", "t.S +a mail vault allow", "work", "vault", "t.S+a", "deny NO-MATCH"),
    spec_param("117", "t.S +a work mail allow", "work", "vault", "t.S+a", "deny NO-MATCH"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "source", "target", "call", "expected"), CASES)
def test_case(rules: str, source: str, target: str, call: str, expected: str) -> None:
    """The policy decides the call as the line of the checklist says."""
    assert brief(decide(rules, source, target, call)) == expected


def matches(token: str, target: str, source: str = "work") -> bool:
    """Tell whether a rule with this target column decides the call."""
    found = decide(f"t.S * * {token} deny notify=no", source, target)
    return found.rule is not None


@pytest.mark.spec("POL-100")
@pytest.mark.parametrize("target", EVERY_TARGET)
def test_star_matches_everything(target: str) -> None:
    """``*`` matches domains, dom0 in all spellings, the default and disposables."""
    assert matches("*", target)


@pytest.mark.spec("POL-101")
@pytest.mark.parametrize("target", EVERY_TARGET)
def test_anyvm_matches_all_but_dom0(target: str) -> None:
    """``@anyvm`` matches the same, less the spellings of dom0."""
    assert matches("@anyvm", target) == (target not in ADMIN)


@pytest.mark.spec("POL-103")
@pytest.mark.parametrize("rule", ADMIN)
@pytest.mark.parametrize("target", EVERY_TARGET)
def test_spellings_of_dom0(rule: str, target: str) -> None:
    """Each spelling in a rule matches each spelling in a request, and nothing else."""
    assert matches(rule, target) == (target in ADMIN)


@pytest.mark.spec("POL-108")
def test_dom0_by_tag_and_type() -> None:
    """Tags and class of dom0 match it by name and UUID, not the keyword."""
    info = SystemInfo([*FIXTURE, Domain("dom0", klass="AdminVM", tags=frozenset({"big"}))])
    for token in ("@tag:big", "@type:AdminVM"):
        for target, expected in (("dom0", True), ("U(dom0)", True), ("@adminvm", False)):
            found = decide(f"t.S * work {token} allow", "work", target, info=info)
            assert (found.rule is not None) == expected


@pytest.mark.spec("POL-110")
@pytest.mark.parametrize("target", EVERY_TARGET)
def test_default_matches_no_target(target: str) -> None:
    """``@default`` matches what names no existing target, and nothing else."""
    assert matches("@default", target) == (target in ("", "ghost"))


@pytest.mark.spec("POL-092", "POL-094")
@pytest.mark.parametrize("target", ["U(vault)", "vault", "dom0", "@adminvm", "U(dom0)", "@dispvm"])
def test_requested_target_is_kept(target: str) -> None:
    """A target that exists stays as the caller spelled it."""
    found = decide("t.S * work * allow", "work", target)
    assert found.requested_target == expand(target)


TABLE_INFO = SystemInfo(
    [
        Domain("work", tags=frozenset({"T"}), uuid="w-1", default_dispvm="dvm"),
        Domain("nobase", uuid="w-2"),
        Domain("dvm", tags=frozenset({"T"}), uuid="w-3", template_for_dispvms=True),
        Domain("other", uuid="w-4", template_for_dispvms=True),
        Domain("plain", klass="TemplateVM", uuid="w-5"),
        Domain("dom0", klass="AdminVM", tags=frozenset({"T"})),
    ]
)


def _columns() -> list[str]:
    heading = next(
        line for line in section("10.3 Target column").splitlines() if line.startswith("| Rule")
    )
    return [cell.strip() for cell in heading.strip("|").split("|")[1:]]


@pytest.mark.spec("POL-100", "POL-101", "POL-106", "POL-107", "POL-111", "POL-114", "POL-115")
@pytest.mark.parametrize("row", rows(section("10.3 Target column")), ids=lambda row: row[0])
def test_table_of_targets(row: list[str]) -> None:
    """Every cell of the table of section 10.3."""
    for rule in row[0].split("/"):
        token = rule.strip("` ").replace("C", "AppVM")
        for column, cell in zip(_columns(), row[1:], strict=True):
            target = re.sub(r"[`]|\(.*base.*\)", "", column).strip()
            target = {"other VM": "plain"}.get(target, target)
            source = "nobase" if "no base" in column else "work"
            text = f"t.S * * {token} deny"
            found = decide(text, source, target, info=TABLE_INFO)
            expected = cell.startswith("✔")
            if cell == "if class":  # plain is a template
                expected = False
            assert (found.rule is not None) == expected, (token, column)


@pytest.mark.parametrize("row", rows(section("10.2 Source column")), ids=lambda row: row[0])
@pytest.mark.spec("POL-048", "POL-102", "POL-105", "POL-109")
def test_table_of_sources(row: list[str]) -> None:
    """Every cell of the table of section 10.2."""
    sources = ("work", "U(work)", "plain", "unknown", "dom0")
    for rule in row[0].split(","):
        for spelled in rule.strip("` ").split("`, `"):
            token = spelled.strip("` ")
            token = token.replace(":C", ":AppVM").replace(":X", ":dvm")
            for source, cell in zip(sources, row[1:], strict=True):
                name = expand(source, TABLE_INFO)
                found = decide(f"t.S * {token} * deny", name, "plain", info=TABLE_INFO)
                have = {"@tag:T": ("work", "U(work)", "dom0"), "@type:AppVM": ("work", "U(work)")}
                expected = cell == "✔" or (cell.startswith("if") and source in have[token])
                assert (found.rule is not None) == expected, (token, source)


@pytest.mark.spec("POL-097")
def test_first_plus_splits() -> None:
    """The rest of the text belongs to the argument, plus signs included."""
    request = Request.of("a.B+c+d+", "work", "vault")
    assert (request.service, request.argument) == ("a.B", "+c+d+")
    assert Request.of("a.B", "work", "vault").argument == "+"
    with pytest.raises(ValueError, match="begins with"):
        Request("a.B", "x", "work", "vault")
