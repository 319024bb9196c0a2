"""The resident form: server, launcher, raw socket, what there is to see."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.ports import free_port
from tests.support.processes import alive
from tests.support.proxy import eventually
from tests.support.proxy_server import (
    COMMAND,
    RAW,
    Resident,
    left_over,
    read_all,
    refused,
    resident,
)

from sluice.errors import ConfigError, LocalError
from sluice.proxy.control import ControlClient
from sluice.proxy.handover import encode_request
from sluice.proxy.server import Server
from sluice.proxy.settings import parse_address

LEAVE = """
import sys
from sluice.proxy.verdicts import SRC2DST

class Leave:
    name = "leave"
    inspects = (SRC2DST,)
    class Options: ...
    def __init__(self, options, link): ...
    def data(self, direction, chunk):
        sys.exit(0)
"""
# Far more than anything takes: for what is no matter of time.
DEADLINE = 30.0


@pytest.fixture(scope="module")
def server() -> Iterator[Resident]:
    """A server for the tests that do not change it."""
    with resident(start=False) as made:
        filters = made.directory / "filters"
        filters.mkdir()
        (filters / "leave.py").write_text(LEAVE)
        settings = f'metrics = "{made.directory}/metrics.sock"\nfilters = ["{filters}"]'
        made.qube.configure("", settings)
        made.qube.chain("pass", '"pass"')
        made.qube.chain("leave", '"leave"')
        made.qube.chain("raw", '"pass"', rules=RAW)
        made.qube.chain("short", "{ use = 'byte-limit', src2dst = 5 }", rules=RAW)
        made.start()
        yield made


def last_record(server: Resident) -> dict[str, object]:
    return server.qube.records()[-1]


# --- launcher ---------------------------------------------------------------------------------


@pytest.mark.spec("PROXY-010")
@pytest.mark.parametrize("code", [0, 1, 42, 125, 126, 127])
def test_exit_codes_arrive_through_server_and_launcher(server: Resident, code: int) -> None:
    done = server.call(f"pass+vault+code+{code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, b"before\n", b"")
    assert last_record(server)["exit_code"] == code
    assert last_record(server)["form"] == "launcher"


@pytest.mark.spec("PROXY-010")
def test_data_and_half_close_pass_through_the_handed_over_descriptors(server: Resident) -> None:
    """The target's end is seen by the source while the call goes on."""
    data = os.urandom(700_000)
    assert server.call("pass+vault+mirror", data).stdout == data
    server.qube.service("sink", f"#!/bin/sh\nexec >&-\ncat > {server.directory}/got\n")
    process = server.launch("pass+vault+sink")
    assert process.stdout.read() == b""
    process.stdin.write(b"x" * 200_000)
    process.stdin.close()
    assert process.wait(10) == 0
    assert (server.directory / "got").read_bytes() == b"x" * 200_000


def test_the_servers_own_rules_and_mistakes_of_the_source(server: Resident) -> None:
    for name, code in (("gone+vault+mirror", 125), ("pass+vault", 125), ("pass+va ult+m", 125)):
        done = server.call(name, b"x")
        assert (done.returncode, done.stdout, done.stderr) == (code, b"", b""), name
    assert server.call("pass+vault+mirror", source=None).returncode == 125
    assert "no source domain" in server.qube.log()


@pytest.mark.spec("PROXY-025")
def test_a_filter_that_exits_ends_its_call_and_not_the_server(server: Resident) -> None:
    other = server.launch("pass+vault+mirror")
    other.stdin.write(b"hello")
    other.stdin.flush()
    assert other.stdout.read(5) == b"hello"
    done = server.call("leave+vault+mirror", b"x")
    assert (done.returncode, done.stdout) == (125, b"")
    record = eventually(lambda: server.qube.records() and last_record(server))
    assert (record["cause"], record["filter"]) == ("filter-error", "leave")
    assert "SystemExit: 0 at" in str(record["reason"]) and "leave.py:11" in str(record["reason"])
    other.stdin.close()
    assert other.wait(DEADLINE) == 0


