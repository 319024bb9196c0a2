"""The units of systemd: understood by systemd, and installed with the programs that they start."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.packaging import ROOT
from tests.support.proxy_server import resident

from sluice.proxy.outside import try_confinement

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


# Allows the named system calls, answers EPERM to all others, and becomes a program.
UNDER = """
import errno, json, os, sys
import pyseccomp
made = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
for name in json.loads(sys.argv[1]):
    try:
        made.add_rule(pyseccomp.ALLOW, name)
    except OSError:
        continue  # this machine has no such call
made.load()
os.execv(sys.argv[2], sys.argv[2:])
"""


def _allowed_calls(unit: str) -> list[str]:
    """Return the system calls that a unit's SystemCallFilter= allows, groups resolved."""
    wanted = re.findall(r"^SystemCallFilter=(.*)", (UNITS / unit).read_text(), flags=re.M)
    names, open_ = set(), " ".join(wanted).split()
    while open_:
        name = open_.pop()
        if not name.startswith("@"):
            names.add(name)
            continue
        done = subprocess.run(
            ["systemd-analyze", "syscall-filter", name],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        lines = (line.strip() for line in done.stdout.splitlines()[1:])
        open_ += [line for line in lines if line and not line.startswith("#")]
    return sorted(names)


def test_the_proxy_works_with_the_system_calls_that_its_unit_allows() -> None:
    """All kinds of far ends and filters: outside programs confine themselves there too."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed, so nobody knows what its groups are")
    allowed = _allowed_calls("sluice-proxy.service")
    assert "ptrace" not in allowed and "mount" not in allowed and len(allowed) > 200
    with resident(start=False) as server:
        uses = ["'pass'", "{ use = 'sniff' }", "{ use = 'count', limit = 9, interval = 60 }",
                "{ use = 'lines', src2dst = { allow = ['.*'] } }"]  # fmt: skip
        if try_confinement("/bin/cat", []) is None:
            uses.append("{ use = 'program', src2dst = ['cat'] }")
        server.qube.configure("", f"legacy_plugins = ['{ROOT}/tests/proxy/legacy/plugins']")
        server.qube.chain("all", *uses)
        server.qube.chain("old", "'caesar'")
        server.start(command=[sys.executable, "-c", UNDER, json.dumps(allowed), *server.command()])
        done = server.call("all+vault+mirror", b"hello\n")
        assert (done.returncode, done.stdout) == (0, b"hello\n"), server.qube.log()
        assert server.call("old+vault+mirror", b"hello").returncode == 0, server.qube.log()
        assert server.stop() == 0
