"""The one-shot programs start in milliseconds because they import next to nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What a small program may load beside modules of Sluice that keep to the same list. The underscored
# ones are built into the interpreter or are what the others are made of.
ALLOWED = {
    "__future__", "_signal", "_socket", "_stat", "_struct", "_thread", "abc", "_abc", "codecs",
    "_codecs", "errno", "fcntl", "genericpath", "os", "os.path", "posix", "posixpath", "select",
    "stat", "struct", "sys", "time", "_collections_abc", "_heapq", "pwd", "io", "_io", "marshal",
    "zipimport",
}  # fmt: skip

PROGRAMS = [
    "sluice.agent.agent",
    "sluice.agent.client_vm",
    "sluice.agent.fork_server",
    "sluice.agent.connect_tcp",
    "sluice.adminvm.client",
    "sluice.proxy.launcher",
]


def loaded(statement: str) -> set[str]:
    """Return the modules that ``statement`` adds to a bare interpreter."""
    code = (
        "import sys; before = set(sys.modules); sys.path.insert(0, sys.argv[1]); "
        f"{statement}; print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-c", code, str(ROOT / "src")],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def surplus(modules: set[str]) -> set[str]:
    return {m for m in modules if m not in ALLOWED and m.split(".")[0] != "sluice"}


def test_the_check_sees_a_dear_import() -> None:
    assert "socket" in surplus(loaded("import socket"))


@pytest.mark.parametrize("module", PROGRAMS)
def test_small_programs_import_next_to_nothing(module: str) -> None:
    extra = surplus(loaded(f"import {module}"))
    assert not extra, f"{module} loads {sorted(extra)}"
