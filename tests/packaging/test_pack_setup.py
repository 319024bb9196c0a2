"""What set-up does on machines that lack something: for root and for others, Debian and Fedora."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support.packaging import ROOT

# What every machine with make has; and what set-up looks for, but for what is lacking here.
ORDINARY = ("sh", "mkdir", "tail", "echo", "sort", "tr", "rm")
PRESENT = ("setpriv", "unshare", "nsenter", "find", "git")
NEEDED = {"debian": "bubblewrap uidmap", "fedora": "bubblewrap shadow-utils"}
MANAGER = {"debian": "apt-get", "fedora": "dnf"}
# Notes how it was called; what is named in the file `installed` is installed.
STUB = '#!/bin/sh\necho "${0##*/} $*" >>CALLS\n'
ASK = '#!/bin/sh\nfor package; do :; done\ngrep -qx "$package" INSTALLED && printf %s installed\n'


class Lacking:
    """A machine without bubblewrap and the helpers of shadow-utils, with stubs of its programs."""

    def __init__(self, place: Path, system: str, uid: int) -> None:
        self.place = place
        self.bin = place / "bin"
        self.bin.mkdir()
        self.calls, self.installed = place / "calls", place / "installed"
        self.calls.touch()
        self.installed.write_text("shadow-utils\n")
        for name in ORDINARY:
            found = shutil.which(name)
            assert found is not None
            (self.bin / name).symlink_to(found)
        for name in PRESENT:
            self.script(name, "#!/bin/sh\n")
        self.script("id", f"#!/bin/sh\necho {uid}\n")
        if system in MANAGER:
            self.script(MANAGER[system], STUB)
            grep = ASK.replace("grep", shutil.which("grep") or "grep")
            self.script("dpkg-query" if system == "debian" else "rpm", grep)

    def script(self, name: str, text: str) -> None:
        text = text.replace("CALLS", str(self.calls)).replace("INSTALLED", str(self.installed))
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, program: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", str(ROOT / "packaging" / program)], cwd=self.place,
            env={"PATH": str(self.bin)}, capture_output=True, text=True, check=False,
        )  # fmt: skip


@pytest.mark.parametrize("system", ["debian", "fedora"])
def test_root_gets_what_is_missing_and_can_take_it_away_again(system: str, tmp_path: Path) -> None:
    machine = Lacking(tmp_path, system, 0)
    done = machine.run("setup-system")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"sluice: installing {NEEDED[system]}\n"
    calls = machine.calls.read_text().splitlines()
    assert calls[-1].startswith(f"{MANAGER[system]} install -q -y --")
    assert calls[-1].endswith(f" {NEEDED[system]}")
    assert calls[:-1] == (["apt-get update -q"] if system == "debian" else [])

    # A package that was there before, in whatever state, is not ours to remove.
    ours = NEEDED[system].replace(" shadow-utils", "").split()
    assert (tmp_path / "build/packages").read_text().split() == ours
    assert machine.run("unset-system").returncode == 0
    removed = f"{MANAGER[system]} remove -q -y {' '.join(ours)}"
    assert machine.calls.read_text().splitlines()[len(calls) :] == [removed]
    assert not (tmp_path / "build/packages").exists()


@pytest.mark.parametrize("system", ["debian", "fedora", "other"])
def test_ordinary_users_are_told_what_to_run(system: str, tmp_path: Path) -> None:
    machine = Lacking(tmp_path, system, 1000)
    done = machine.run("setup-system")
    assert (done.returncode, done.stdout) == (1, "")
    told = {
        # A machine that never asked has no list of packages.
        "debian": "    sudo apt-get update && sudo apt-get install -y bubblewrap uidmap",
        "fedora": "    sudo dnf install -y bubblewrap shadow-utils",
        "other": "    (install these with your package manager; the names are Debian's:"
        " bubblewrap uidmap)",
    }
    assert done.stderr.splitlines()[1:] == [told[system]]
    assert machine.calls.read_text() == ""


def test_what_could_not_be_installed_is_said(tmp_path: Path) -> None:
    machine = Lacking(tmp_path, "fedora", 0)
    machine.script("dnf", "#!/bin/sh\necho no network\nexit 3\n")
    done = machine.run("setup-system")
    assert done.returncode == 1
    assert done.stderr.startswith("no network\nsluice: these could not be installed: bubblewrap")
    assert not (tmp_path / "build/packages").exists()


def test_a_machine_that_has_everything_is_left_alone(tmp_path: Path) -> None:
    machine = Lacking(tmp_path, "debian", 0)
    for name in ("bwrap", "newuidmap", "newgidmap"):
        machine.script(name, "#!/bin/sh\n")
    done = machine.run("setup-system")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert machine.calls.read_text() == ""
