"""The package for Fedora: built, unpacked into a root of its own, used."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support.packaging import ROOT, BareDebian, reason_against

SPEC = ROOT / "packaging/rpm/sluice-proxy.spec"
TOOLS = ("rpmbuild", "rpm2archive")


@pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)), reason="rpmbuild is not installed, so no RPM was built"
)
@pytest.mark.skipif(reason_against(dpkg=False) is not None, reason=reason_against(dpkg=False) or "")
def test_it_is_built_and_its_programs_work(single: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "dist").mkdir(parents=True)
    shutil.copy(single, checkout / "dist")
    for name in ("docs", "packaging"):
        (checkout / name).symlink_to(ROOT / name)
    done = subprocess.run(
        ["rpmbuild", "-bb", "--define", f"_topdir {tmp_path}",
         "--define", f"checkout {checkout}", "--define", f"_rpmdir {tmp_path}", str(SPEC)],
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("noarch/*.rpm")
    # As a filter: given a name, some versions write a file beside it and others do not.
    with package.open("rb") as stream:
        archive = subprocess.run(["rpm2archive", "-"], stdin=stream, stdout=-1, check=True).stdout

    debian = BareDebian()
    try:
        subprocess.run(["tar", "-xz", "-C", str(debian.root)], input=archive, check=True)
        debian.script("srv/inbox.Put", "#!/bin/sh\ncat > /srv/kept\nexit 42\n")
        assert b"no mistakes" in debian.check("sluice", "proxy", "check")
        done_call = debian.run(
            "/etc/qubes-rpc/qrexec-proxy", "one-way+vault+inbox.Put",
            data=b"one way", env={"QREXEC_REMOTE_DOMAIN": "work"},
        )  # fmt: skip
        assert (done_call.returncode, done_call.stderr) == (42, b"")
        assert (debian.root / "srv/kept").read_bytes() == b"one way"
    finally:
        debian.remove()
