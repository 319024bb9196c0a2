"""The policy tools: ``diff``, ``lint`` and ``explain`` as commands, beside a bare interpreter.

``python bench/policy_tools.py``. Each is a process from its start to its end, on a policy of 2,000
rules over 60 domains.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import Table, bare_python
from bench.policy_worlds import changed, policy_text, registry

RULES = 2_000


def lay(place: Path) -> None:
    """Write two policies, the registry and a small starter."""
    text = policy_text(RULES)
    for name, content in (("old", text), ("new", changed(text))):
        (place / name).mkdir()
        (place / name / "10-a.policy").write_text(content)
    (place / "world.json").write_text(json.dumps(registry().to_json()))


def run(place: Path, *arguments: str) -> float:
    """Return the seconds of one subcommand; its output is thrown away."""
    code = "from sluice.cli.main import main; main()"
    options = ["--policy-dir", str(place / "old"), "--system-info", str(place / "world.json")]
    command = [sys.executable, "-c", code, "policy", arguments[0], *options, *arguments[1:]]
    begun = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False, env=dict(os.environ))
    taken = time.perf_counter() - begun
    assert done.returncode in (0, 1, 3), done.returncode
    return taken


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as name:
        place = Path(name)
        lay(place)
        table = Table(f"the tools on {RULES} rules over 60 domains")
        old, new = str(place / "old"), str(place / "new")
        base = "python3 -I -S -c pass"
        table.add(base, "s", bare_python)
        for title, arguments in (
            ("explain", ("explain", "dom1x", "dom2x", "qubes.Service7")),
            ("lint", ("lint",)),
            ("who-can", ("who-can", "qubes.Service7", "dom7x")),
            ("what-can", ("what-can", "dom1x")),
            ("diff, one rule in ten changed", ("diff", old, new)),
            ("graph", ("graph", "--format", "svg")),
        ):
            table.add(title, "s", lambda a=arguments: run(place, *a), reference=base)
        table.run(rounds=3)
        print(table.render())


if __name__ == "__main__":
    main()
