"""``sluice ls`` of a system that does not run."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

from click.testing import CliRunner, Result

from sluice.cli.ls import command
from sluice.domains.paths import Paths


def listed(root: str) -> Result:
    return CliRunner().invoke(command, ["--root", root])


def test_a_system_that_is_down_or_was_killed_has_halted_domains() -> None:
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as root:
        paths = Paths.find(root)
        paths.config.mkdir()
        paths.system_file.write_text('[domains.work]\nlabel = "blue"\n')
        down = listed(root)
        assert "work  AppVM  blue   Halted" in down.output
        paths.runtime.mkdir()
        with socket.socket(socket.AF_UNIX) as left:  # as a killed AdminVM leaves it
            left.bind(str(paths.control_socket))
        killed = listed(root)
        assert (killed.exit_code, killed.output) == (0, down.output)


def test_where_there_is_no_system_it_says_so(tmp_path: Path) -> None:
    done = listed(str(tmp_path))
    assert done.exit_code == 125
    assert "no AdminVM runs here" in done.output
