"""The resident form: sockets of systemd, the end, a changed configuration."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from tests.support.proxy import chain_text, eventually
from tests.support.proxy_server import (
    Resident,
    left_over,
    resident,
)

from sluice.errors import LocalError
from sluice.proxy import systemd

# Far more than anything takes: for what is no matter of time.
DEADLINE = 30.0


# --- systemd ----------------------------------------------------------------------------------

_ACTIVATE = """
import os, socket, sys
directory = sys.argv[1]
names = []
for number, (name, kind) in enumerate((("launcher", 5), ("raw", 1)), 3):
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(f"{directory}/{name}.sock")
    sock.listen(8)
    fd = os.dup(sock.detach())
    os.dup2(fd, 10 + number, inheritable=True)
    names.append(name)
for number in (3, 4):
    os.dup2(10 + number, number, inheritable=True)
    os.close(10 + number)
os.environ |= {"LISTEN_FDS": "2", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": ":".join(names)}
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.spec("PROXY-010")
def test_socket_activation() -> None:
    """The sockets are systemd's: used, not made, and left in place at the end."""
    with resident(start=False) as server:
        server.start(
            command=[sys.executable, "-c", _ACTIVATE, str(server.directory), *server.command()]
        )
        inode = (server.directory / "launcher.sock").stat().st_ino
        assert server.call("pass+vault+code+42").returncode == 42
        assert server.call("pass+vault+mirror", b"hello").stdout == b"hello"
        with server.control() as client:
            eventually(lambda: client.status()["calls"] == 0)
        assert server.stop() == 0
        assert (server.directory / "launcher.sock").stat().st_ino == inode
        assert not (server.directory / "control.sock").exists()
        server.wait_for("STOPPING=1")


def test_what_systemd_hands_over_is_read_once_and_only_by_its_process() -> None:
    own = str(os.getpid())
    for env, names in (
        ({"LISTEN_FDS": "2", "LISTEN_PID": own, "LISTEN_FDNAMES": "raw"}, ["raw", ""]),
        ({"LISTEN_FDS": "2", "LISTEN_PID": "1", "LISTEN_FDNAMES": "raw"}, []),
        ({"LISTEN_FDS": "x", "LISTEN_PID": own}, []),
        ({}, []),
    ):
        with pytest.MonkeyPatch.context() as patch:
            # Not the test's own descriptors 3 and 4.
            patch.setattr(os, "set_inheritable", lambda fd, flag: None)
            found = systemd.listen_fds(env)
        assert found == [(name, 3 + place) for place, name in enumerate(names)]
        assert not env


def test_sockets_for_another_process_are_not_taken() -> None:
    with resident(start=False) as server:
        server.start(more={"LISTEN_FDS": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "raw"})
        assert server.call("pass+vault+mirror", b"hello").stdout == b"hello"


# --- ending -----------------------------------------------------------------------------------


@pytest.mark.spec("PROXY-062")
def test_sigterm_refuses_new_calls_and_lets_those_under_way_end() -> None:
    with resident(start=False) as server:
        server.start(command=patient(server))
        process = server.launch("pass+vault+mirror")
        process.stdin.write(b"hello")
        process.stdin.flush()
        assert process.stdout.read(5) == b"hello"
        server.process.terminate()
        server.wait_for("STOPPING=1")
        assert server.call("pass+vault+mirror", b"x").returncode == 125
        process.stdin.write(b"world")
        process.stdin.close()
        assert process.stdout.read() == b"world"
        assert process.wait(DEADLINE) == 0
        assert server.process.wait(DEADLINE) == 0
        assert not list(server.directory.glob("*.sock"))


def patient(server: Resident) -> list[str]:
    """Return the command line of a server that gives calls under way far more than 5 s."""
    code = (
        "import asyncio, sys; from sluice.proxy.server import serve; "
        "asyncio.run(serve(sys.argv[1], grace=600))"
    )
    return [sys.executable, "-c", code, str(server.qube.config)]


@pytest.mark.alone
@pytest.mark.spec("PROXY-062")
def test_what_does_not_end_in_time_is_ended_and_all_is_gone() -> None:
    """By the real time of 5 s; a far end that ignores SIGTERM included."""
    with resident() as server:
        server.qube.service("stubborn", "#!/bin/sh\ntrap '' TERM\necho up\nwhile :; do sleep 60; done\n")  # noqa: E501  # fmt: skip
        process = server.launch("pass+vault+stubborn")
        assert process.stdout.read(3) == b"up\n"
        begun = time.monotonic()
        server.process.terminate()
        assert process.stdout.read() == b""
        assert 4.5 < time.monotonic() - begun < 25
        assert process.wait(DEADLINE) == 125
        assert server.process.wait(DEADLINE) == 0
        assert not left_over(server.qube)
        assert [r["cause"] for r in server.qube.records()] == ["shutdown"]


@pytest.mark.spec("PROXY-062")
def test_a_second_sigterm_does_not_wait() -> None:
    with resident(start=False) as server:
        server.start(command=patient(server))
        process = server.launch("pass+vault+mirror")
        eventually(server.calls)
        server.process.terminate()
        server.wait_for("STOPPING=1")
        server.process.terminate()
        assert process.wait(DEADLINE) == 125
        assert server.process.wait(DEADLINE) == 0


def test_two_servers_in_one_place_and_a_socket_left_behind() -> None:
    with resident() as server:
        second = subprocess.run(
            server.command(), env=server.environment(None), capture_output=True, timeout=60
        )
        assert second.returncode == 125 and b"listens on" in second.stderr
        server.process.kill()
        server.process.wait()
        assert (server.directory / "launcher.sock").exists()
        server.start()
        assert server.call("pass+vault+mirror", b"x").stdout == b"x"


# --- the configuration --------------------------------------------------------------------------


@pytest.mark.spec("PROXY-014")
def test_reload_keeps_calls_on_their_chain_and_an_invalid_change_keeps_the_old() -> None:
    with resident(start=False) as server:
        server.qube.configure("")
        server.qube.chain("limit", "{ use = 'byte-limit', dst2src = 8 }")
        server.start()
        old = server.launch("limit+vault+mirror")
        old.stdin.write(b"1234")
        old.stdin.flush()
        assert old.stdout.read(4) == b"1234"

        server.notices.clear()
        server.qube.configure(chain_text("limit", "{ use = 'byte-limit', dst2src = 2 }"))
        server.wait_for("READY=1")
        assert any("RELOADING=1" in notice for notice in server.notices)
        assert server.call("limit+vault+mirror", b"123456").stdout == b"12"

        server.notices.clear()
        server.qube.chain("broken", "{ use = 'byte-limt' }")
        server.wait_for("not read")
        assert "did you mean 'byte-limit'" in server.qube.log()
        assert f"{server.qube.config}:" in server.qube.log()
        with server.control() as client:
            assert "byte-limt" in client.status()["error"]
            with pytest.raises(LocalError, match="byte-limt"):
                client.reload()
        assert server.call("limit+vault+mirror", b"123456").stdout == b"12"
        assert server.call("broken+vault+mirror", b"123456").returncode == 125

        old.stdin.write(b"5678ABC")
        old.stdin.close()
        assert old.stdout.read() == b"5678"
        assert old.wait(DEADLINE) == 0

        server.qube.configure(chain_text("new", "'pass'"))
        eventually(lambda: server.call("new+vault+mirror", b"x").stdout == b"x")
        with server.control() as client:
            assert client.status()["error"] is None


@pytest.mark.spec("PROXY-014")
def test_files_that_are_added_and_sighup_are_heard() -> None:
    with resident(start=False) as server:
        main = server.directory / "etc"
        (main / "proxy.d").mkdir(parents=True)
        server.qube.config.rename(main / "proxy.toml")
        server.qube.config = main
        server.start()
        server.notices.clear()
        text = '[chains.{}]\nservices = "any"\ntargets = "any"\nfilters = []\n'
        # At one stroke: a server that has read an empty file would say READY=1 as well.
        (main / "proxy.d/one").write_text(text.format("one"))
        (main / "proxy.d/one").rename(main / "proxy.d/one.toml")
        server.wait_for("READY=1")
        assert server.call("one+vault+mirror", b"x").stdout == b"x"
        # Pointed to from elsewhere, so that nobody sees it change.
        other = server.directory / "elsewhere.tml"
        other.write_text(text.format("two"))
        (main / "proxy.d/two.toml").symlink_to(other)
        server.notices.clear()
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("READY=1")
        assert server.call("two+vault+mirror", b"x").stdout == b"x"
