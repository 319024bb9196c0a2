"""The earlier proxy's ``config.json``: loads as it is, and has the effects that it had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sluice.cli.proxy import command
from sluice.errors import ConfigError
from sluice.proxy.configuration import load
from sluice.proxy.link import Call
from sluice.proxy.playbook import (
    DST2SRC,
    SRC2DST,
    Playbook,
    aborts,
    after,
    begins,
    data,
    ends,
    mode,
    nothing,
    passes,
)

MIB = 1 << 20
# What the earlier proxy shipped, in its own form.
SHIPPED: dict[str, Any] = {
    "description": "chains of plugins; positions or names are the keys of config",
    "pass": {"description": "passes all", "plugins": ["pass"]},
    "3pass": {"description": "passes all, three times", "plugins": ["pass", "pass", "pass"]},
    "none": {"description": "no plugin", "plugins": []},
    "limit": {
        "plugins": ["byte_limit"],
        "config": {"byte_limit": {"src2dst_limit": 10 * MIB, "dst2src_limit": 2 * MIB}},
    },
    "src2dst": {"plugins": ["stop_dst"]},
    "dst2src": {"plugins": ["stop_src"]},
    "sniff": {
        "plugins": ["sniff"], "config": {"0": {"decode": "str", "encoding": "ascii"}},
    },
    "timeout": {
        "plugins": ["timeout"],
        "config": {"timeout": {"src2dst_timeout": 1, "dst2src_timeout": 1}},
    },
    "streamline": {
        "plugins": ["streamline"],
        "config": {"streamline": {"buf_size": 10 * MIB, "delay_read": 0.5, "delay_write": 10}},
    },
    "count": {"plugins": ["count"], "config": {"count": {"limit": 2, "limit_interval": 180}}},
    "one-way": {
        "plugins": ["streamline", "timeout", "stop_dst"],
        "config": {"timeout": {"src2dst_timeout": 5, "dst2src_timeout": 5}},
    },
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHIPPED))
    return str(path)


def book(file: str, chain: str, **more: Any) -> Playbook:
    configuration = load(file)
    found = configuration.chain(chain)
    found.permit(Call("anybody", "anywhere", "any.Thing"), explicit=True)
    return Playbook(found.uses, Call("work", "vault", "x", chain=chain), **more)


@pytest.mark.spec("PROXY-016")
def test_it_loads_with_all_its_chains(file: str) -> None:
    assert len(load(file).chains) == 11
    result = CliRunner().invoke(command, ["check", "--config", file])
    assert result.exit_code == 0 and result.output.count("any call may use it") == 11


@pytest.mark.spec("PROXY-016")
@pytest.mark.parametrize("chain", ["pass", "3pass", "none"])
def test_pass(file: str, chain: str) -> None:
    made = book(file, chain) << mode(SRC2DST, "splice") << mode(DST2SRC, "splice")
    made >> data(SRC2DST, b"a") << passes(b"a", SRC2DST)
    made >> data(DST2SRC, b"b") << passes(b"b", DST2SRC)


@pytest.mark.spec("PROXY-016")
def test_limit(file: str) -> None:
    made = book(file, "limit")
    made >> data(SRC2DST, b"x" * 10 * MIB) << passes(b"x" * 10 * MIB) << ends(SRC2DST)
    made >> data(DST2SRC, b"x" * (2 * MIB + 1)) << passes(b"x" * 2 * MIB) << ends(DST2SRC)
    made >> data(SRC2DST, b"more") << nothing()


@pytest.mark.spec("PROXY-016")
def test_one_direction_only(file: str) -> None:
    made = book(file, "src2dst") << ends(DST2SRC) << mode(DST2SRC, "discard")
    made >> data(SRC2DST, b"a") << passes(b"a")
    made = book(file, "dst2src") << ends(SRC2DST) << mode(SRC2DST, "discard")
    made >> data(DST2SRC, b"a") << passes(b"a")


@pytest.mark.spec("PROXY-016", "PROXY-017")
def test_sniff_logs_ascii(file: str) -> None:
    made = book(file, "sniff") >> data(SRC2DST, b"hello\n") << passes(b"hello\n")
    assert made.log == [r"sniff: src2dst: hello\x0a"]


@pytest.mark.spec("PROXY-016")
def test_timeout(file: str) -> None:
    book(file, "timeout") >> after(0.9) << nothing()
    book(file, "timeout") >> after(1) << aborts("has not ended after 1s")


@pytest.mark.spec("PROXY-016")
def test_streamline(file: str) -> None:
    made = book(file, "streamline", chance=0.999) >> after(0.5)
    made >> data(SRC2DST, b"x" * (10 * MIB - 1)) << nothing()
    made >> after(20) << nothing()
    made >> data(SRC2DST, b"y") << nothing()
    made >> after(9.9) << nothing()
    made >> after(0.1) << passes(b"x" * (10 * MIB - 1) + b"y")


@pytest.mark.spec("PROXY-016")
def test_count(file: str, tmp_path: Path) -> None:
    def attempt(at: float) -> Playbook:
        made = book(file, "count", wall=1e9 + at)
        made.tools.state_directory = str(tmp_path / "state")
        return made

    attempt(0) << begins()
    attempt(60) << begins()
    attempt(179) << aborts("2 calls in 3m")
    attempt(181) << begins()


@pytest.mark.spec("PROXY-016")
def test_one_way(file: str) -> None:
    made = book(file, "one-way", chance=0.5) >> after(0.3) << ends(DST2SRC)
    made >> data(DST2SRC, b"no") << nothing()
    made >> data(SRC2DST, b"x" * 10 * MIB) >> after(0.3) << passes(b"x" * 10 * MIB)
    made >> after(5) << aborts("has not ended after 5s")
    assert [use.cls.name for use in load(file).chain("one-way").uses] == [
        "streamline", "timeout", "stop-dst"]  # fmt: skip


@pytest.mark.spec("PROXY-017")
def test_positions_win_over_names_and_count_from_0(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    chain = {
        "plugins": ["pass", "byte_limit", "byte_limit"],
        "config": {"byte_limit": {"src2dst_limit": 7}, "1": {"src2dst_limit": 3}},
    }
    path.write_text(json.dumps({"x": chain, "note": "not a chain"}))
    uses = load(str(path)).chain("x").uses
    assert [getattr(use.options, "src2dst", None) for use in uses] == [None, 3, 7]
    # The ends of the call are not among them.
    chain["plugins"] = ["default", "pass", "byte_limit", "default"]
    path.write_text(json.dumps({"x": chain}))
    uses = load(str(path)).chain("x").uses
    assert [use.cls.name for use in uses] == ["pass", "byte-limit"]
    assert uses[1].options.src2dst == 3


@pytest.mark.spec("PROXY-013", "PROXY-016")
@pytest.mark.parametrize(
    ("content", "part"),
    [("[]", "must be an object"), ("{", r"config\.json:1: no valid JSON"),
     ('{"x": {"plugins": "pass"}}', "must be a list"),
     ('{"x": {"plugins": ["pas"]}}', "unknown filter 'pas'"),
     ('{"x": {"plugins": ["timeout"], "config": {"timeout": {"src2ds": 1}}}}', "'src2dst'"),
     ('{"x": {"plugins": ["timeout"], "config": []}}', "must be an object"),
     ('{"x": {"pluggins": ["stop_dst"]}}', r"x\.pluggins: unknown key .did you mean 'plugins'"),
     ('{"x": {"plugins": ["timeout"], "config": {"timeot": {}}}}', "did you mean 'timeout'"),
     ('{"x": {"plugins": ["pass"], "confg": {}}}', "did you mean 'config'"),
     ('{"a b": {"plugins": []}}', "illegal name")],
)  # fmt: skip
def test_mistakes_in_it(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=part):
        load(str(path))


@pytest.mark.spec("PROXY-016")
def test_what_the_earlier_proxy_did_not_look_at_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = {"0": {}, "7": {}, "stop_src": {}, "src_plugin": {}, "note": {}}
    entry = {"plugins": ["stop_dst"], "comment": "x", "config": config}
    path.write_text(json.dumps({"x": entry, "version": 3}))
    assert list(load(str(path)).chains) == ["x"]


@pytest.mark.spec("PROXY-016")
def test_import_prints_toml_of_the_same_effect(file: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["import", file])
    assert result.exit_code == 0
    path = tmp_path / "proxy.toml"
    path.write_text(result.output)
    old, new = load(file), load(str(path))
    assert list(new.chains) == list(old.chains)
    for name, chain in old.chains.items():
        assert [(u.cls, vars(u.options)) for u in chain.uses] == [
            (u.cls, vars(u.options)) for u in new.chains[name].uses
        ]
