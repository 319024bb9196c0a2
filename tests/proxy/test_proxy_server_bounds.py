"""The resident form: many calls at once, and what they cost."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from tests.support.proxy import eventually
from tests.support.proxy_server import (
    RAW,
    left_over,
    read_all,
    refused,
    resident,
)

# Far more than anything takes: for what is no matter of time.
DEADLINE = 30.0


@pytest.mark.spec("PROXY-055")
def test_one_source_cannot_use_up_the_places_of_the_others() -> None:
    with resident(start=False) as server:
        server.qube.configure("", "max_calls = 4\nmax_calls_source = 2\n")
        server.qube.chain("pass", '"pass"')
        server.start()
        running = [server.launch("pass+vault+mirror", "work") for _ in range(2)]
        eventually(lambda: len(server.calls()) == 2)
        done = server.call("pass+vault+mirror", b"x", "work")
        assert (done.returncode, done.stdout) == (126, b"")
        assert "of 'work' are under way already" in server.qube.log()
        assert server.call("pass+vault+mirror", b"x", "other").stdout == b"x"
        running += [server.launch("pass+vault+mirror", name) for name in ("other", "third")]
        eventually(lambda: len(server.calls()) == 4)
        assert server.call("pass+vault+mirror", b"x", "fourth").returncode == 126
        assert [r["cause"] for r in server.qube.records() if r["exit_code"]] == ["busy", "busy"]
        for process in running:
            process.stdin.close()
            assert process.wait(DEADLINE) == 0
        eventually(lambda: not server.calls())
        assert server.call("pass+vault+mirror", b"x", "work").stdout == b"x"


@pytest.mark.spec("PROXY-054")
def test_256_calls_at_once_all_complete_and_one_more_is_refused_at_once() -> None:
    with resident(start=False) as server:
        server.qube.chain("raw", "{ use = 'byte-limit', src2dst = '1M' }", rules=RAW)
        server.start()
        before = server.descriptors()
        socks = [
            server.raw(f"qrexec-proxy+raw+vault+mirror s{number % 8}\0".encode())
            for number in range(256)
        ]
        eventually(lambda: len(server.calls()) == 256, 60)
        assert refused(server, b"qrexec-proxy+raw+vault+mirror other\0x")
        assert len(server.calls()) == 256, "it was not made to wait for one to end"
        for number, sock in enumerate(socks):
            sock.sendall(b"%d" % number * 100)
            sock.shutdown(socket.SHUT_WR)
        for number, sock in enumerate(socks):
            assert read_all(sock) == b"%d" % number * 100
            sock.close()
        eventually(lambda: not server.calls(), 60)
        records = server.qube.records()
        assert len(records) == 257 and len({r["id"] for r in records}) == 257
        assert [r["cause"] for r in records].count("done") == 256
        assert [r["cause"] for r in records].count("busy") == 1
        eventually(lambda: not left_over(server.qube))
        eventually(lambda: server.descriptors() <= before + 8, what="descriptors are given back")


@pytest.mark.spec("PROXY-022")
def test_idle_calls_cost_the_server_nothing() -> None:
    """No wake-up while nothing happens, also of the watcher of the configuration."""
    with resident(start=False) as server:
        server.qube.chain("raw", "{ use = 'byte-limit', src2dst = '1M' }", rules=RAW)
        server.start()
        socks = [server.raw(b"qrexec-proxy+raw+vault+mirror work\0x") for _ in range(10)]
        assert [sock.recv(1) for sock in socks] == [b"x"] * 10

        def wakeups() -> int:
            """Return how often the server was woken; -1 while it has something to do."""
            tasks = Path(f"/proc/{server.process.pid}/task")
            texts = [(task / "status").read_text() for task in tasks.iterdir()]
            if any(text.split("\nState:\t")[1][0] != "S" for text in texts):
                return -1
            return sum(
                int(text.split("\nvoluntary_ctxt_switches:")[1].split()[0]) for text in texts
            )

        eventually(lambda: -1 != wakeups() == (time.sleep(0.3), wakeups())[1])
        before = wakeups()
        time.sleep(1.5)
        assert wakeups() == before
        for sock in socks:
            sock.close()


@pytest.mark.soak
@pytest.mark.spec("PROXY-054")
def test_256_launchers_at_once_all_complete() -> None:
    with resident(start=False) as server:
        server.start()
        running = [server.launch("pass+vault+mirror", f"s{number % 8}") for number in range(256)]
        eventually(lambda: len(server.calls()) == 256, 60)
        assert server.call("pass+vault+mirror", b"x", "other").returncode == 126
        for number, process in enumerate(running):
            process.stdin.write(b"%d" % number)
            process.stdin.close()
        for number, process in enumerate(running):
            assert process.stdout.read() == b"%d" % number
            assert process.wait(30) == 0
        assert len(server.qube.records()) == 257


@pytest.mark.soak
@pytest.mark.spec("PROXY-022")
def test_a_thousand_idle_calls_cost_nothing() -> None:
    with resident(start=False) as server:
        server.qube.configure("", "max_calls = 1000\nmax_calls_source = 1000\n")
        server.qube.chain("raw", "{ use = 'byte-limit', src2dst = '1M' }", rules=RAW)
        server.start()
        socks = [server.raw(b"qrexec-proxy+raw+vault+mirror work\0x") for _ in range(1000)]
        assert all(sock.recv(1) == b"x" for sock in socks)
        time.sleep(1)
        fields = Path(f"/proc/{server.process.pid}/stat")

        def ticks() -> int:
            stat = fields.read_text().rsplit(")", 1)[1].split()
            return int(stat[11]) + int(stat[12])

        before = ticks()
        time.sleep(10)
        assert ticks() == before
        for sock in socks:
            sock.close()
        eventually(lambda: not server.calls() and not left_over(server.qube), 60)
