"""Runs every benchmark of this folder, one after the other: ``make bench``.

Options are passed on to none of them; run one alone to change its sizes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOT_BENCHMARKS = {"run.py", "measure.py", "systems.py", "policy_worlds.py"}


def main() -> int:
    """Run them all; return how many failed."""
    failed = 0
    for path in sorted(HERE.glob("*.py")):
        if path.name in NOT_BENCHMARKS or path.name.startswith("_"):
            continue
        print(f"=== {path.stem}", flush=True)
        failed += subprocess.run([sys.executable, str(path)], check=False).returncode != 0
        print(flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
