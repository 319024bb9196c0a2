"""The configuration: every mistake gives file, line, key and suggestion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from sluice.cli.proxy import command
from sluice.errors import ConfigError
from sluice.proxy.compiled import load_fast
from sluice.proxy.configuration import load
from sluice.proxy.link import Call
from sluice.proxy.model import RefusedError
from sluice.proxy.paths import audit_file, configuration_files
from sluice.proxy.places import Places
from sluice.proxy.units import parse_duration, parse_size, show_duration, show_size

GOOD = """\
[proxy]
max_calls = 9
max_memory = "1M"

[chains.one-way]
description = "source to target only"
services = ["qubes.Filecopy", "qrexec-mirror"]
targets = ["vault"]
filters = [
  { use = "timeout", src2dst = "5s", dst2src = 2.5 },
  "stop-dst",
  { use = "byte_limit", src2dst = "10M", dst2src = -1 },
]
"""


def written(tmp_path: Path, text: str, name: str = "proxy.toml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_a_good_one_becomes_typed_values(tmp_path: Path) -> None:
    configuration = load(written(tmp_path, GOOD))
    assert configuration.settings.max_calls == 9
    assert configuration.settings.max_memory == 1 << 20
    assert configuration.settings.max_calls_source == 32
    chain = configuration.chain("one-way")
    assert [use.name for use in chain.uses] == ["timeout", "stop-dst", "byte-limit"]
    assert chain.uses[0].options.src2dst == 5.0 and chain.uses[0].options.dst2src == 2.5
    assert chain.uses[2].options.src2dst == 10 << 20 and chain.uses[2].options.dst2src == -1
    assert chain.line == 5


MISTAKES = {
    "syntax": ("[chains.x]\nfilters = [", 2, "no valid TOML", ""),
    "syntax in the middle": ("[proxy]\nmax_calls 9\n[chains]", 2, "no valid TOML", ""),
    "unknown table": ("[proxi]\n", 1, "proxi", "did you mean 'proxy'?"),
    "unknown setting": ("[proxy]\n\nmax_cals = 3\n", 3, "proxy.max_cals", "'max_calls'"),
    "wrong type": ("[proxy]\nmax_calls = 'x'\n", 2, "proxy.max_calls", "a whole number"),
    "a number out of range": ("[proxy]\nmax_calls = 0\n", 2, "proxy.max_calls", "from 1"),
    "bad size": ("[proxy]\nmax_memory = '3 apples'\n", 2, "proxy.max_memory", "a size"),
    "negative size": ("[proxy]\nmax_memory = -1\n", 2, "proxy.max_memory", "a size"),
    "bad choice": ("[proxy]\non_closed_reader = 'abrt'\n", 2, "on_closed_reader", "'abort'"),
    "no such directory": ("[proxy]\nfilters = ['/none']\n", 2, "proxy.filters[0]", ""),
    "proxy no table": ("proxy = 3\n", 1, "proxy", "[proxy]"),
    "chain no table": ("[chains]\nx = 1\n", 2, "chains.x", "[chains.x]"),
    "chain name": ('[chains."a b"]\nfilters = []\n', 1, "chains.a b", "1 to 64"),
    "no filters": ("[chains.x]\ndescription = ''\n", 1, "chains.x.filters", "a list"),
    "filters no list": ("[chains.x]\nfilters = 'pass'\n", 2, "chains.x.filters", "a list"),
    "unknown key of a chain": (
        "[chains.x]\nfilters = []\nservice = []\n", 3, "chains.x.service", "'services'"),
    "services no list": (
        "[chains.x]\nfilters = []\nservices = 3\n", 3, "chains.x.services", "it takes"),
    "any in a list": (
        "[chains.x]\nfilters = []\ntargets = ['a', 'any']\n", 3, "targets[1]", 'targets = "any"'),
    "illegal target": (
        "[chains.x]\nfilters = []\ntargets = [\n 'a',\n 'b c']\n", 5, "chains.x.targets[1]", ""),
    "illegal service": (
        "[chains.x]\nfilters = []\nservices = ['a/b']\n", 3, "chains.x.services[0]", ""),
    "unknown filter": (
        "[chains.x]\nfilters = [\n 'pass',\n 'timeot',\n]\n", 4, "filters[1]", "'timeout'"),
    "unknown filter in a table": (
        "[chains.x]\nfilters = [{ use = 'nonesuch' }]\n", 2, "chains.x.filters[0]", ""),
    "no use": ("[chains.x]\nfilters = [\n\n{ src2dst = 1 }]\n", 4, "filters[0]", "use ="),
    "a number as filter": ("[chains.x]\nfilters = [3]\n", 2, "chains.x.filters[0]", "use ="),
    "unknown option": (
        "[chains.x]\nfilters = [\n{ use = 'timeout', src2dts = 1 }]\n", 3,
        "chains.x.filters[0].src2dts", "'src2dst'"),
    "option of a wrong type": (
        "[chains.x]\nfilters = [{ use = 'timeout', src2dst = [] }]\n", 2, "[0].src2dst",
        "a duration"),
    "option out of range": (
        "[chains.x]\nfilters = [{ use = 'timeout', src2dst = -2 }]\n", 2, "[0].src2dst", ""),
    "option with a wrong unit": (
        "[chains.x]\nfilters = [{ use = 'timeout', src2dst = '5y' }]\n", 2, "[0].src2dst", "unit"),
    "option with a wrong word": (
        "[chains.x]\nfilters = [{ use = 'byte-limit', over = 'abrt' }]\n", 2, "[0].over",
        "'abort'"),
    "an option twice": (
        "[chains.x]\nfilters = [{ use = 'timeout', src2dst = 1, src2dst_timeout = 2 }]\n", 2,
        "[0].src2dst_timeout", ""),
    "an option where there is none": (
        "[chains.x]\nfilters = [{ use = 'pass', x = 1 }]\n", 2, "[0].x", "takes no options"),
    "one name that is no list": (
        "[chains.x]\nfilters = []\nsources = 'work'\n", 3, "chains.x.sources", "'work' is not"),
    "a misspelt any": (
        "[chains.x]\nfilters = []\nsources = 'ayn'\n", 3, "chains.x.sources", "'any'?"),
    "a misspelt word of a chain": (
        "[chains.x]\nfilters = []\non_closed_reader = 'abrt'\n", 3, "on_closed_reader",
        "'abort'?"),
    "a number as text": (
        "[chains.x]\nfilters = [{ use = 'count', interval = 1, limit = '1' }]\n", 2, "[0].limit",
        "a whole number"),
    "memory for nothing": ("[proxy]\nmax_memory = 0\n", 2, "proxy.max_memory", "from 1M"),
    "a patience of nothing": ("[proxy]\nfar_timeout = 0\n", 2, "proxy.far_timeout", "100ms"),
    "rotated for each record": ("[proxy]\naudit_max = 1\n", 2, "proxy.audit_max", "from 64k"),
    "a misspelt log": ("[proxy]\nlog = 'jurnal'\n", 2, "proxy.log", "'journal'?"),
    "a log somewhere": ("[proxy]\nlog = 'x/y.log'\n", 2, "proxy.log", "absolute path"),
    "an audit file somewhere": ("[proxy]\naudit = 'a'\n", 2, "proxy.audit", "absolute path"),
    "a state somewhere": ("[proxy]\nstate = 'a'\n", 2, "proxy.state", "absolute path"),
    "filters somewhere": ("[proxy]\nfilters = ['.']\n", 2, "proxy.filters[0]", "absolute path"),
    "metrics for everybody": (
        "[proxy]\nmetrics = '0.0.0.0:9101'\n", 2, "proxy.metrics", "127.0.0.1:9101"),
    "metrics nowhere": ("[proxy]\nmetrics = 'here'\n", 2, "proxy.metrics", "loopback"),
}  # fmt: skip

# Options of filters that cannot be meant: what stands in the braces after ``use``.
OPTIONS = {
    "no such encoding": ("sniff", "encoding = 'utf-9'", "encoding", "no known encoding"),
    "an encoding with a NUL": ("sniff", 'encoding = "a\\u0000"', "encoding", "no known encoding"),
    "no encoding of text": ("sniff", "encoding = 'base64'", "encoding", "no known encoding"),
    "an encoding that stops": ("sniff", "encoding = 'idna'", "encoding", "cannot show every byte"),
    "a state somewhere": (
        "count", "limit = 1, interval = 1, state = 'x'", "state", "absolute path"),
    "places somewhere": ("concurrent", "limit = 1, state = 'x'", "state", "absolute path"),
    "counters somewhere": ("metrics", "state = 'x'", "state", "absolute path"),
    "an interval of nothing": ("count", "limit = 1, interval = 0", "interval", "longer than 0"),
    "a schema somewhere": ("json", "src2dst = 'x.json'", "src2dst", "absolute path"),
    "nothing to be JSON": ("json", "max_depth = 3", "src2dst", "or dst2src"),
    "no rules for lines": ("lines", "max_line = 3", "src2dst", "or dst2src"),
    "no program": ("program", "confine = true", "src2dst", "or dst2src"),
    "no kind and no size": ("content", "preview = 99", "allow", "deny or max_size"),
    "no such group": (
        "lines", "src2dst = { replace = { 'a(b)' = '\\2' } }", "src2dst", "no replacement"),
    "half an escape": (
        "lines", "src2dst = { replace = { 'a' = 'x\\' } }", "src2dst", "no replacement"),
    "a newline by its number": (
        "lines", "src2dst = { replace = { 'a' = '\\x0a' } }", "src2dst", "newline"),
    "records where others write": (
        "record", "directory = '/tmp'", "directory", "can be written by others"),
}  # fmt: skip


@pytest.mark.spec("PROXY-013")
@pytest.mark.parametrize("kind", OPTIONS)
def test_an_option_that_cannot_be_meant_is_named(tmp_path: Path, kind: str) -> None:
    name, options, key, message = OPTIONS[kind]
    path = written(tmp_path, f"[chains.x]\nfilters = [\n  {{ use = '{name}', {options} }},\n]\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:3: chains.x.filters[0].{key}: filter '{name}': ")
    assert message in str(caught.value)


@pytest.mark.spec("PROXY-013")
def test_check_says_where_a_filter_limits_nothing(tmp_path: Path) -> None:
    names = ("byte-limit", "timeout", "idle-timeout", "throttle")
    filters = ", ".join(f'"{name}"' for name in names)
    path = written(tmp_path, f"[chains.x]\nfilters = [{filters}]\n")
    result = CliRunner().invoke(command, ["check", "--config", path])
    assert result.exit_code == 0
    assert result.output.count("nothing is set: it hinders no call") == len(names)
    path = written(tmp_path, "[chains.x]\nfilters = [{ use = 'timeout', src2dst = 1 }]\n")
    assert "nothing is set" not in CliRunner().invoke(command, ["check", "--config", path]).output


@pytest.mark.spec("PROXY-013")
@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_named_with_file_line_key_and_suggestion(tmp_path: Path, kind: str) -> None:
    text, line, key, suggestion = MISTAKES[kind]
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    error = caught.value
    assert (error.file, error.line) == (path, line)
    assert key in str(error)
    assert suggestion in str(error)
    result = CliRunner().invoke(command, ["check", "--config", path])
    assert result.exit_code == 125
    assert f"{path}:{line}: " in result.output


@pytest.mark.spec("PROXY-013")
def test_check_prints_every_chain_as_it_will_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["check", "--config", written(tmp_path, GOOD)])
    assert result.exit_code == 0
    for part in (
        "chain one-way", "targets:  vault", "1. timeout", "src2dst = 5s", "dst2src = 2.5s",
        "2. stop-dst", "3. byte-limit", "src2dst = 10M", "over = \"discard\"   (default)",
        "1 chain, no mistakes",
    ):  # fmt: skip
        assert part in result.output


@pytest.mark.spec("PROXY-013")
def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        load(str(tmp_path / "none.toml"))
    (tmp_path / "latin.toml").write_bytes(b"[proxy]\n# \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.toml:2: is not UTF-8"):
        load(str(tmp_path / "latin.toml"))
    with pytest.raises(ConfigError, match=r"has no proxy\.toml"):
        load(str(tmp_path))


def test_drop_in_files_are_read_in_byte_order_after_the_main_one(tmp_path: Path) -> None:
    (tmp_path / "proxy.d").mkdir()
    written(tmp_path, "[proxy]\nmax_calls = 1\n")
    written(tmp_path, "[proxy]\nmax_calls = 2\n[chains.b]\nfilters=[]\n", "proxy.d/20.toml")
    written(tmp_path, "[proxy]\nmax_calls = 3\n[chains.a]\nfilters=[]\n", "proxy.d/10.toml")
    written(tmp_path, "[chains.c]\nnonsense", "proxy.d/30.toml.off")
    configuration = load(str(tmp_path))
    assert configuration.settings.max_calls == 2
    assert list(configuration.chains) == ["a", "b"]
    path = written(tmp_path, "\n[chains.b]\nfilters=[]\n", "proxy.d/30.toml")
    with pytest.raises(ConfigError, match=r"30\.toml:2: chains\.b: is defined already in .*20"):
        load(str(tmp_path))
    assert path


def test_where_it_is_looked_for(tmp_path: Path) -> None:
    home = tmp_path / "home/.config/sluice"
    home.mkdir(parents=True)
    (home / "proxy.toml").write_text("")
    env = {"HOME": str(tmp_path / "home")}
    assert configuration_files(None, env) == [str(home / "proxy.toml")]
    env["SLUICE_PROXY_CONFIG"] = "/else.toml"
    assert configuration_files(None, env) == ["/else.toml"]
    assert configuration_files("/given.toml", env) == ["/given.toml"]


@pytest.mark.spec("PROXY-015")
def test_rules_of_a_chain(tmp_path: Path) -> None:
    chain = load(written(tmp_path, GOOD)).chain("one-way")
    chain.permit(Call("work", "vault", "qrexec-mirror"), explicit=True)
    with pytest.raises(RefusedError, match="'bank' is not among its targets"):
        chain.permit(Call("work", "bank", "qrexec-mirror"), explicit=True)
    chain.services = None
    with pytest.raises(ConfigError, match=r"chains\.one-way\.services"):
        chain.permit(Call("work", "vault", "qrexec-mirror"), explicit=True)
    chain.permit(Call("work", "vault", "x"), explicit=False)


def test_places_of_all_kinds_of_toml() -> None:
    text = (
        '# [a]\n[a]\nb = "]#[" # x = 1\n"c d" = [ # [\n  1, "x,y",\n'
        "  { e = [ 1,\n 2 ], f.g = 3 },\n]\n"
        "h.i = '''\n[z]\n'''\n[[k]]\nl = 1\n[[k]]\nl = 2\n[k.m]\nn = 1\n"
    )
    places = Places(text)
    for path, line in {
        ("a",): 2, ("a", "b"): 3, ("a", "c d"): 4, ("a", "c d", 1): 5, ("a", "c d", 2, "e"): 6,
        ("a", "c d", 2, "e", 1): 7, ("a", "c d", 2, "f", "g"): 7, ("a", "h", "i"): 9,
        ("k", 0, "l"): 13, ("k", 1, "l"): 15, ("k", 1, "m", "n"): 17, ("nothing",): None,
        ("a", "unknown"): 2,
    }.items():  # fmt: skip
        assert places.line(path) == line, path


def test_durations_and_sizes() -> None:
    assert [parse_duration(v) for v in ("500ms", "5s", "2m", "1h", 3, 0.5, "7")] == [
        0.5, 5.0, 120.0, 3600.0, 3.0, 0.5, 7.0]  # fmt: skip
    assert [parse_size(v) for v in (7, "7", "64k", "10M", "1G")] == [
        7, 7, 65536, 10 << 20, 1 << 30]  # fmt: skip
    for bad in ("", "x", "5 y", "-1", "1e9", "inf", "nan", "1_0", "٣", True, "1.2.3", float("nan")):
        with pytest.raises(ValueError):
            parse_duration(bad)
    for bad in ("", "k", "1.5M", "-1", -1, "1_0", True, "٣", 1 << 61, 1.5):
        with pytest.raises(ValueError):
            parse_size(bad)  # type: ignore[arg-type]
    assert [show_duration(v) for v in (0.5, 5, 120, 3600, 90, -1)] == [
        "500ms", "5s", "2m", "1h", "90s", "never"]  # fmt: skip
    assert [show_size(v) for v in (7, 65536, 10 << 20, -1)] == ["7", "64k", "10M", "no limit"]


# --- the compiled form --------------------------------------------------------------------


def fast(tmp_path: Path, path: str) -> tuple[list[str], bool]:
    """Return the chains and whether they came from what was kept."""
    used: list[str] = []
    configuration = load_fast(path, cache=str(tmp_path / "cache"), on_compile=used.append)
    return list(configuration.chains), not used


def test_what_was_compiled_is_used_until_something_changes(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    assert fast(tmp_path, path) == (["one-way"], False)
    assert fast(tmp_path, path) == (["one-way"], True)
    configuration = load_fast(path, cache=str(tmp_path / "cache"))
    chain = configuration.chain("one-way")
    assert chain.uses[0].options.src2dst == 5.0 and chain.uses[2].options.over == "discard"
    assert configuration.settings.max_calls == 9 and chain.targets == ["vault"]
    written(tmp_path, GOOD + "\n[chains.more]\nfilters = []\n")
    assert fast(tmp_path, path) == (["one-way", "more"], False)


def test_a_compiled_file_of_somebody_else_or_damaged_is_not_used(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    fast(tmp_path, path)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.chmod(0o666)
    assert fast(tmp_path, path) == (["one-way"], False)
    for junk in (b"", b"\x00" * 100, json.dumps({}).encode()):
        kept.write_bytes(junk)
        kept.chmod(0o600)
        assert fast(tmp_path, path) == (["one-way"], False)
    assert fast(tmp_path, path) == (["one-way"], True)


def test_few_configurations_are_kept(tmp_path: Path) -> None:
    for number in range(40):
        path = written(tmp_path, GOOD, f"{number}.toml")
        fast(tmp_path, path)
        assert len(list((tmp_path / "cache").iterdir())) <= 33
    assert fast(tmp_path, path) == (["one-way"], True)


def test_a_new_drop_in_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "proxy.d").mkdir()
    written(tmp_path, GOOD)
    assert fast(tmp_path, str(tmp_path)) == (["one-way"], False)
    written(tmp_path, "[chains.b]\nfilters=[]\n", "proxy.d/20.toml")
    assert fast(tmp_path, str(tmp_path)) == (["one-way", "b"], False)


def test_who_names_a_place_for_state_means_the_audit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system's own log that happens to be there is not written to by somebody's trial."""
    monkeypatch.setattr("sluice.proxy.paths.os.path.isdir", lambda _: True)
    monkeypatch.setattr("sluice.proxy.paths.os.access", lambda *_: True)
    place = {"XDG_STATE_HOME": "/state", "HOME": "/home/user"}
    assert audit_file("", place) == "/state/sluice/proxy/proxy.jsonl"
    assert audit_file("", {"HOME": "/home/user"}) == "/rw/log/sluice/proxy.jsonl"
    assert audit_file("/named", place) == "/named" and audit_file("none", place) is None
