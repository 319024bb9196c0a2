"""The Debian package: built twice alike, installed into a bare Debian, used, removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.packaging import IMPORT_ALL, ROOT, BareDebian, reason_against

pytestmark = pytest.mark.skipif(reason_against() is not None, reason=reason_against() or "")

KEEP = "#!/bin/sh\ncat > /srv/kept\necho an answer that must not arrive\nexit 42\n"


@pytest.fixture(scope="module")
def debian() -> Iterator[BareDebian]:
    made = BareDebian()
    yield made
    made.remove()


def test_it_is_built_alike_each_time(package: Path, tmp_path: Path) -> None:
    again = subprocess.run(
        [sys.executable, str(ROOT / "packaging/build-deb"), "--quick", "--into", str(tmp_path)],
        capture_output=True, text=True, check=True, env={**os.environ, "TZ": "Asia/Tokyo"},
    )  # fmt: skip
    assert Path(again.stdout.strip()).read_bytes() == package.read_bytes()


def test_it_is_installed_used_and_removed_without_trace(package: Path, debian: BareDebian) -> None:
    before = debian.contents()
    shutil.copy(package, debian.root / "tmp/package.deb")
    # Without --force-depends: what it depends on must be what a Debian with Python has.
    debian.check("dpkg", "-i", "/tmp/package.deb")
    assert list(debian.root.glob("usr/lib/sluice/sluice/proxy/__pycache__/program.*.pyc"))

    shown = debian.check("/usr/bin/sluice", "proxy", "check").decode()
    assert "# /etc/sluice/proxy.toml" in shown and "no mistakes" in shown
    assert b"byte-limit" in debian.check("sluice", "proxy", "filters")

    # No library is missing, whichever part of Sluice is used.
    imported = debian.check("python3", "-IS", "-c", IMPORT_ALL, "/usr/lib/sluice")
    assert imported == b"True\n"

    # The call of a source, by the agent's way, with the configuration as it is shipped.
    debian.script("srv/inbox.Put", KEEP)
    done = debian.run(
        "/etc/qubes-rpc/qrexec-proxy", "one-way+vault+inbox.Put",
        data=b"one way", env={"QREXEC_REMOTE_DOMAIN": "work"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (42, b"", b"")
    assert (debian.root / "srv/kept").read_bytes() == b"one way"
    assert (debian.root / "srv/calls").read_text() == "-- vault inbox.Put\n"
    (record,) = (debian.root / "var/log/sluice/proxy.jsonl").read_text().splitlines()
    assert json.loads(record)["source"] == "work"

    (debian.root / "srv/kept").unlink()
    assert debian.resident("/usr/lib/sluice/bin/qrexec-proxy-launcher") == "42"
    assert (debian.root / "srv/kept").read_bytes() == b"one way"

    completion = debian.run(
        "bash", "-c",
        ". /usr/share/bash-completion/completions/sluice; COMP_WORDS=(sluice prox) COMP_CWORD=1;"
        " _sluice_completion sluice; echo ${COMPREPLY[@]}",
    )  # fmt: skip
    assert completion.stdout == b"proxy\n", completion.stderr

    # A second time, as an upgrade does it; and the administrator enables what he wants.
    debian.check("dpkg", "-i", "/tmp/package.deb")
    enabled = debian.root / "etc/systemd/system/multi-user.target.wants/sluice.service"
    if shutil.which("systemctl") is not None:
        debian.check("systemctl", "enable", "sluice.service")
        assert enabled.is_symlink()

    # What an administrator changed stays when the package is removed, and goes when it is purged.
    with (debian.root / "etc/sluice/proxy.toml").open("a") as stream:
        stream.write("# changed\n")
    debian.check("dpkg", "--remove", "sluice-proxy")
    assert not enabled.is_symlink()
    left = debian.contents() - before
    assert not [name for name in left if name.startswith(("usr", "lib", "etc/qubes-rpc"))]
    assert "etc/sluice/proxy.toml" in left
    debian.check("dpkg", "--purge", "sluice-proxy")
    # systemd keeps the empty directories in which it puts links.
    left = {name for name in debian.contents() - before if not name.startswith("etc/systemd")}
    assert left == set()


def test_everything_in_it_belongs_to_root_and_is_writable_by_root_only(package: Path) -> None:
    listing = subprocess.run(
        ["dpkg-deb", "-c", str(package)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(listing) > 100
    for line in listing:
        mode, owner = line.split()[:2]
        assert owner == "root/root", line
        assert mode[0] == "l" or mode[1:] in ("rwxr-xr-x", "rw-r--r--"), line
    assert not [line for line in listing if "__pycache__" in line or ".venv" in line]


def test_the_libraries_named_in_the_project_are_carried(package: Path) -> None:
    listing = subprocess.run(
        ["dpkg-deb", "-c", str(package)], capture_output=True, text=True, check=True
    ).stdout
    for name in ("msgspec/_core", "re2/_re2", "jsonschema_rs/jsonschema_rs", "click/core.py"):
        assert f"./usr/lib/sluice/site-packages/{name}" in listing
    for name in ("pytest", "mypy", "hypothesis", "ruff"):
        assert f"site-packages/{name}" not in listing


def test_lintian_finds_no_error(package: Path) -> None:
    if shutil.which("lintian") is None:
        pytest.skip("lintian is not installed (apt-get install lintian), so nothing was linted")
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error", "--tag-display-limit", "0", str(package)],
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "E:" not in done.stdout
