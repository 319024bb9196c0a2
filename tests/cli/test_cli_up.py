"""``sluice up``: one AdminVM for what it uses, whatever the paths say."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

import pytest

from sluice.cli.up import only_one
from sluice.domains.paths import Paths
from sluice.errors import LocalError


def test_two_sessions_with_other_runtime_directories_share_no_state() -> None:
    """With XDG_RUNTIME_DIR and without it, a user has other sockets but the same domains."""
    root = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    one = Paths(root / "config", root / "state", root / "run")
    other = dataclasses.replace(one, runtime=root / "state/run")
    one.create()
    other.create()
    try:
        locked_once(one, other)
    finally:
        shutil.rmtree(root)


def locked_once(one: Paths, other: Paths) -> None:
    """Two that share a state directory keep each other out."""
    with only_one(one):
        with pytest.raises(LocalError, match="runs here already"), only_one(other):
            pass
        with pytest.raises(LocalError, match="runs here already"), only_one(one):
            pass
    with only_one(other):
        pass