@pytest.mark.spec("PROXY-010")
def test_without_a_server_the_launcher_says_125_and_why(server: Resident) -> None:
    """No socket; a socket on which nobody listens; one that another user could have made."""
    with resident(start=False) as other:
        done = other.call("pass+vault+mirror", b"x")
        assert (done.returncode, done.stdout, done.stderr) == (125, b"", b"")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.bind(f"{other.directory}/launcher.sock")
        done = other.call("pass+vault+mirror", b"x")
        assert (done.returncode, done.stdout, done.stderr) == (125, b"", b"")
        log = other.directory / "xdg/sluice/proxy/proxy.log"
        if log.exists():
            assert "does not run" in log.read_text()


@pytest.mark.spec("PROXY-010", "PROXY-024")
def test_a_server_that_dies_in_the_middle_ends_the_call_with_125() -> None:
    with resident() as server:
        process = server.launch("pass+vault+mirror")
        process.stdin.write(b"hello")
        process.stdin.flush()
        assert process.stdout.read(5) == b"hello"
        server.process.kill()
        assert process.wait(DEADLINE) == 125
        assert process.stdout.read() == b""
        eventually(lambda: not left_over(server.qube), what="the far end ends with its input")


def test_a_launcher_that_dies_ends_its_call(server: Resident) -> None:
    server.qube.service("idle", "#!/bin/sh\necho up\nexec sleep 60\n")
    process = server.launch("pass+vault+idle")
    assert process.stdout.read(3) == b"up\n"
    assert left_over(server.qube)
    process.kill()
    assert process.stdout.read() == b""
    eventually(lambda: not left_over(server.qube))
    record = eventually(lambda: last_record(server)["service"] == "idle" and last_record(server))
    assert record["cause"] == "source-gone" and "launcher" in str(record["reason"])


# --- raw socket -------------------------------------------------------------------------------


@pytest.mark.spec("PROXY-009")
def test_the_raw_socket_takes_the_descriptor_and_leaves_the_data(server: Resident) -> None:
    """In whatever pieces they come; dom0's longer descriptor is understood as well."""
    for descriptor in (b"qrexec-proxy+raw+vault+mirror work\0", b"qrexec-proxy+raw+vault+mirror+a+b work name dom0\0"):  # noqa: E501  # fmt: skip
        with server.raw(descriptor[:9]) as sock:
            sock.sendall(descriptor[9:] + b"data\0more")
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == b"data\0more"
    record = eventually(lambda: last_record(server)["argument"] == "a+b" and last_record(server))
    assert (record["form"], record["source"], record["chain"]) == ("raw", "work", "raw")


@pytest.mark.spec("PROXY-009")
@pytest.mark.parametrize(
    "text",
    [b"\0", b"qrexec-proxy+raw+vault+mirror\0", b"mirror work\0", b"qrexec-proxy work\0",
     b"qrexec-proxy+raw+vault+mirror wo\xffrk\0", b"qrexec-proxy+raw+vault+mirror  work\0",
     b"qrexec-proxy+raw+vault+mirror 1work\0", b"qrexec-proxy+raw+vault+mirror work x\0",
     b"qrexec-proxy+raw+vault work\0", b"qrexec-proxy+raw+vault+../x work\0"],
)  # fmt: skip
def test_what_is_no_descriptor_is_refused(server: Resident, text: bytes) -> None:
    calls = len(server.qube.calls())
    assert refused(server, text + b"data")
    eventually(lambda: last_record(server)["cause"] == "malformed")
    assert len(server.qube.calls()) == calls


@pytest.mark.spec("PROXY-009")
def test_a_chain_that_requires_an_exit_code_refuses_the_raw_socket(server: Resident) -> None:
    calls = len(server.qube.calls())
    assert refused(server, b"qrexec-proxy+pass+vault+mirror work\0x")
    record = eventually(lambda: last_record(server)["cause"] == "refused" and last_record(server))
    assert "exit code" in str(record["reason"])
    assert len(server.qube.calls()) == calls


