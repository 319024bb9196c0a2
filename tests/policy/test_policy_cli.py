"""``sluice policy ...`` and ``qubes-policy-lint`` as people run them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.support.policy import FIXTURE

from sluice.cli import policy_lint
from sluice.cli.init import lay
from sluice.cli.main import main
from sluice.cli.policy_qubes_lint import main as qubes_lint
from sluice.domains.paths import Paths
from sluice.policy import shipped
from sluice.runtime import launcher

RULES = """\
t.S * work vault allow
t.S * work mail ask default_target=mail
t.S * work @default allow target=vault user=u
t.T * work @anyvm deny notify=no
far.S * work rem1 allow
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a policy, another one, and the domains."""
    (tmp_path / "p").mkdir()
    (tmp_path / "p/30-user.policy").write_text(RULES)
    (tmp_path / "q").mkdir()
    (tmp_path / "q/30-user.policy").write_text(RULES.replace("vault allow", "vault deny"))
    (tmp_path / "world.json").write_text(json.dumps(FIXTURE.to_json()))
    return tmp_path


def run(place: Path, name: str, *arguments: str, policy: str = "p") -> Result:
    """Run a subcommand on the policy and the domains of ``place``."""
    options: Sequence[str] = ("--policy-dir", str(place / policy))
    options = (*options, "--system-info", str(place / "world.json"), "--legacy-dir", "-")
    return CliRunner().invoke(main, ["policy", name, *options, *arguments])


def test_help_names_all() -> None:
    """Every question has its line."""
    result = CliRunner().invoke(main, ["policy", "--help"])
    for name in ("explain", "lint", "test", "who-can", "what-can", "diff", "graph"):
        assert name in result.output


@pytest.mark.parametrize(
    ("target", "service", "status", "words"),
    [
        ("vault", "t.S", 0, ["allow target=vault", "30-user.policy:1"]),
        ("mail", "t.S", 3, ["ask", "mail", "default=mail", "30-user.policy:2"]),
        ("", "t.S+x", 0, ["(no target)", "user=u", "30-user.policy:3"]),
        ("sys-usb", "t.S", 1, ["NO-MATCH", "Came near", "target is sys-usb, not vault"]),
        ("vault", "t.T", 1, ["POLICY-DENY", "not told", "30-user.policy:4"]),
        ("rem1", "far.S+q", 0, ["carried by relay as x.Transport+rem1+far.S+q"]),
    ],
)
def test_explain(place: Path, target: str, service: str, status: int, words: list[str]) -> None:
    """Decision, place and reasons; the exit status tells the decision."""
    result = run(place, "explain", "work", target, service)
    assert result.exit_code == status, result.output
    for word in words:
        assert word in result.output
    result = run(place, "explain", "--json", "work", target, service)
    found = json.loads(result.output)
    assert {0: "allow", 1: "deny", 3: "ask"}[status] == found["decision"]


def test_explain_says_who_is_told(place: Path) -> None:
    """A refusal is told to the source's GuiVM; one that has none is told to nobody (16.3)."""
    for source, told in (("work", "told"), ("rem1", "not told")):
        result = run(place, "explain", source, "sys-usb", "t.S")
        assert f"the user is {told}\n" in result.output


def test_explain_escapes(place: Path) -> None:
    """What somebody typed does not reach the terminal raw."""
    result = run(place, "explain", "wo\x1b[31mrk", "a\x1b]0;x", "t.S\x1b")
    assert "\x1b" not in result.output
    assert result.exit_code == 1


