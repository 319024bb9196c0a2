"""The program form starts for each call: what it loads is bounded."""

from __future__ import annotations

import subprocess

import pytest
from tests.support.proxy import ROOT, vm

# Beside modules of Sluice. Each of these is built into the interpreter or costs next to nothing.
ALLOWED = {
    "__future__", "_functools", "_heapq", "_signal", "_socket", "_struct", "_thread", "_weakref",
    "errno", "fcntl", "marshal", "select", "struct", "time", "posix", "os", "os.path", "posixpath",
    "genericpath", "stat", "_stat", "_collections_abc", "abc", "_abc",
}  # fmt: skip


@pytest.mark.parametrize("filters", ["'pass'", "{ use = 'timeout', src2dst = '1h' }, 'stop-dst'"])
def test_the_program_form_loads_next_to_nothing(filters: str) -> None:
    script = (
        "import sys; before = set(sys.modules); sys.path.insert(0, sys.argv.pop())\n"
        "from sluice.proxy.program import main\n"
        "out = sys.argv.pop(); main()\n"
        "open(out, 'w').write(' '.join(sorted(set(sys.modules) - before)))\n"
    )
    with vm() as qube:
        qube.service("true", "#!/bin/sh\nexit 0\n")
        qube.chain("x", filters)
        out = qube.directory / "modules"
        for _ in range(2):
            # The first call reads and keeps the configuration.
            subprocess.run(
                ["/usr/bin/python3", "-I", "-S", "-c", script, "x+vault+true", str(out),
                 str(ROOT / "src")],
                env=qube.environment(), stdin=subprocess.DEVNULL, check=True, timeout=60,
            )  # fmt: skip
        loaded = out.read_text().split()
    assert "sluice.proxy.flow" in loaded
    extra = {name for name in loaded if name.split(".")[0] != "sluice"} - ALLOWED
    assert not extra
    heavy = {"sluice.proxy.schema", "sluice.proxy.configuration", "sluice.proxy.loader"}
    assert not heavy & set(loaded)
