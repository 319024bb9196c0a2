"""Finding out whether subordinate ids can be used, with programs of the test in their place."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sluice.domains.sandbox.ids import obstacle


def program(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("newuidmap", "newgidmap"):
        program(tmp_path, name, "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_where_user_namespaces_are_forbidden_nothing_is_waited_for(programs: Path) -> None:
    """Asked for maps there too, some versions of unshare wait for a child that waits for them."""
    refuse = "echo 'unshare: unshare failed: No space left on device' >&2; exit 1"
    program(programs, "unshare", f'case "$*" in *map*) exec sleep 100 ;; esac; {refuse}')
    begun = time.monotonic()
    assert obstacle() == "unshare: unshare failed: No space left on device"
    assert time.monotonic() - begun < 10


OLD = "unshare: unrecognized option '--map-auto'"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 0", ""),
        ("case $* in *map*) echo 'newuidmap: not allowed' >&2; exit 1;; esac", "newuidmap: not"),
        (f'case $* in *map*) echo "{OLD}" >&2; exit 1;; esac', ""),
    ],
)
def test_what_unshare_says_of_maps(programs: Path, script: str, said: str) -> None:
    program(programs, "unshare", script)
    assert obstacle().startswith(said) and bool(obstacle()) is bool(said)
