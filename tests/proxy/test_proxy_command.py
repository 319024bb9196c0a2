"""The command form: a chain between our own streams and a program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = "from sluice.cli.main import main; main()"


def run(*words: str, data: bytes = b"", timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", CODE, "proxy", "run", *words],
        input=data,
        capture_output=True,
        timeout=timeout,
    )


@pytest.mark.spec("PROXY-011")
def test_it_joins_a_local_program(tmp_path: Path) -> None:
    config = tmp_path / "proxy.toml"
    config.write_text(
        '[proxy]\naudit = "none"\nlog = "stderr"\n[chains.one-way]\nfilters = ["stop-dst"]\n'
    )
    done = run("--filter", "byte-limit:dst2src=3", "--", "cat", data=b"hello")
    assert (done.returncode, done.stdout) == (0, b"hel")
    done = run(
        "--config", str(config), "--chain", "one-way", "--", "sh", "-c", "cat >&2; echo x; exit 3",
        data=b"hello",
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"hello")


@pytest.mark.spec("PROXY-011", "PROXY-012")
def test_its_exit_code(tmp_path: Path) -> None:
    assert run("--filter", "pass", "--", "sh", "-c", "exit 42").returncode == 42
    assert run("--filter", "pass", "--", "sh", "-c", "kill -9 $$").returncode == 137
    done = run("--filter", "pass", "--", "/does/not/exist")
    assert done.returncode == 125 and b"/does/not/exist" in done.stderr
    done = run("--filter", "timeout:dst2src=100ms", "--", "sleep", "600")
    assert done.returncode == 126 and b"dst2src has not ended after 100ms" in done.stderr


@pytest.mark.spec("PROXY-011", "PROXY-013")
@pytest.mark.parametrize(
    ("word", "part"),
    [("timeot", "did you mean 'timeout'"), ("timeout:src2ds=1", "'src2dst'"),
     ("timeout:src2dst", "option=value"), ("timeout:src2dst=x", "unknown unit"),
     ("./none.py", "none.py")],
)  # fmt: skip
def test_a_filter_that_cannot_be_meant(word: str, part: str) -> None:
    done = run("--filter", word, "--", "cat")
    assert done.returncode == 125 and part.encode() in done.stderr
    assert b"Traceback" not in done.stderr
