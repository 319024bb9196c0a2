"""What a program cannot be started for is known before a launcher in front of it is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sluice.agent import users
from sluice.service.command import ServiceError
from sluice.service.executable import Identity, check_program

NOBODY = Identity(65534, (65534,))
ROOT = Identity(0, (0,))


def verdict(path: Path, identity: Identity | None = None) -> tuple[int, str]:
    try:
        check_program(os.fsencode(path), identity)
    except ServiceError as error:
        return error.code, str(error).replace(f"{path}: ", "")
    return 0, ""


@pytest.mark.spec("WIRE-165")
@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [
        (b"#!/bin/sh\n", 0, ""),
        (b"#! \t/bin/sh -e\n", 0, ""),
        (b"#!/bin/sh", 0, ""),
        (b"#!/no/such\n", 127, "its interpreter /no/such is missing"),
        (b"#!/no/such -x\n", 127, "its interpreter /no/such is missing"),
        (b"#!/bin/sh\r\nexit\r\n", 127, "its interpreter /bin/sh\\x0d is missing"),
        (b"#!\n", 125, "names no interpreter"),
        (b"#! \n", 125, "names no interpreter"),
        (b"#!/etc/passwd\n", 125, "its interpreter /etc/passwd is not executable"),
        (b"#!/tmp\n", 125, "its interpreter /tmp is not executable"),
        (b"\x01\x02garbage", 125, "begins neither with #! nor as a program"),
        (b"echo text\n", 125, "begins neither with #! nor as a program"),
        (b"", 125, "begins neither with #! nor as a program"),
    ],
)
def test_what_a_file_begins_with(tmp_path: Path, text: bytes, code: int, reason: str) -> None:
    path = tmp_path / "service"
    path.write_bytes(text)
    path.chmod(0o755)
    assert verdict(path) == (code, reason)


def test_a_program_a_directory_and_nothing(tmp_path: Path) -> None:
    assert verdict(Path("/bin/sh")) == (0, "")
    assert verdict(tmp_path) == (125, "is a directory")
    assert verdict(tmp_path / "none") == (127, "No such file or directory")


@pytest.mark.parametrize(
    ("mode", "owner", "group", "nobody", "root"),
    [
        (0o755, 0, 0, 0, 0),
        (0o700, 0, 0, 125, 0),
        (0o700, 65534, 0, 0, 0),
        (0o677, 65534, 65534, 125, 0),
        (0o710, 0, 65534, 0, 0),
        (0o701, 0, 65534, 125, 0),
        (0o644, 65534, 65534, 125, 125),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_whom_the_mode_allows(
    tmp_path: Path, mode: int, owner: int, group: int, nobody: int, root: int
) -> None:
    path = tmp_path / "service"
    path.write_text("#!/bin/sh\n")
    os.chown(path, owner, group)
    path.chmod(mode)
    assert verdict(path, NOBODY)[0] == nobody
    assert verdict(path, ROOT)[0] == root


def test_the_launchers_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "service"
    path.write_text("garbage")
    path.chmod(0o755)
    argv = [os.fsencode(path)]
    own = users.OwnUser(b"me")
    own.program(b"me", argv, {})  # nothing in front: the kernel itself will say it
    monkeypatch.setattr(users, "service_descriptors", 100)
    switch = users.SwitchUser(b"/usr/bin/setpriv", login=False)
    for start in (lambda: own.program(b"me", argv, {}), lambda: switch.program(b"root", argv, {})):
        with pytest.raises(ServiceError, match="begins neither") as caught:
            start()
        assert caught.value.code == 125
    # A login shell goes by its own conventions (9.3.1).
    users.SwitchUser(b"/usr/bin/setpriv", login=True).program(b"root", argv, {})
