"""The proxy's systemd units: they fit the server, and are hardened."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sluice.proxy import sockets
from sluice.proxy.server import GRACE

UNITS = Path(__file__).resolve().parents[2] / "packaging/systemd"
SERVICE = "sluice-proxy.service"
SOCKETS = {
    "sluice-proxy.socket": "ListenSequentialPacket",
    "sluice-proxy-raw.socket": "ListenStream",
}


def settings(name: str) -> dict[str, list[str]]:
    """Read a unit: each key with its values, as systemd does for the little that is used here."""
    found: dict[str, list[str]] = {}
    section = None
    for line in (UNITS / name).read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            section = line
            assert line in ("[Unit]", "[Service]", "[Socket]", "[Install]")
            continue
        assert section and re.fullmatch(r"[A-Z][A-Za-z]+=.*", line), line
        key, _, value = line.partition("=")
        found.setdefault(key, []).append(value)
    return found


@pytest.mark.spec("PROXY-010", "PROXY-063")
@pytest.mark.parametrize("name", SOCKETS)
def test_the_sockets_are_those_that_server_and_launcher_use(name: str) -> None:
    unit = settings(name)
    (path,) = unit[SOCKETS[name]]
    directory, _, file = path.rpartition("/")
    assert directory == sockets.SYSTEM_DIRECTORY
    assert [file] == [label + ".sock" for label in unit["FileDescriptorName"]]
    assert file in (sockets.LAUNCHER, sockets.RAW)
    assert unit["SocketMode"] == ["0600"] and unit["Service"] == [SERVICE]
    assert unit["SocketUser"] == settings(SERVICE)["User"]
    assert name in settings(SERVICE)["Sockets"][0].split()


def test_the_service_is_hardened_and_has_time_to_drain() -> None:
    unit = settings(SERVICE)
    for key, value in (
        ("NoNewPrivileges", "yes"), ("ProtectSystem", "strict"), ("RestrictNamespaces", "yes"),
        ("CapabilityBoundingSet", ""), ("ProtectKernelModules", "yes"), ("LockPersonality", "yes"),
        ("IPAddressDeny", "any"), ("IPAddressAllow", "localhost"), ("PrivateTmp", "yes"),
        ("DevicePolicy", "closed"), ("Type", "notify"),
    ):  # fmt: skip
        assert unit[key] == [value]
    # And what outside programs confine themselves with, which only takes away.
    ordinary, confining = unit["SystemCallFilter"]
    assert ordinary == "@system-service"
    assert all(name.startswith("landlock_") for name in confining.split())
    assert float(unit["TimeoutStopSec"][0]) > GRACE + 2
    assert unit["RuntimeDirectory"] == [sockets.SYSTEM_DIRECTORY.rpartition("/")[2]]
    assert unit["RuntimeDirectoryPreserve"] == ["yes"]


@pytest.mark.parametrize("name", [SERVICE, *SOCKETS])
def test_systemd_understands_them(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        assert settings(name)
        return
    for each in (SERVICE, *SOCKETS):
        text = (UNITS / each).read_text()
        (tmp_path / each).write_text(text.replace("/usr/bin/sluice proxy serve", "/bin/true"))
    unit = str(tmp_path / name)
    command = ["systemd-analyze", "verify", "--man=no", unit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and str(tmp_path) not in done.stderr, done.stderr
    if name == SERVICE:
        # Exposure from 0 (shut off) to 100: 30 is what systemd calls OK.
        command = ["systemd-analyze", "security", "--offline=yes", "--threshold=30", unit]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout[-300:]