@pytest.mark.spec("PROXY-009")
def test_an_over_long_descriptor_and_a_silent_one_are_closed(server: Resident) -> None:
    assert refused(server, b"q" * 70_000)
    eventually(lambda: "too long" in server.qube.log())

    async def silent() -> float:
        made = Server(str(server.qube.config), directory=str(own), patience=0.2)
        made.configuration.settings.metrics = ""
        await made.start()
        begun = made.loop.time()
        reader, writer = await asyncio.open_unix_connection(f"{own}/raw.sock")
        writer.write(b"qrexec-proxy+raw+vault")
        assert await asyncio.wait_for(reader.read(), DEADLINE) == b""
        writer.close()
        made.stop()
        await made.run()
        return made.loop.time() - begun

    own = server.directory / "own"
    own.mkdir()
    assert asyncio.run(silent()) >= 0.2
    assert not list(own.iterdir())


# --- who may speak ----------------------------------------------------------------------------

_KNOCK = """
import socket, sys
kind = socket.SOCK_SEQPACKET if "launcher" in sys.argv[1] else socket.SOCK_STREAM
sock = socket.socket(socket.AF_UNIX, kind)
sock.settimeout(60)
try:
    sock.connect(sys.argv[1])
    sock.send(b'{"method": "status"}\\n')
    print(sock.recv(100))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.spec("PROXY-063")
def test_the_sockets_are_for_their_owner_alone(server: Resident) -> None:
    for name in ("launcher", "raw", "control", "metrics"):
        status = (server.directory / f"{name}.sock").stat()
        assert status.st_mode & 0o777 == 0o600 and status.st_uid == os.geteuid()


@pytest.mark.spec("PROXY-063")
@pytest.mark.parametrize("name", ["launcher.sock", "raw.sock", "control.sock"])
def test_another_user_is_refused_even_where_the_mode_would_let_him(
    server: Resident, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:
        path = server.directory / name
        for place in (server.directory, path):
            place.chmod(0o777)
        done = subprocess.run(
            ["/usr/bin/python3", "-c", _KNOCK, str(path)],
            user=65534, group=65534, extra_groups=[], capture_output=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() in (b"b''", b"ConnectionResetError", b"BrokenPipeError")
        path.chmod(0o600)
        server.directory.chmod(0o700)
        eventually(lambda: "refused a connection of user 65534" in server.qube.log())
    else:
        ours = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: ours + 1)
        with pytest.raises(LocalError, match="another user"):
            ControlClient(str(server.directory / "control.sock"))


@pytest.mark.spec("PROXY-063")
@pytest.mark.parametrize("name", ["qrexec-proxy", "qrexec-proxy+pass+vault+mirror"])
@pytest.mark.parametrize(
    ("text", "what"),
    [("skip-service-descriptor = true\n", "skip-service-descriptor"), ("what\n", "judged")],
)
def test_a_configuration_that_skips_the_descriptor_keeps_the_server_from_starting(
    server: Resident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str,
    what: str,
) -> None:  # fmt: skip
    (tmp_path / name).write_text(text)
    monkeypatch.setenv("QUBES_RPC_CONFIG_PATH", f"/nonexistent:{tmp_path}")

    async def start() -> None:
        made = Server(str(server.qube.config), directory=str(tmp_path))
        await made.start()

    with pytest.raises(ConfigError, match=what):
        asyncio.run(start())
    (tmp_path / name).write_text("skip-service-descriptor = false\n")
    assert not (tmp_path / "launcher.sock").exists()


@pytest.mark.spec("PROXY-063")
def test_a_configuration_that_comes_later_closes_the_raw_socket(tmp_path: Path) -> None:
    with resident(start=False) as server:
        server.qube.chain("raw", '"pass"', rules=RAW)
        server.start(more={"QUBES_RPC_CONFIG_PATH": str(tmp_path)})
        (tmp_path / "qrexec-proxy").write_text("skip-service-descriptor = true\n")
        assert refused(server, b"qrexec-proxy+raw+vault+mirror work\0x")
        assert server.qube.calls() == []


def test_a_launchers_message_must_be_whole_and_have_two_descriptors(server: Resident) -> None:
    before = server.descriptors()
    for message, count in (
        (b"nonsense", 2), (encode_request("work", "pass+vault+mirror"), 1),
        (encode_request("work", "pass+vault+mirror"), 3), (b"sluice1 without NUL", 2),
    ):  # fmt: skip
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(f"{server.directory}/launcher.sock")
            rights = struct.pack(f"{count}i", *[0] * count)
            sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            assert sock.recv(10) == b""
    eventually(lambda: server.descriptors() <= before)


# --- what there is to see -----------------------------------------------------------------------


def scrape(server: Resident) -> dict[str, float]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(f"{server.directory}/metrics.sock")
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        head, _, body = read_all(sock).decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200") and "text/plain" in head
    rows = [line.rsplit(" ", 1) for line in body.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in rows}


@pytest.mark.spec("PROXY-056")
def test_metrics_count_calls_refusals_and_bytes(server: Resident) -> None:
    name = 'sluice_proxy_calls_total{cause="done",chain="short"}'
    sent = 'sluice_proxy_bytes_total{chain="short",direction="src2dst"}'
    refused = 'sluice_proxy_refused_total{cause="configuration"}'
    before = scrape(server)
    for _ in range(3):
        assert server.call("short+vault+mirror", b"0123456789").stdout == b"01234"
    server.call("none+vault+mirror")
    # What came before this test may just have ended, for those who called.
    eventually(lambda: scrape(server)["sluice_proxy_calls_active"] == 0)
    after = scrape(server)
    assert after[name] - before.get(name, 0) == 3
    assert after[sent] - before.get(sent, 0) == 15
    assert after[refused] - before.get(refused, 0) == 1
    assert after["sluice_proxy_call_seconds_count"] > before["sluice_proxy_call_seconds_count"]
    assert after["sluice_proxy_held_bytes_max"] == 256 << 20
    with server.raw(b"qrexec-proxy+raw+vault+mirror work\0x") as sock:
        assert sock.recv(1) == b"x"
        assert scrape(server)["sluice_proxy_calls_active"] == 1


@pytest.mark.parametrize(
    ("setting", "address"),
    [("/run/x/m.sock", "/run/x/m.sock"), ("9101", ("127.0.0.1", 9101)), ("[::1]:0", ("::1", 0)),
     (":80", ("127.0.0.1", 80)), ("127.0.0.9:1", ("127.0.0.9", 1))],
)  # fmt: skip
def test_where_metrics_may_be_served(setting: str, address: object) -> None:
    assert parse_address(setting) == address


ELSEWHERE = ["0.0.0.0:80", "[::]:80", "host:80", "127.0.0.1:", "127.0.0.1:70000", "x", "1.2.3.4:1"]


@pytest.mark.parametrize("setting", ELSEWHERE)
def test_metrics_are_never_served_to_other_machines(setting: str) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        parse_address(setting)


@pytest.mark.spec("PROXY-056")
def test_metrics_on_a_port_and_what_is_no_page() -> None:
    port = free_port()
    with resident(start=False) as server:
        server.qube.configure("", f'metrics = "127.0.0.1:{port}"')
        server.start()
        for path, status in (("/metrics", 200), ("/", 200), ("/x", 404)):
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
            client.request("GET", path)
            answer = client.getresponse()
            body = answer.read()
            assert answer.status == status
            assert (b"sluice_proxy_calls_active 0.0" in body) == (status == 200)
            client.close()


@pytest.mark.spec("PROXY-056")
def test_calls_under_way_are_listed_and_can_be_ended(server: Resident) -> None:
    process = server.launch("pass+vault+mirror+x")
    process.stdin.write(b"12345")
    process.stdin.flush()
    assert process.stdout.read(5) == b"12345"
    with server.control() as client:
        # Calls of other tests may just have ended, for those who called.
        (call,) = eventually(lambda: len(client.calls()) == 1 and client.calls())
        expected = {
            "form": "launcher",
            "source": "work",
            "target": "vault",
            "service": "mirror",
            "argument": "x",
            "chain": "pass",
            "state": "open",
        }
        assert {key: call[key] for key in expected} == expected
        assert call["bytes"]["src2dst"]["read"] == 5 and call["bytes"]["dst2src"]["written"] == 5
        assert call["seconds"] >= 0
        with pytest.raises(LocalError, match="no call of that name"):
            client.end("nothing")
        client.end(call["id"])
        assert process.wait(DEADLINE) == 125
        eventually(lambda: client.calls() == [])
    record = last_record(server)
    assert (record["id"], record["cause"]) == (call["id"], "killed")


def test_the_control_socket_survives_nonsense(server: Resident) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(f"{server.directory}/control.sock")
        stream = sock.makefile("rb")
        for line in (b"{", b"[1]", b'{"method": "none"}', b'{"method": 1}', b"[" * 5000,
                     b'{"method": "end", "ident": "x"}', b'\xff\xfe', b'{"method": "status"}'):  # fmt: skip  # noqa: E501
            sock.sendall(line + b"\n")
            answer = json.loads(stream.readline())
        assert answer["ok"] and answer["result"]["max_calls"] == 256
        sock.sendall(b"x" * 70_000)
        with contextlib.suppress(ConnectionResetError):
            assert stream.readline() == b""


def test_serve_tells_what_is_wrong_and_exits(server: Resident) -> None:
    with resident(start=False) as other:
        other.qube.chain("broken", "{ use = 'nothing' }")
        done = subprocess.run(
            [*COMMAND, "proxy", "serve", "--config", str(other.qube.config)],
            env=other.environment(None), capture_output=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 125 and b"unknown filter" in done.stderr
    assert alive(server.process.pid)


# --- a filter that blocks -----------------------------------------------------------------------

_SLOW = '''
import time

from sluice.proxy.options import Duration
from sluice.proxy.verdicts import SRC2DST, Replace


class Slow:
    """Takes its time."""

    name = "slow"
    inspects = (SRC2DST,)
    blocking = True

    class Options:
        """What can be set.

        seconds: how long
        """

        seconds: Duration = 600.0

    def __init__(self, options, link):
        self._seconds = options.seconds

    def data(self, direction, chunk):
        time.sleep(self._seconds)
        return Replace(bytes(chunk).upper())
'''


@pytest.mark.spec("PROXY-065")
def test_a_filter_that_blocks_gets_a_process_of_its_own(tmp_path: Path) -> None:
    with resident(start=False) as server:
        (tmp_path / "slow.py").write_text(_SLOW)
        server.qube.configure("", f'filters = ["{tmp_path}"]')
        server.qube.chain("pass", '"pass"')
        server.qube.chain("slow", "'slow'", "{ use = 'byte-limit', src2dst = 3 }")
        server.qube.chain("quick", "{ use = 'slow', seconds = '10ms' }")
        server.start()
        slow = server.launch("slow+vault+mirror")
        slow.stdin.write(b"x")
        slow.stdin.flush()
        eventually(server.qube.pids)
        assert server.call("quick+vault+mirror", b"abc").stdout == b"ABC"
        assert server.call("pass+vault+mirror", b"abc").stdout == b"abc"
        assert len(server.calls()) == 1, "the slow one is at it still"
        names = [filter["name"] for filter in server.qube.records()[0]["filters"]]
        assert names == ["slow"]
        slow.kill()
        eventually(lambda: not left_over(server.qube) and not server.calls())
