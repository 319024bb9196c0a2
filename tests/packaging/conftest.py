"""What the tests of the packages share: each package is built once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.packaging import ROOT, reason_against


def build(program: str, into: Path, *options: str) -> Path:
    """Build a package and return where it is. Whatever umask people have, it is the same."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "packaging" / program), "--into", str(into), *options],
        capture_output=True, text=True, check=False, umask=0o077,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Debian package."""
    if reason := reason_against():
        pytest.skip(reason)
    return build("build-deb", tmp_path_factory.mktemp("deb"), "--quick")


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the single file."""
    return build("build-zipapp", tmp_path_factory.mktemp("pyz"))
