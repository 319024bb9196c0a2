"""``sluice up``: one AdminVM for what it uses, whatever the paths say."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

import pytest
from tests.support.system import make_system

from sluice.cli.up import only_one, ready_line
from sluice.domains.model import DomainConfig
from sluice.domains.paths import Paths
from sluice.domains.registry import Registry
from sluice.domains.sandbox.bubblewrap import Bubblewrap
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


def test_a_missing_program_is_told_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LocalError, match=r"bwrap is not installed \(Debian: bubblewrap\)"):
        Bubblewrap(Paths(Path("/a"), Path("/b"), Path("/c")))


@pytest.mark.parametrize(
    ("autostart", "running", "told"),
    [(True, 2, False), (True, 1, True), (True, 0, True), (False, 0, False)],
)
def test_domains_that_did_not_start_are_told(autostart: bool, running: int, told: bool) -> None:
    domains = [
        DomainConfig(name=name, qid=qid, uuid=str(qid), autostart=autostart)
        for qid, name in enumerate(("work", "vault"), 1)
    ]
    names = {"work", "vault"} if running == 2 else {"work"} if running else set()
    line = ready_line(Registry(domains), names)
    assert line.startswith(f"ready: {running} of 2 domains run")
    assert ("`sluice doctor`" in line) is told


def test_a_policy_that_cannot_be_read_is_told_at_the_start() -> None:
    with make_system("[domains.a]\n", "test.A * a @adminvm allow\ngarbage\n", {}) as system:
        place = system.root / "config/policy.d/30-test.policy"
        with system.up() as running:
            assert f"{place}:2: wrong number of fields" in running.said.decode()
            assert "every call is refused" in running.said.decode()
        place.write_text("test.A * a @adminvm allow\n")
        with system.up() as running:
            assert b"policy" not in running.said
