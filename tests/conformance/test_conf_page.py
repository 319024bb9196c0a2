"""What docs/stand-alone.md tells people to type does what it says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from tests.support.adminvm import BIN, ROOT, short_directory

PAGE = (ROOT / "docs" / "stand-alone.md").read_text()


def sessions() -> str:
    """All blocks of commands of the page, as one."""
    return "".join(re.findall(r"^```\n(.*?)^```", PAGE, flags=re.M | re.S))


def script(directory: Path) -> str:
    """The commands, in a directory of the test, with what they start ended at the end."""
    lines = ["set -m", "trap 'kill %1 %2 2>/dev/null; wait' EXIT"]
    lines += [line[2:] for line in sessions().splitlines() if line.startswith("$ ")]
    return "\n".join(lines).replace("/tmp/alone", str(directory))


def test_the_page_can_be_typed() -> None:
    expected = [line for line in sessions().splitlines() if line and not line.startswith("$ ")]
    assert expected
    with short_directory() as directory:
        bin_directory = directory / "bin"
        bin_directory.mkdir()
        for program in BIN.glob("qrexec-*"):
            wrapper = bin_directory / program.name
            # An agent that cannot become somebody else runs commands as itself, as for a user.
            drop = "/usr/bin/setpriv --bounding-set=-setuid,-setgid " * (os.geteuid() == 0)
            wrapper.write_text(f'#!/bin/sh\nexec {drop}{program} "$@"\n')
            wrapper.chmod(0o755)
        text = script(directory).replace("$PWD/src/sluice/bin", str(bin_directory))
        done = subprocess.run(
            ["/bin/bash", "-c", text],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
        )
        log = (directory / "daemon.log").read_text()
        assert done.stdout.splitlines() == expected, done.stderr + log
