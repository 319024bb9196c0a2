"""No input crashes the policy engine, keeps it busy for long, or lets a call through."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.policy import FIXTURE

from sluice.errors import PolicyError
from sluice.policy.cases import parse_table
from sluice.policy.evaluation import Allow, Policy
from sluice.policy.explain import explain
from sluice.policy.files import PolicyStore
from sluice.policy.lint_lines import lint_text
from sluice.policy.loader import Loader
from sluice.policy.memory import MemoryFiles, from_files, parse_text
from sluice.policy.response import encode
from sluice.policy.rules import OPT_IN, Request
from sluice.policy.system_info import Domain, SystemInfo, SystemInfoError
from sluice.policy.tokens import MAX_PARTS

FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
PIECES = [
    "allow", "ask", "deny", "*", "+", "@anyvm", "@dispvm", "@dispvm:", "@tag:", "@type:x", "t.S",
    "a", "work", "vault", "target=", "user=x", "notify=yes", "via=a+b", "limit=1/1s", "reason=",
    "!include", "!include-service", "!include-dir", "!compat-4.0", "#", ",", "$anyvm", "$include:",
    " ", "\t", "\n", "\r", "\r\n", "\x00", "\x1b[2J", "\u2028", "\xa0", "ä", "uuid:",
    "@", "=", OPT_IN,
]  # fmt: skip
SOUP = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=40).map(" ".join)


@FUZZ
@given(st.one_of(SOUP.map(str.encode), st.binary(max_size=300)))
def test_any_bytes_as_policy(content: bytes) -> None:
    """A policy or a PolicyError; with a report, always an end; marks without control characters."""
    for path in ("/p/a.policy", "/p/include/i"):
        files = {
            "/p/a.policy": b"!include include/i\n!include-service t.S * include/i",
            path: content,
        }
        try:
            from_files(files, ("/p", "/legacy"))
        except PolicyError as error:
            assert str(error)
        errors: list[PolicyError] = []
        Loader(MemoryFiles(files, ("/legacy",)), ["/p"], report=errors.append).load()
        for error in errors:
            marked = getattr(error, "marked", str)()
            assert all(c == "\n" or " " <= c <= "~" for c in marked)
    for service_format in (False, True):
        for finding in lint_text(content, "f", service_format=service_format):
            assert str(finding)


@FUZZ
@given(SOUP, st.text(max_size=20), st.text(max_size=20), st.text(max_size=20), st.text(max_size=9))
def test_any_request(rules: str, source: str, target: str, service: str, remote: str) -> None:
    """Whatever is asked, there is an answer and a text for it, and no bad name is called."""
    policy = parse_text("t.S * * @anyvm ask\n* * * * allow")
    for one in (target, "@" + target, "@dispvm:" + target, "uuid:" + target):
        request = Request.of(service, source, one, remote)
        found = policy.evaluate(request, FIXTURE)
        if isinstance(found, Allow):
            assert found.target.removeprefix("@dispvm:") in FIXTURE
            encode(found, FIXTURE)
        explain(policy, request, FIXTURE)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=12,
)
FIELDS = [
    "tags", "type", "template_for_dispvms", "default_dispvm", "power_state", "icon", "label",
    "guivm", "relayvm", "transport_rpc", "internal", "uuid",
]  # fmt: skip


@FUZZ
@given(
    st.one_of(
        JSON,
        st.builds(
            lambda entries: {"domains": entries},
            st.dictionaries(
                st.sampled_from(["work", "dom0", "@x", "*", "", "uuid:x", "a b"]),
                st.one_of(JSON, st.dictionaries(st.sampled_from(FIELDS), JSON)),
                max_size=4,
            ),
        ),
    )
)
def test_any_system_information(data: object) -> None:
    """A snapshot or a SystemInfoError; and then any call has an answer."""
    try:
        info = SystemInfo.from_json(data)
    except SystemInfoError:
        return
    policy = parse_text("t.S * * * ask\nt.S * @tag:x @dispvm allow")
    for source in ("work", "@x", "*", "dom0"):
        for target in ("work", "@dispvm", "@dispvm:work", ""):
            policy.evaluate(Request.of("t.S", source, target), info)


@FUZZ
@given(st.binary(max_size=200))
def test_any_reply_of_qubesd(reply: bytes) -> None:
    """A snapshot or a SystemInfoError."""
    try:
        SystemInfo.from_reply(reply)
    except SystemInfoError as error:
        assert "system info" in str(error)


@FUZZ
@given(SOUP)
def test_any_table(text: str) -> None:
    """A table of cases or an error with its line."""
    from sluice.errors import ConfigError

    try:
        parse_table(text, "f")
    except ConfigError as error:
        assert error.line


def test_ten_megabytes() -> None:
    """A policy of 10 MB is read in seconds, and decides."""
    line = "qubes.Service{0} +argument{0} work{1} @tag:office allow user=user{2} notify=yes\n"
    text = "".join(line.format(n % 5000, n % 60, n % 7) for n in range(130_000))
    assert len(text) > 9_500_000
    started = time.process_time()
    policy = parse_text(text)
    assert len(policy.rules) == 130_000
    found = policy.evaluate(Request.of("qubes.Service7+argument7", "work7", "mail"), FIXTURE)
    assert isinstance(found, Allow)
    assert time.process_time() - started < 60


@pytest.mark.parametrize(
    "line",
    [
        "x" * 1_000_000,
        "t.S * a b allow " + "user=x " * 150_000,
        "t.S * a b allow user=" + "x" * 1_000_000,
        "t.S * " + "@tag:" * 200_000 + " b allow",
        "!include " + "x/" * 500_000,
        "# " + "x" * 1_000_000,
        "\t" * 1_000_000,
        "t.S +" + "," * 1_000_000 + " a b allow",
    ],
    ids=lambda line: line[:20],
)
def test_a_line_of_a_megabyte(line: str) -> None:
    """Read or refused, soon, with a text that fits a screen."""
    started = time.process_time()
    errors: list[PolicyError] = []
    files = MemoryFiles({"/p/a.policy": line})
    Loader(files, ["/p"], report=errors.append).load()
    for error in errors[:3]:
        assert len(getattr(error, "marked", str)()) < 400
    assert time.process_time() - started < 30


def test_conjunctions_of_many_tags() -> None:
    """A domain with many tags and a rule for each pair: the walk stays on existing paths."""
    tags = [f"t{number:03}" for number in range(60)]
    widest = ",".join(f"@tag:{tag}" for tag in tags[:MAX_PARTS])
    lines = [f"t.S * @tag:{a},@tag:{b} * deny" for a in tags for b in tags if a < b]
    policy = parse_text("\n".join([OPT_IN, *lines, f"t.S * {widest} * allow"]))
    info = SystemInfo([Domain("a", tags=frozenset(tags)), Domain("b")])
    started = time.process_time()
    for _ in range(20):
        policy.evaluate(Request.of("t.S", "a", "b"), info)
    assert time.process_time() - started < 20


def test_truncated_while_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that shrinks under the reader is waited for, and then read as it is."""
    from sluice.policy.files import DiskFiles

    path = tmp_path / "a.policy"
    path.write_text("t.S * work vault deny\n" * 1000 + "t.S * work mail allow\n")
    read = DiskFiles.read
    once = [True]

    def shrinking(self: DiskFiles, name: str) -> bytes:
        if once:
            once.clear()
            path.write_text("t.S * work mail deny\n")
            return b"t.S * work mail allow\n"  # what a reader could have got in between
        return read(self, name)

    monkeypatch.setattr(DiskFiles, "read", shrinking)
    policy: Policy = PolicyStore([tmp_path], quiet=0.02).current()
    assert [str(rule.action) for rule in policy.rules] == ["deny"]
