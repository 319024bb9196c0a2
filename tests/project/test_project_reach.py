"""Root's tests run programs as other users wherever the checkout lies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import reach

PROGRAM = """
import os, pathlib, subprocess, sys
sys.path.insert(0, sys.argv[1])
from tests.support import reach
checkout = pathlib.Path(sys.argv[2])
reach.open_way(checkout)
assert reach.closed(checkout) is None
assert os.getcwd() == str(checkout)
become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
for place in (checkout, "."):
    subprocess.run([*become, "cat", f"{place}/program"], check=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_others_reach_a_checkout_below_a_closed_directory(tmp_path: Path) -> None:
    # pytest's own directories above are closed as well.
    checkout = tmp_path / "closed" / "below" / "checkout"
    checkout.mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    (tmp_path / "closed" / "secret").write_text("root's")
    (checkout / "program").write_text("run\n")
    assert reach.closed(checkout) is not None
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[2]), str(checkout)],
        cwd=checkout, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "run\nrun\n", "")
    # Outside nothing has changed.
    assert (tmp_path / "closed" / "secret").read_text() == "root's"
    assert reach.closed(checkout) is not None
