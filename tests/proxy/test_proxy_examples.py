"""The examples run as they stand, and the documentation of filters says what is so."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from sluice.proxy.configuration import load
from sluice.proxy.loader import Filters
from sluice.proxy.playbook import (
    DST2SRC,
    SRC2DST,
    aborts,
    after,
    begins,
    closed,
    data,
    ends,
    eof,
    mode,
    nothing,
    passes,
    paused,
    play,
)

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "filters"
FILES = sorted(EXAMPLES.glob("*.py"))
CODE = "from sluice.cli.main import main; main()"


def example(name: str) -> type[Any]:
    return Filters([str(EXAMPLES)]).get(name)


def test_there_are_eight_or_more_and_each_is_checked_and_explained() -> None:
    assert len(FILES) >= 8
    readme = (EXAMPLES / "README.md").read_text()
    for file in FILES:
        example(file.stem)
        assert f"`{file.name}`" in readme
        assert len(file.read_text().splitlines()) <= 60


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_each_runs_from_the_command_line(file: Path) -> None:
    options = {
        "require_magic": ":magic=hello", "heartbeat": ":every=10s",
        "office_hours": ":first=0,last=23",
    }  # fmt: skip
    answers = {
        "upper": b"HELLO\nX\n", "greeting": b"hello\nx\nchecked by sluice\n",
        "fixed_answer": b"no\n", "first_line": b"hello\n",
    }  # fmt: skip
    word = f"{file}{options.get(file.stem, '')}"
    done = subprocess.run(
        [sys.executable, "-c", CODE, "proxy", "run", "--filter", word, "--", "cat"],
        input=b"hello\nx\n",
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == answers.get(file.stem, b"hello\nx\n")
    if file.stem == "digest":
        assert b"sha256" in done.stderr


def test_office_hours() -> None:
    book = play(example("office-hours"), first=9, last=17)
    book.wall = 12 * 3600.0
    book << begins()
    book = play(example("office-hours"))
    book.wall = 20 * 3600.0
    book << aborts("work calls at 20 o'clock", "filter")


def test_require_magic() -> None:
    book = play(example("require-magic"), magic="#!x")
    book >> data(SRC2DST, b"#") << nothing()
    book >> data(SRC2DST, b"!xy") << passes(b"#!xy") << mode(SRC2DST, "splice")
    play(example("require-magic"), magic="#!x") >> data(SRC2DST, b"#?") << aborts("as it must")
    play(example("require-magic"), magic="ab") >> eof(SRC2DST) << aborts("ended before")


def test_heartbeat() -> None:
    book = play(example("heartbeat"), every=5)
    book >> after(5) << passes(b".", DST2SRC)
    book >> data(DST2SRC, b"x") << passes(b"x")
    book >> after(5) << passes(b".", DST2SRC)
    book >> eof(DST2SRC) << ends(DST2SRC)
    book >> after(50) << nothing()


def test_one_at_a_time() -> None:
    book = play(example("one-at-a-time"))
    book >> data(SRC2DST, b"a") << passes(b"a") << paused(SRC2DST, False)
    book >> data(SRC2DST, b"b\n") << passes(b"b\n") << paused(SRC2DST)
    book >> data(DST2SRC, b"c") << passes(b"c") << paused(SRC2DST, False)


def test_fixed_answer_and_first_line_and_digest() -> None:
    book = play(example("fixed-answer"), text="no")
    book >> data(SRC2DST, b"?") << passes(b"no", DST2SRC) << ends(DST2SRC) << ends(SRC2DST)
    book = play(example("first-line"))
    book >> data(SRC2DST, b"a") >> data(SRC2DST, b"b\nc") << passes(b"ab\n") << ends(SRC2DST)
    play(example("first-line")) >> data(SRC2DST, b"x" * 5000) << aborts("too long")
    book = play(example("digest")) >> data(SRC2DST, b"x") << passes(b"x")
    book >> closed()
    assert len(book.log) == 2


def test_the_example_chains_load() -> None:
    configuration = load(str(ROOT / "examples/chains/proxy.toml"))
    assert len(configuration.chains) >= 8
    for chain in configuration.chains.values():
        assert chain.description


PNG = b"\x89PNG\r\n\x1a\n" + b"x" * 5000
CHAINS: dict[str, tuple[bytes, bytes | None]] = {
    "one-way-copy": (b"hello", b""),
    "small-question": (b"hello", b"hello"),
    "seldom": (b"hello", b"hello"),
    "quiet-line": (b"hello", b""),
    "pictures-only": (PNG, PNG),
    "slow": (b"hello", b"hello"),
    "key-value": (b"GET name\nPUT name x\n", b"GET name\nPUT name x\n"),
    "json-lines": (b'{"a": 1}\n', b'{"a": 1}\n'),
    "watch": (b"hello", b"hello"),
}
REFUSED = {
    "small-question": b"x" * 5000, "pictures-only": b"MZ" + b"x" * 5000,
    "key-value": b"DELETE name\n", "json-lines": b"{a}\n",
}  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
def test_each_example_chain_runs(chain: str, tmp_path: Path) -> None:
    def run(data: bytes) -> subprocess.CompletedProcess[bytes]:
        config = str(ROOT / "examples/chains/proxy.toml")
        return subprocess.run(
            [sys.executable, "-c", CODE, "proxy", "run", "--config", config, "--chain", chain,
             "--", "cat"],
            input=data, capture_output=True, timeout=60,
            env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
        )  # fmt: skip

    data, answer = CHAINS[chain]
    done = run(data)
    assert (done.returncode, done.stdout) == (0, answer), done.stderr
    if chain in REFUSED:
        done = run(REFUSED[chain])
        assert done.returncode == 126 and done.stdout == b""


def test_every_example_chain_is_run() -> None:
    configuration = load(str(ROOT / "examples/chains/proxy.toml"))
    assert list(configuration.chains) == list(CHAINS)


# --- documentation --------------------------------------------------------------------------------


def build_docs() -> Any:
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs/filters/build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_of_the_filters_are_made_from_the_classes() -> None:
    pages = build_docs().pages()
    directory = ROOT / "docs/filters"
    assert {path.name for path in directory.glob("*.md")} == set(pages)
    for name, text in pages.items():
        assert (directory / name).read_text() == text, f"{name}: run docs/filters/build.py"


def test_the_guide_to_writing_a_filter_works_as_it_is_written(tmp_path: Path) -> None:
    text = (ROOT / "docs/writing-a-filter.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    first, tests, more, mended = blocks[:4]
    (tmp_path / "shout.py").write_text(first)
    (tmp_path / "test_shout.py").write_text(tests)

    def pytest_run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        )

    assert pytest_run().returncode == 0
    (tmp_path / "test_shout.py").write_text(tests + more)
    assert pytest_run().returncode == 1
    head = first[: first.index("    def __init__")]
    (tmp_path / "shout.py").write_text(head + textwrap.indent(mended, "    "))
    assert pytest_run().returncode == 0
    for words, data_, code, out in (
        ([f"{tmp_path}/shout.py"], b"hello\n", 0, b"HELLO\n"),
        ([f"{tmp_path}/shout.py"], b"psst\n", 126, b""),
        ([f"{tmp_path}/shout.py:forbidden=hush"], b"hush\n", 126, b""),
    ):
        done = subprocess.run(
            [sys.executable, "-c", CODE, "proxy", "run", "--filter", *words, "--", "cat"],
            input=data_,
            capture_output=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (code, out)
