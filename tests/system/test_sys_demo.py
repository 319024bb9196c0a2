"""The demo's steps on real sandboxes: what every newcomer runs first."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 30.0  # seconds, once set up; the demo promises less


@pytest.mark.sandbox
@pytest.mark.alone
@pytest.mark.spec("PROXY-001", "WIRE-175")
@pytest.mark.timeout(300)
def test_demo_shows_all_its_steps() -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    taken = time.monotonic() - begun
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.rstrip("\n").splitlines()[-1]
    found = re.fullmatch(r"demo: (\d+) of (\d+) steps", last)
    assert found and found[1] == found[2] and int(found[2]) == 7
    assert "\033" not in done.stdout, "no colour where there is no terminal"
    assert taken < 5 * DEADLINE
