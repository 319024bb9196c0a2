"""The units of systemd: understood by systemd, and installed with the programs that they start."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support.packaging import ROOT

UNITS = ROOT / "packaging/systemd"
NAMES = sorted(path.relative_to(UNITS).as_posix() for path in UNITS.rglob("*") if path.is_file())


def test_the_units_are_there() -> None:
    assert {"sluice.service", "user/sluice.service"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_systemd_finds_no_fault_in_it(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed, so no unit was verified")
    for other in NAMES:
        if other.startswith("user/") == name.startswith("user/"):
            text = (UNITS / other).read_text()
            # The program need not be installed on the machine that tests.
            text = re.sub(r"^(Exec\w+=\W?)/usr/\S+", r"\1/bin/true", text, flags=re.M)
            (tmp_path / other.removeprefix("user/")).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / name.removeprefix("user/"))],
        capture_output=True, text=True, check=False, timeout=60,
        env={"PATH": "/usr/bin:/bin", "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )  # fmt: skip
    own = [line for line in done.stderr.splitlines() if str(tmp_path) in line or name in line]
    assert (done.returncode, own) == (0, []), done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_what_it_starts_is_in_the_package(name: str) -> None:
    for program in re.findall(r"^Exec\w+=\W?(/\S+)", (UNITS / name).read_text(), flags=re.M):
        if program.startswith("/usr/lib/sluice/bin/") or program == "/usr/bin/sluice":
            assert (ROOT / "src/sluice/bin" / program.rpartition("/")[2]).exists()
        else:
            assert program in ("/bin/kill", "/bin/true"), program
