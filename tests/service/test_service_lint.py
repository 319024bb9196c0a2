"""sluice service lint: what a call would stumble over is found before."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from sluice.cli.main import main
from sluice.service.lint import ERROR, WARNING, lint_services


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "rpc").mkdir()
    (tmp_path / "conf").mkdir()
    return tmp_path


def lint(home: Path) -> list[tuple[str, str]]:
    found = lint_services(str(home / "rpc"), str(home / "conf"))
    prefix = f"{home}/"
    return [(finding.severity, finding.text.replace(prefix, "")) for finding in found]


def program(home: Path, name: str, text: str = "#!/bin/sh\n", mode: int = 0o755) -> None:
    path = home / "rpc" / name
    path.write_text(text)
    path.chmod(mode)


def test_nothing_to_complain_of(home: Path) -> None:
    program(home, "test.Add")
    program(home, "test.Add+x")
    (home / "rpc" / "my.Web").symlink_to("/dev/tcp/127.0.0.1/80")
    (home / "rpc" / "my.Port").symlink_to("/dev/tcp/::1")
    (home / "rpc" / "my.Any").symlink_to("/dev/tcp")
    (home / "rpc" / "my.Port+22").symlink_to("/dev/tcp/127.0.0.1")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(home / "s"))
    (home / "rpc" / "my.Socket").symlink_to(home / "s")
    (home / "conf" / "test.Add").write_text("force-user = 'root'\n")
    (home / "conf" / "my.Socket").write_text("exit-on-client-eof = true\n")
    listener.close()
    assert lint(home) == []


@pytest.mark.parametrize(
    ("name", "text", "mode", "severity", "expected"),
    [
        ("a", "#!/bin/sh\n", 0o644, ERROR, "rpc/a: is not executable (chmod 755), nor a socket"),
        ("a", "#!/no/such\n", 0o755, ERROR, "rpc/a: its interpreter /no/such is missing"),
        ("a", "#!\n", 0o755, ERROR, "rpc/a: names no interpreter"),
        ("a", "hello", 0o755, ERROR, "rpc/a: begins neither with #! nor as a program"),
        ("a", "#!/bin/sh\n", 0o777, WARNING, "rpc/a: everybody may write it"),
        (
            "a~",
            "#!/bin/sh\n",
            0o755,
            WARNING,
            "rpc/a~: looks like a left-over; no call can mean it",
        ),
        (
            "a b",
            "#!/bin/sh\n",
            0o755,
            ERROR,
            "rpc/a b: no call can have this name (letters, digits, _-.+ only)",
        ),
    ],
)
def test_programs(
    home: Path, name: str, text: str, mode: int, severity: str, expected: str
) -> None:
    program(home, name, text, mode)
    assert lint(home) == [(severity, expected)]


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ("/dev/tcp/", "names no address"),
        ("/dev/tcp/localhost/80", "localhost is no numeric address"),
        ("/dev/tcp/127.0.0.1/080", "bad TCP port '080'"),
        ("/dev/tcp/127.0.0.1/0", "bad TCP port '0'"),
    ],
)
def test_tcp_links(home: Path, target: str, part: str) -> None:
    (home / "rpc" / "my.Web").symlink_to(target)
    ((severity, text),) = lint(home)
    assert severity == ERROR and part in text


def test_other_entries(home: Path) -> None:
    (home / "rpc" / "gone").symlink_to(home / "nowhere")
    (home / "rpc" / "folder").mkdir()
    (home / "rpc" / "below").symlink_to(home / "rpc" / "folder" / ".." / ".." / "file" / "x")
    (home / "file").write_text("")
    assert lint(home) == [
        (ERROR, "rpc/below: Not a directory"),
        (ERROR, "rpc/folder: is a directory"),
        (WARNING, "rpc/gone: leads nowhere (yet); calls pass it over"),
    ]


def test_settings(home: Path) -> None:
    program(home, "test.Add")
    (home / "rpc" / "my.Web").symlink_to("/dev/tcp/127.0.0.1/80")
    conf = home / "conf"
    (conf / "test.Add").write_text("exit-on-client-eof = true\nodd = 1\n")
    (conf / "test.None").write_text("")
    (conf / "my.Web").write_text("force-user = 'no-such-user'\n")
    (conf / "broken").write_text("\n force-user = 'a'\n")
    (conf / "gone").symlink_to(home / "nowhere")
    assert lint(home) == [
        (ERROR, "conf/broken:2: the line begins with a blank (empty lines must be really empty)"),
        (WARNING, "conf/gone: leads nowhere; calls pass it over"),
        (WARNING, "conf/my.Web: force-user: there is no user 'no-such-user'"),
        (WARNING, "conf/my.Web: force-user ignored: rpc/my.Web is a socket"),
        (WARNING, "conf/test.Add:2: unknown setting odd is ignored"),
        (WARNING, "conf/test.Add: exit-on-client-eof ignored: rpc/test.Add is a program"),
        (WARNING, "conf/test.None: there is no service test.None"),
    ]


def test_the_command(home: Path) -> None:
    program(home, "test.Add", mode=0o777)
    words = ["service", "lint", "--services", str(home / "rpc"), "--settings", str(home / "conf")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0 and done.output.endswith("may write it (warning)\n")
    assert CliRunner().invoke(main, [*words, "--strict"]).exit_code == 1
    (home / "conf" / "test.Add").write_text("force-user = 1\n")
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert "conf/test.Add:1: force-user: must be a string in single quotes\n" in done.output