def test_nothing_of_a_policy_reaches_the_terminal_raw(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that somebody sent may hold anything; looking at it must be safe."""
    evil = "e\x1b[31mv\u202eil"
    good = f"t.S * {evil} vault allow user={evil}\nt.S * work mail ask\n"
    (place / "p/20-evil.policy").write_text(f"#!sluice 1\n{good}t.S * * dom0 deny reason={evil}\n")
    bad = place / "bad"
    bad.write_text(f"t.S * {evil} b {evil}\n!include /{evil}\n{evil}\nt.S * a b deny {evil}=x\n")
    (place / "calls").write_text("work vault t.S allow rule=x\nwork dom0 t.S allow\n")
    outputs = [
        run(place, *arguments).output
        for arguments in (
            ("lint",), ("lint", str(bad)), ("who-can", "t.S", "vault"), ("what-can", "work"),
            ("explain", "work", "dom0", "t.S"), ("explain", evil, "vault", "t.S"),
            ("diff", str(place / "p"), str(place / "q")), ("graph",), ("who-can", "t.S", evil),
            ("test", "--coverage", str(place / "calls")), ("diff", str(bad), str(bad)),
        )
    ]  # fmt: skip
    qubes_lint(["-s", str(bad)])
    outputs.append(capsys.readouterr().out)
    for output in outputs:
        assert output
        assert "\x1b" not in output
        assert "\u202e" not in output


def test_syntax_errors_are_marked(place: Path) -> None:
    """File, line, and a mark below the word; exit status 126."""
    (place / "p/40-bad.policy").write_text("\nt.S * a b permit\n")
    result = run(place, "explain", "work", "vault", "t.S")
    assert result.exit_code == 126
    lines = result.output.splitlines()
    assert lines[0].endswith("p/40-bad.policy:2: invalid action: permit")
    assert lines[1].index("permit") == lines[2].index("^")


def test_lint(place: Path) -> None:
    """All errors of the set with their marks; warnings; JSON; exit statuses."""
    assert run(place, "lint").exit_code == 0
    (place / "p/40-x.policy").write_text("t.S +a work vault deny\n")
    result = run(place, "lint")
    assert (result.exit_code, "unreachable" in result.output) == (0, True)
    assert run(place, "lint", "--strict").exit_code == 1
    (place / "p/50-y.policy").write_text("bad\nt.S * @foo b deny\n!compat-4.0\n")
    (place / "p/60-z.policy").write_text("!include nowhere\n")
    result = run(place, "lint")
    assert result.exit_code == 1
    for text in (
        "50-y.policy:1: error: wrong number of fields",
        "50-y.policy:2: error: invalid source token: '@foo'",
        "60-z.policy:1: error: not a file",
        "40-x.policy:1: warning: unreachable",
        "50-y.policy:3: warning: !compat-4.0 is deprecated",
    ):
        assert text in result.output
    found = json.loads(run(place, "lint", "--json").output)
    assert {"syntax", "unreachable", "deprecated"} <= {entry["code"] for entry in found}
    marked = next(entry for entry in found if entry["column"])
    assert (marked["line"], marked["column"]) == (2, 7)


def test_lint_tells_of_files_that_are_not_read(place: Path) -> None:
    """A rule in a file of another name would silently not hold."""
    for name in ("40-more.rules", "50-old.policy.bak", "README", ".hidden"):
        (place / "p" / name).write_text("* * * * deny\n")
    found = [line for line in run(place, "lint").output.splitlines() if "[not-read]" in line]
    assert [line.partition(":")[0].rpartition("/")[2] for line in found] == [
        "40-more.rules",
        "50-old.policy.bak",
    ]


def test_lint_files(place: Path) -> None:
    """Files each on its own, standard input too, also in service format."""
    bad = place / "bad"
    bad.write_text("a b allow,user=x\n")
    assert run(place, "lint", str(bad)).exit_code == 1
    assert run(place, "lint", "-i", str(bad)).exit_code == 0
    result = run(place, "lint", str(place / "none"))
    assert (result.exit_code, "File does not exist." in result.output) == (1, True)
    result = CliRunner().invoke(main, ["policy", "lint", "-"], input="nonsense\n")
    assert "-:1: error: wrong number of fields" in result.output


def test_lint_services(place: Path) -> None:
    """Names of services against a directory of them."""
    (place / "rpc").mkdir()
    (place / "rpc/t.S").touch()
    result = run(place, "lint", "--services", str(place / "rpc"))
    assert "no service t.T is known" in result.output
    assert "t.S is known" not in result.output


def test_lint_knows_the_services_of_a_system(tmp_path: Path) -> None:
    """What system.toml lays in a domain, what dom0 and the templates offer, what is shipped."""
    paths = Paths.find(str(tmp_path))
    lay(paths)
    (tmp_path / "config/files").mkdir()
    for name in ("files/laid", "rpc/own.Clock", "template/host/etc/qubes-rpc/all.Have+x"):
        (tmp_path / "config" / name).write_text("#!/bin/sh\n")
    paths.system_file.write_text(
        "[domains.a]\n[domains.b]\n"
        '[domains.b.files]\n"/usr/local/etc/qubes-rpc/laid.Here" = "files/laid"\n'
        '[domains.far]\nclass = "RemoteVM"\nrelayvm = "a"\ntransport_rpc = "x.Carry"\n'
    )
    (tmp_path / "config/policy.d/30-user.policy").write_text(
        "laid.Here * a b allow\nown.Clock * a dom0 allow\nall.Have * a b allow\n"
        "there.Only * a far allow\nlaid.Heer * a b allow\nadmin.vm.list * a dom0 allow\n"
        "there.Only * a @default ask target=far\nthere.Only * a b deny\n"
    )
    result = CliRunner().invoke(main, ["policy", "lint", "--root", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    found = [entry for entry in json.loads(result.stdout) if entry["code"] == "unknown-service"]
    assert [(entry["line"], entry["message"]) for entry in found] == [
        (5, "no service laid.Heer is known"),
        (6, "service admin.vm.list: did you mean admin.vm.List?"),
        (8, "no service there.Only is known"),
    ]


def test_lint_leaves_out_what_nobody_here_wrote(tmp_path: Path) -> None:
    """A fresh system has no warnings, but for those about the shipped files, which are counted."""
    paths = Paths.find(str(tmp_path))
    lay(paths)

    def lint(*options: str) -> Result:
        return CliRunner().invoke(main, ["policy", "lint", "--root", str(tmp_path), *options])

    result = lint("--strict")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "3 warnings about unchanged shipped files not shown (--all)" in result.stderr
    assert lint("--all", "--strict").exit_code == 1
    shown = lint("--all", "--json")
    assert shown.stderr == "" and len(json.loads(shown.stdout)) == 3
    # Of a shipped rule, but because of another: both files are named.
    own = tmp_path / "config/policy.d/30-user.policy"
    own.write_text("qubes.GetDate * * * deny\n")
    assert "90-default.policy" in lint().stdout and "30-user.policy:1 covers" in lint().stdout
    own.unlink()
    changed = tmp_path / "config/policy.d/90-default.policy"
    assert changed.name not in lint().stdout
    changed.write_text(changed.read_text() + "qubes.GetDat * a b deny\n")
    assert "there is no domain sys-net" in lint().stdout and "qubes.GetDat " in lint().stdout
    changed.write_text("nonsense\n")
    assert lint().exit_code == 1


def test_lint_says_what_it_could_not_check(tmp_path: Path) -> None:
    """Without domains, names are not checked; a reader must not take silence for approval."""
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.policy").write_text("t.S * ghost gone allow\n")
    arguments = ["policy", "lint", "--root", str(tmp_path), "--policy-dir", str(tmp_path / "p")]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no domains are known" in result.stderr


def test_lint_in_dom0_of_qubes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the services of dom0 are known, and those of no qube; elsewhere none are."""
    (place / "rpc").mkdir()
    monkeypatch.setattr(policy_lint, "_SERVICE_DIRECTORIES", (str(place / "rpc"),))
    (place / "p/50-more.policy").write_text("my.Clock * work dom0 allow\n")
    assert "is known" not in run(place, "lint").output
    monkeypatch.setattr(policy_lint, "QUBESD", str(place / "rpc"))
    found = [line for line in run(place, "lint").output.splitlines() if "is known" in line]
    assert [line.rpartition(": ")[2] for line in found] == [
        "no service my.Clock is known [unknown-service]"
    ]


def test_cases(place: Path) -> None:
    """Tables that hold and tables that do not; coverage."""
    table = place / "calls"
    table.write_text("work vault t.S allow\nwork vault t.T deny notify=no\n")
    result = run(place, "test", str(table), "--coverage")
    assert result.exit_code == 0, result.output
    assert "2 of 5 rules decided something (40 %)" in result.output
    assert "never: " in result.output
    assert "2 calls, 0 not as expected" in result.output
    assert run(place, "test", str(table), "--min-coverage", "50").exit_code == 1
    table.write_text("work vault t.S deny\n")
    result = run(place, "test", str(table))
    assert result.exit_code == 1
    assert f"{table}:1: work vault t.S deny" in result.output
    assert "deny expected, allow decided" in result.output
    found = json.loads(run(place, "test", "--json", str(table)).output)
    assert (found["calls"], len(found["failures"])) == (1, 1)
    table.write_text("work vault\n")
    result = run(place, "test", str(table))
    assert (result.exit_code, f"{table}:1: " in result.output) == (125, True)


def test_a_table_that_is_not_text(place: Path) -> None:
    """An error with its line, no traceback."""
    (place / "calls").write_bytes(b"work vault t.S allow\n\xff\n")
    result = run(place, "test", str(place / "calls"))
    assert (result.exit_code, "calls:2: not valid UTF-8" in result.output) == (125, True)


def test_lint_of_what_cannot_be_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory is no file; the other files are checked all the same."""
    (place / "bad").write_text("bad\n")
    result = run(place, "lint", str(place / "p"), str(place / "bad"))
    assert result.exit_code == 1
    assert f"{place / 'p'}:0: error: Is a directory\n    --policy-dir" in result.output
    assert "bad:1: error" in result.output
    status, lines = lint_by_name(capsys, str(place / "p"), str(place / "bad"))
    assert (status, len(lines)) == (1, 2)


def test_shipped_table() -> None:
    """The table of the shipped policies runs from the command line, with no system about."""
    result = CliRunner().invoke(main, ["policy", "test", str(shipped.CASES)])
    assert result.exit_code == 0, result.output


def test_who_can(place: Path) -> None:
    """Sources, how they ask, by which rule."""
    result = run(place, "who-can", "t.S", "vault")
    assert result.exit_code == 0
    assert "work\n" in result.output
    assert "asking for vault" in result.output
    assert "(no target) as u" in result.output
    assert run(place, "who-can", "t.S", "dom0").exit_code == 1
    result = run(place, "who-can", "t.S", "valut")
    assert (result.exit_code, "did you mean vault" in result.output) == (125, True)
    found = json.loads(run(place, "who-can", "--json", "t.S", "mail").output)
    assert {(way["source"], way["decision"]) for way in found} == {("work", "ask")}


def test_what_can(place: Path) -> None:
    """What is reached, directly and through others."""
    result = run(place, "what-can", "work")
    assert result.exit_code == 0
    for word in ("directly:", "vault", "rem1", "relay", "ask   t.S+*", "allow t.S+*"):
        assert word in result.output
    assert run(place, "what-can", "vault").exit_code == 1
    found = json.loads(run(place, "what-can", "--json", "--no-ask", "--direct", "work").output)
    assert {step["domain"] for step in found} == {"vault", "rem1", "relay"}


def test_what_disposables_and_dom0_can(place: Path) -> None:
    """A new disposable calls by its tags and class; dom0 is not asked about, it is obeyed."""
    (place / "p/40-disposables.policy").write_text("t.D * @type:DispVM mail allow\n")
    result = run(place, "what-can", "@dispvm:dvm-web")
    assert (result.exit_code, "mail\n      allow t.D+*" in result.output) == (0, True)
    result = run(place, "who-can", "t.D", "mail")
    assert "disposable of dvm-web" in result.output
    for name in ("dom0", "@adminvm"):
        result = run(place, "what-can", name)
        assert (result.exit_code, "not subject to policy" in result.output) == (125, True)
    result = run(place, "who-can", "t.D", "@dispvm")
    assert (result.exit_code, "@dispvm:NAME" in result.output) == (125, True)


def test_diff(place: Path) -> None:
    """Directories and files; nothing, something, as text and JSON."""
    both = (str(place / "p"), str(place / "q"))
    result = run(place, "diff", *both)
    assert result.exit_code == 1
    assert "allow  =>  deny" in result.output
    assert "for example work -> vault t.S+:" in result.output
    assert "q/30-user.policy:1" in result.output
    assert run(place, "diff", both[0], both[0]).exit_code == 0
    file = str(place / "p/30-user.policy")
    assert run(place, "diff", file, both[0]).exit_code == 0
    groups = json.loads(run(place, "diff", "--json", *both).output)
    assert {(one["old"], one["new"]) for one in groups} == {
        ("allow", "deny"), ("ask default=mail", "ask default=mail -vault"),
    }  # fmt: skip
    denied = next(one for one in groups if one["new"] == "deny")
    assert denied["pairs"] == [{"source": "work", "target": "vault"}]


def test_graph(place: Path) -> None:
    """The form follows the name of the file."""
    for name, start in (("g.svg", "<?xml"), ("g.html", "<!DOCTYPE"), ("g.dot", "digraph")):
        assert run(place, "graph", "-o", str(place / name)).exit_code == 0
        assert (place / name).read_text().startswith(start)
    result = run(place, "graph", "--format", "dot", "--domain", "mail")
    assert '"work" -> "mail"' in result.output
    assert '"work" -> "vault"' not in result.output


def test_system_of_sluice(tmp_path: Path) -> None:
    """Without options the tools take rules and domains of the system below --root."""
    config = tmp_path / "config"
    (config / "policy.d").mkdir(parents=True)
    (config / "policy.d/30-user.policy").write_text("t.S * one two allow\n")
    (config / "system.toml").write_text(
        '[domains.one]\nclass = "AppVM"\n[domains.two]\nclass = "AppVM"\n'
    )
    result = CliRunner().invoke(
        main, ["policy", "explain", "--root", str(tmp_path), "one", "two", "t.S"]
    )
    assert result.exit_code == 0, result.output
    assert "allow target=two" in result.output
    assert not (tmp_path / "state").exists()  # a question leaves nothing behind


def test_no_domains_known(tmp_path: Path) -> None:
    """A hint, no traceback."""
    (tmp_path / "p").mkdir()
    arguments = ["policy", "explain", "--root", str(tmp_path), "a", "b", "t.S"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 125
    assert "--system-info" in result.output


def lint_by_name(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Run qubes-policy-lint; return its status and what it printed."""
    status = qubes_lint(arguments)
    return status, capsys.readouterr().out.splitlines()


@pytest.mark.spec("POL-211", "POL-212", "POL-213")
def test_qubes_policy_lint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its output and exit statuses; every file is checked."""
    good, bad, service = tmp_path / "good", tmp_path / "bad", tmp_path / "service"
    good.write_text("# c\nt.S * a b allow\n!include include/no-such\n!compat-4.0\n")
    bad.write_text("t.S * a b permit  \n!include /abs/x\n!include include/a/b\n")
    service.write_text("$anyvm b allow,user=x\n")
    assert lint_by_name(capsys, str(good)) == (0, [])
    status, lines = lint_by_name(capsys, str(bad), str(good), str(tmp_path / "none"))
    assert status == 1
    assert lines[0] == f"{bad}:1: error: invalid action: permit"
    assert lines[1].startswith(f"{bad}:2: error: invalid path /abs/x")
    assert lines[2].startswith(f"{bad}:3: error: invalid path include/a/b")
    assert lines[3] == f"{tmp_path / 'none'}:0: error: File does not exist."
    status, lines = lint_by_name(capsys, "-s", str(bad))
    assert lines[0] == f"{bad}:1: error: invalid action: permit: t.S * a b permit"
    assert lint_by_name(capsys, "-i", str(service)) == (0, [])
    assert lint_by_name(capsys, str(service))[0] == 1
    assert lint_by_name(capsys, "-i", str(good))[0] == 1


@pytest.mark.spec("POL-212")
def test_qubes_policy_lint_launcher() -> None:
    """The program itself, on standard input."""
    found = subprocess.run(
        [launcher("qubes-policy-lint"), "-s", "-"],
        input=b"t.S * a b deny\nnonsense\n",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert found.stdout == b"-:2: error: wrong number of fields: nonsense\n"
    assert (found.returncode, found.stderr) == (1, b"")
    usage = subprocess.run(
        [launcher("qubes-policy-lint")], capture_output=True, timeout=60, check=False
    )
    assert usage.returncode == 2


def test_tools_load_little(place: Path) -> None:
    """One question does not load what only another needs, nor asyncio."""
    code = (
        "import sys; from sluice.cli.main import main\n"
        "try: main.main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "unwanted = ('asyncio', 'sluice.policy.lint', 'sluice.policy.drawing', 'rich')\n"
        "bad = [name for name in unwanted if name in sys.modules]; assert not bad, bad"
    )
    options = ["--policy-dir", str(place / "p"), "--system-info", str(place / "world.json")]
    arguments = ["policy", "explain", *options, "work", "vault", "t.S"]
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments], timeout=60, capture_output=True, check=False
    )
    assert (found.returncode, found.stderr) == (0, b"")
