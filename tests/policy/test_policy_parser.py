"""Lines, tokens, options: docs/spec/policy.md sections 4 to 6, and the vectors of 25.3."""

from __future__ import annotations

import re

import pytest
from tests.support.policy import rows, section, spec_param

from sluice.policy.memory import parse_text
from sluice.policy.parser import Directive, Parsed, parse_policy, parse_service
from sluice.policy.problems import PolicySyntaxError
from sluice.policy.rules import Rule
from sluice.policy.tokens import Column, TokenError, check

# What the rows of section 4.3 say, as patterns.
MESSAGES = {
    1: r"wrong number of fields",
    2: r"service '.*' contains invalid characters: \(.*\)",
    3: r"argument '.*' contains invalid characters: \(.*\)",
    4: r"argument '.*' does not start with \+",
    5: r"only \* argument allowed for \* service",
    6: r"invalid source token: '.*'",
    7: r"invalid target token: '.*'",
    8: r"invalid empty .+ token: '.*'",
    9: r"invalid action: .*",
    10: r"invalid action parameter syntax: '.*'",
    11: r"parameter given twice: '.*'",
    12: r"'.*' is '.*', but can be only 'yes' or 'no'",
    13: r"invalid parameters for action (Allow|Ask|Deny): \[.*\]",
    14: r"invalid redirect token: '.*'|invalid empty redirect token",
    15: r"allow action for @default rule must specify target= option",
}


def first(line: str) -> PolicySyntaxError | Rule:
    """Return what the first item of a one-line policy is."""
    return parse_policy(line, "f").items[0]  # type: ignore[return-value]


def error(line: str) -> str:
    """Return the canonical text of the first error, empty if the line is good."""
    found = first(line)
    return found.message if isinstance(found, PolicySyntaxError) else ""


def _vectors() -> list[tuple[str, str]]:
    found = []
    for line, result in rows(section("25.3 Parser vectors")):
        found += [(part.strip("` "), result) for part in line.split("` / `")]
    return found


@pytest.mark.spec("POL-246", "POL-026", "POL-027", "POL-028", "POL-029", "POL-030", "POL-031")
@pytest.mark.parametrize(("line", "result"), _vectors())
def test_vector(line: str, result: str) -> None:
    """Every line of section 25.3 is accepted, or refused by its row."""
    found = first(line)
    if result.startswith("✔"):
        assert isinstance(found, Rule)
        return
    assert isinstance(found, PolicySyntaxError)
    number = re.match(r"row (\d+)", result)
    pattern = MESSAGES[int(number[1])] if number else result.strip("`")
    assert re.fullmatch(pattern, found.message), found.message
    assert str(found) == f"f:1: {found.message}"


@pytest.mark.spec("POL-246", "POL-075", "POL-076", "POL-078", "POL-079")
@pytest.mark.parametrize(
    ("line", "result"),
    list(rows(section("25.3 Parser vectors"), 1)),
    ids=lambda text: text[:30],
)
def test_service_vector(line: str, result: str) -> None:
    """Every line of the second table: the equivalent rule, or the error."""
    for part in line.split("` / `"):
        text = part.strip("` ")
        found = parse_service(text, "f", "t.S", "+x").items[0]
        equivalent = re.match(r"`(t\.S [^`]*)`", result)
        if equivalent:
            expected = first(equivalent[1])
            assert isinstance(found, Rule)
            assert isinstance(expected, Rule)
            assert found[:5] == expected[:5]
        elif result.startswith("service-format include"):
            assert found.path == "include/y"  # type: ignore[union-attr]
        else:
            assert isinstance(found, PolicySyntaxError)
            assert found.message == result.split("→")[-1].strip(" `")


CASES = [
    spec_param("023", "t.S * a b allow # note", 10),
    spec_param("023", "t.S * a b deny #note", 10),
    spec_param("026", "t.S * a b", 1),
    spec_param("026", "x", 1),
    spec_param("027", "t.S+ * a b allow", 2),
    spec_param("028", "t/S * a b allow", 2),
    spec_param("028", "** * a b allow", 2),
    spec_param("028", "tÄ * a b allow", 2),
    spec_param("029", "t.S a a b allow", 4),
    spec_param("030", "t.S +a/b a b allow", 3),
    spec_param("030", "t.S a/b a b allow", 3),
    spec_param("031", "* +a a b allow", 5),
    spec_param("037", "t.S * a b permit", 9),
    spec_param("037", "t.S * a b DENY", 9),
    spec_param("038", "t.S * a b allow,user=x", 9),
    spec_param("058", "t.S * a b allow user=x,target=", 0),
    spec_param("040", "t.S * @default b allow", 6),
    spec_param("040", "t.S * @dispvm b allow", 6),
    *[spec_param("041", f"t.S * a b allow target={word}", 14)
      for word in ("@anyvm", "*", "@default", "@tag:x", "@type:AppVM", "@dispvm:@tag:x")],
    *[spec_param("043", f"t.S * {word} b allow", 8)
      for word in ("@tag:", "@type:", "@dispvm:", "@dispvm:@tag:")],
    *[spec_param("043", f"t.S * a {word} allow", 8)
      for word in ("@tag:", "@type:", "@dispvm:", "@dispvm:@tag:")],
    *[spec_param("044", f"t.S * a {word} deny", 7)
      for word in ("@tag:@x", "@type:@x", "@dispvm:@type:x", "@dispvm:@dispvm", "@dispvm:@tag:@x")],
    *[spec_param("045", f"t.S * {word} b deny", 6) for word in ("@uuid:x", "@", "@anyvmx", "@foo")],
    *[spec_param("046 047", f"t.S * {word} {word} allow target={word}", 0)
      for word in ("uuid:abc", "@dispvm:uuid:abc")],
    spec_param("049", "t.S * a b allow target=", 14),
    spec_param("049", "t.S * a b ask default_target=", 14),
    spec_param("050", "t.S * a b allow target=c user=u notify=no autostart=no", 0),
    spec_param("050", "t.S * a b ask target=c user=u notify=no autostart=no", 0),
    spec_param("051", "t.S * a b ask default_target=c", 0),
    spec_param("051", "t.S * a b allow default_target=c", 13),
    spec_param("051", "t.S * a b deny default_target=c", 13),
    spec_param("052", "t.S * a b deny user=c", 13),
    spec_param("052", "t.S * a b deny target=c", 13),
    spec_param("052", "t.S * a b deny autostart=yes", 13),
    spec_param("053", "t.S * a b allow x=y", 13),
    spec_param("054", "t.S * a b allow user", 10),
    spec_param("055", "t.S * a b allow notify=no notify=no", 11),
    *[spec_param("056", f"t.S * a b allow autostart={word}", 12)
      for word in ("", "Yes", "true", "1", "NO")],
    spec_param("059", "t.S * a @default allow user=x", 15),
    spec_param("059", "t.S * a @default ask", 0),
    spec_param("059", "t.S * a @default deny", 0),
]  # fmt: skip


@pytest.mark.parametrize(("line", "row"), CASES)
def test_line(line: str, row: int) -> None:
    """The line is refused by that row of section 4.3; 0: it is accepted."""
    found = error(line)
    assert re.fullmatch(MESSAGES[row] if row else "", found), found


@pytest.mark.spec("POL-016")
def test_texts_are_exact() -> None:
    """The words that scripts match on."""
    assert error("t:S+x * a b allow") == "service 't:S+x' contains invalid characters: ('+', ':')"
    assert error("t+S * a b allow") == "service 't+S' contains invalid characters: ('+',)"
    assert error("t.S * a @tag: deny") == "invalid empty @tag: token: '@tag:'"
    assert error("t.S * a b deny a=1 b=2") == ("invalid parameters for action Deny: ['a=1', 'b=2']")
    assert error("t.S * a b allow notify=True") == (
        "'notify' is 'True', but can be only 'yes' or 'no'"
    )
    assert error("t.S * a b allow target=") == "invalid empty redirect token"
    assert error("t.S * a b allow target=@dispvm:") == "invalid empty @dispvm: token: '@dispvm:'"


def test_order_of_checks() -> None:
    """Of several faults the engine cites the first of section 4.3; the tools get all of them."""
    line = "t+S a @foo @bar allow notify=x zzz target=@anyvm"
    items = parse_policy(line, "f").items
    messages = [item.message for item in items if isinstance(item, PolicySyntaxError)]
    assert [message.split("'")[0] for message in messages] == [
        "service ", "argument ", "invalid source token: ", "invalid target token: ",
        "invalid action parameter syntax: ", "", "invalid redirect token: ",
    ]  # fmt: skip
    marked = [line[item.column - 1 : item.column - 1 + item.width] for item in items]  # type: ignore[union-attr]
    assert marked == ["+", "a", "@foo", "@bar", "zzz", "x", "@anyvm"]


@pytest.mark.spec("POL-039")
@pytest.mark.parametrize("row", rows(section("5.1 Where")), ids=lambda row: row[0])
def test_table_of_tokens(row: list[str]) -> None:
    """Every cell of section 5.1."""
    columns = (Column.SOURCE, Column.TARGET, Column.REDIRECT, Column.REQUEST)
    for word in re.findall(r"`([^`]+)`", row[0]) or [
        {"literal name (incl. `dom0`)": "dom0"}.get(row[0], "")
    ]:
        if row[0].startswith("anything else"):
            word = "@other"
        if row[0] == "empty":
            word = ""
        for column, cell in zip(columns, row[1:5], strict=True):
            legal = cell.startswith("✔")
            if word == "" and column is Column.REQUEST:
                continue  # it is replaced before it is looked at (section 9)
            try:
                check(word, column)
                found = True
            except TokenError:
                found = False
            assert found == legal, (word, column)


@pytest.mark.spec("POL-021", "POL-022", "POL-024", "POL-025", "POL-017")
def test_layout_of_lines() -> None:
    """Blanks, comments, tabs, and any of the three line ends."""
    text = "\n  \t\n# t.S * a b allow\n   # x\r\nt.S\t*  a \t b\u00a0allow  \rt.S * a b deny\n\n"
    items = parse_policy(text, "f").items
    assert [(item.line, str(item)) for item in items] == [
        (5, "t.S\t*\ta\tb\tallow"),
        (6, "t.S\t*\ta\tb\tdeny"),
    ]


def test_other_separators_do_not_end_lines() -> None:
    """A form feed or a Unicode line separator is whitespace, no line end."""
    for mark in ("\x0b", "\x0c", "\x1c", "\u2028", "\x85"):
        items = parse_policy(f"t.S * a b deny{mark}notify=no\nu.S * a b deny", "f").items
        assert [item.line for item in items] == [1, 2]


def test_byte_order_mark_is_not_stripped() -> None:
    """It makes the first service invalid."""
    assert error("\ufefft.S * a b allow").startswith("service ")


def test_marks() -> None:
    """The mark stands below what is wrong, also in a long line and with tabs."""
    found = first("t.S\t*\ta\tb\tpermit")
    assert isinstance(found, PolicySyntaxError)
    line, mark = found.marked().splitlines()
    assert line[mark.index("^") : mark.rindex("^") + 1] == "permit"
    found = first("t.S * a b allow " + "user=x " * 50_000)
    assert isinstance(found, PolicySyntaxError)
    line, mark = found.marked().splitlines()
    assert len(line) < 150
    assert line[mark.index("^") : mark.rindex("^") + 1] == "user=x"
    found = first("t.S * a b \x1b[31mred")
    assert isinstance(found, PolicySyntaxError)
    assert "\x1b" not in found.marked()


@pytest.mark.parametrize(
    ("line", "marked"),
    [
        ("$foo b allow", "$foo"),
        ("a $anyvm allow,user=x,bad", "bad"),
        ("a,b  c permit", "c"),
        ("  $include:x y", "$include"),
        ("$include:$no,", "$no"),
    ],
)
def test_marks_of_the_service_format(line: str, marked: str) -> None:
    """The line is shown as it stands in the file, not as it is read."""
    found = parse_service(line, "f", "t.S", "*").items[0]
    if isinstance(found, Directive):
        found = found.error("not a file")
    assert isinstance(found, PolicySyntaxError)
    assert found.text == line
    assert line[found.column - 1 :][: found.width] == marked


def test_text_form() -> None:
    """Tabs between the columns, options in their order, defaults left out (5.3, Q-3)."""
    line = "* * a b ask autostart=no notify=yes user=u default_target=c target=c"
    rule = parse_text(line).rules[0]
    assert str(rule) == ("*\t*\ta\tb\task target=c default_target=c user=u notify=yes autostart=no")
    assert str(parse_text("t.S + a b deny notify=yes").rules[0]) == "t.S\t+\ta\tb\tdeny"
    assert str(parse_text("t.S + a b deny notify=no").rules[0]).endswith("deny notify=no")


def test_unknown_place() -> None:
    """An error without a place still has the form FILE:LINE."""
    assert str(PolicySyntaxError("bad")) == "<unknown>:0: bad"


def test_parsed_says_whether_it_is_plain() -> None:
    """Files of rules only are taken over as they are."""
    assert parse_policy("t.S * a b deny\n", "f").plain
    assert not parse_policy("!include x\n", "f").plain
    assert isinstance(parse_policy("", "f"), Parsed)
