"""qrexec-daemon: requests of local clients, data ports, ends of connections."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.adminvm import (
    EXEC_CMDLINE,
    HELLO,
    JUST_EXEC,
    SERVICE_CONNECT,
    SERVICE_REFUSED,
    TERMINATED,
    Wire,
    exec_body,
    hello,
    message,
    trigger4,
    wait_until,
)
from tests.support.qrexec_daemon import DaemonHarness, accept, answer, connect, harness


@pytest.fixture
def daemon() -> Iterator[DaemonHarness]:
    with harness() as it:
        yield it


def pending(daemon: DaemonHarness, agent: Wire, ident: bytes = b"SOCKET11") -> Wire:
    """A request that waits for its decision; returns the policy connection."""
    policy = daemon.policy()
    agent.send(trigger4(ident=ident))
    return daemon.keep(accept(policy))


@pytest.mark.spec("WIRE-040", "WIRE-041")
@pytest.mark.parametrize("kind", [EXEC_CMDLINE, JUST_EXEC])
def test_a_command_is_answered_and_forwarded(daemon: DaemonHarness, kind: int) -> None:
    agent = daemon.start()
    client = daemon.request(b"user:x\0", kind=kind)
    assert client.exactly(16) == message(kind, exec_body(42, 513))
    assert agent.exactly(23) == message(kind, exec_body(0, 513, b"user:x\0"))


@pytest.mark.spec("WIRE-042")
def test_the_client_is_answered_though_the_agent_does_not_read(daemon: DaemonHarness) -> None:
    daemon.start()
    for number in range(3):
        client = daemon.request(b"user:" + b"x" * 60000 + b"\0")
        assert client.expect(EXEC_CMDLINE) == exec_body(42, 513 + number)


USERS = [
    (b"DEFAULT:x\0", b"user:x\0"),
    (b"DEFAULT\0", b"DEFAULT\0"),
    (b"default:x\0", b"default:x\0"),
    (b"XDEFAULT:x\0", b"XDEFAULT:x\0"),
]


@pytest.mark.spec("WIRE-043", "WIRE-044")
def test_the_default_user_is_put_in(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    for text, forwarded in USERS:
        for kind in (EXEC_CMDLINE, JUST_EXEC):
            daemon.request(text, kind=kind).expect(kind)
            assert agent.expect(kind)[8:] == forwarded


@pytest.mark.spec("WIRE-045")
def test_no_user_is_put_into_an_ident(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    # An ident cannot hold a colon, so this one is not pending; nothing must be forwarded.
    pending(daemon, agent, b"DEFAULT")
    daemon.request(b"DEFAULT\0", 43, 514, SERVICE_CONNECT)
    assert agent.expect(SERVICE_CONNECT) == exec_body(43, 514, b"DEFAULT\0")
    assert daemon.request(b"DEFAULT:x\0", 43, 514, SERVICE_CONNECT).at_end()
    assert agent.silent()


BAD_REQUESTS = [
    message(EXEC_CMDLINE, exec_body(0, 0, b"user:x")),
    message(EXEC_CMDLINE, exec_body(0, 0)),
    struct.pack("<II", EXEC_CMDLINE, 65536),
    message(EXEC_CMDLINE, exec_body(0, 0, b"u:" + b"x" * 65525 + b"\0")),
    message(0x203, exec_body(0, 0, b"x\0")),
    message(0x190, exec_body(0, 0, b"x\0")),
    hello(3),
    message(EXEC_CMDLINE, exec_body(0, 512, b"user:x\0")),
    message(EXEC_CMDLINE, exec_body(0, 769, b"user:x\0")),
]


@pytest.mark.spec("WIRE-046", "WIRE-047", "WIRE-048", "WIRE-051")
def test_bad_requests_close_the_session(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    for data in BAD_REQUESTS:
        client = daemon.local()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.send(data)
        assert client.at_end(5), data
    assert agent.silent()
    assert daemon.alive()


@pytest.mark.spec("WIRE-047")
def test_the_longest_request_is_forwarded_whole(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    text = b"u:" + b"x" * (65535 - 8 - 3) + b"\0"
    daemon.request(text).expect(EXEC_CMDLINE)
    assert agent.expect(EXEC_CMDLINE)[8:] == text


@pytest.mark.spec("WIRE-049")
def test_inner_nuls_are_forwarded(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    daemon.request(b"u:a\0b\0").expect(EXEC_CMDLINE)
    assert agent.expect(EXEC_CMDLINE)[8:] == b"u:a\0b\0"


@pytest.mark.spec("WIRE-050")
def test_an_explicit_port_is_forwarded_without_reply(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    client = daemon.request(b"user:x\0", 7, 513)
    assert agent.expect(EXEC_CMDLINE) == exec_body(7, 513, b"user:x\0")
    assert client.silent()
    # It is not in the table: the next allocation may be the same.
    assert daemon.allocated()[1] == 513


@pytest.mark.spec("WIRE-052")
def test_a_second_request_closes_the_session_but_not_the_call(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    client, _ = daemon.allocated()
    client.send(b"\0")
    assert client.at_end()
    assert agent.expect(EXEC_CMDLINE)[8:] == b"user:x\0"
    assert daemon.allocated()[1] == 514
    both = daemon.local()
    both.send(message(EXEC_CMDLINE, exec_body(0, 0, b"u:y\0")) * 2)
    assert both.expect(EXEC_CMDLINE) == exec_body(42, 515)
    assert both.at_end()


@pytest.mark.spec("WIRE-053", "WIRE-054", "WIRE-055", "WIRE-057")
def test_a_pending_request_is_connected_once(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    pending(daemon, agent)
    assert daemon.request(b"SOCKET99\0", 43, 514, SERVICE_CONNECT).at_end()
    assert daemon.request(b"SOCKET1\0", 43, 514, SERVICE_CONNECT).at_end()
    client = daemon.request(b"SOCKET11\0", 43, 514, SERVICE_CONNECT)
    assert agent.expect(SERVICE_CONNECT) == exec_body(43, 514, b"SOCKET11\0")
    assert client.silent()
    assert daemon.request(b"SOCKET11\0", 43, 514, SERVICE_CONNECT).at_end()
    assert agent.silent()


@pytest.mark.spec("WIRE-056")
def test_a_port_is_allocated_for_a_connection(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    pending(daemon, agent)
    ident = b"SOCKET11".ljust(32, b"\0")
    client = daemon.request(ident, 0, 0, SERVICE_CONNECT)
    assert client.expect(SERVICE_CONNECT) == exec_body(42, 513)
    assert agent.expect(SERVICE_CONNECT) == exec_body(0, 513, ident)


@pytest.mark.spec("WIRE-055", "WIRE-116")
def test_a_bad_port_after_a_good_ident_leaves_the_request_allowed(
    daemon: DaemonHarness,
) -> None:
    agent = daemon.start()
    policy = pending(daemon, agent)
    assert daemon.request(b"SOCKET11\0", 43, 769, SERVICE_CONNECT).at_end()
    assert daemon.request(b"SOCKET11\0", 43, 514, SERVICE_CONNECT).at_end()
    policy.send(b"result=deny")
    policy.close()
    assert agent.silent()


@pytest.mark.spec("WIRE-058", "WIRE-116")
def test_a_connection_written_just_before_the_refusal_counts(daemon: DaemonHarness) -> None:
    """The policy program completes the call itself and then ends with a refusal."""
    agent = daemon.start()
    ident = b"SOCKET11".ljust(32, b"\0")
    body = message(SERVICE_CONNECT, exec_body(43, 514, ident))
    script = (
        "import socket,sys\n"
        "s=socket.socket(socket.AF_UNIX)\n"
        f"s.connect({str(daemon.sockets / 'qrexec.42')!r})\n"
        f"s.recv(12); s.sendall({hello(3) + body!r})\n"
    )
    path = daemon.directory / "connect.py"
    path.write_text(script)
    daemon.program(f"exec /usr/bin/python3 -IS {path}")
    for _ in range(3):
        agent.send(trigger4(ident=b"SOCKET11"))
        assert agent.expect(SERVICE_CONNECT) == exec_body(43, 514, ident)
    assert agent.silent()


@pytest.mark.spec("WIRE-059")
def test_a_stalled_client_delays_nobody(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    stalled = daemon.local()
    stalled.send(struct.pack("<II", EXEC_CMDLINE, 20)[:5])
    silent = daemon.keep(connect(daemon.sockets / "qrexec.42"))
    for number in range(3):
        assert daemon.allocated()[1] == 513 + number
        agent.expect(EXEC_CMDLINE)
    stalled.send(struct.pack("<II", EXEC_CMDLINE, 20)[5:] + exec_body(0, 0, b"u:0123456789"[:11]))
    stalled.send(b"\0")
    assert stalled.expect(EXEC_CMDLINE) == exec_body(42, 516)
    silent.expect(HELLO)


@pytest.mark.spec("WIRE-060")
def test_300_clients_do_no_harm(daemon: DaemonHarness) -> None:
    daemon.start()
    clients = []
    for _ in range(300):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(daemon.sockets / "qrexec.42"))
        clients.append(daemon.keep(Wire(sock)))
    assert all(client.expect(HELLO) for client in clients)
    clients[299].send(hello(3) + message(EXEC_CMDLINE, exec_body(0, 0, b"u:x\0")))
    assert clients[299].expect(EXEC_CMDLINE) == exec_body(42, 513)


@pytest.mark.spec("WIRE-061")
def test_dom0_takes_the_ports_in_order(daemon: DaemonHarness) -> None:
    daemon.start()
    assert [daemon.allocated(0)[1] for _ in range(3)] == [513, 514, 515]


@pytest.mark.spec("WIRE-062", "WIRE-063", "WIRE-064")
def test_parity_by_domain(daemon: DaemonHarness) -> None:
    daemon.start()
    peers = [41, 42, 43, 41, 43, 0, 0xFFFFFFFF]
    ports = [daemon.allocated(peer)[1] for peer in peers]
    assert ports == [513, 515, 514, 517, 516, 518, 519]


@pytest.mark.spec("WIRE-065")
def test_ports_run_out(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    for _ in range(128):
        daemon.allocated(43)
        agent.expect(EXEC_CMDLINE)
    assert daemon.request(b"u:x\0", 43).at_end()
    assert agent.silent()
    for _ in range(128):
        assert daemon.allocated(0)[1] % 2 == 1
        agent.expect(EXEC_CMDLINE)
    assert daemon.request(b"u:x\0", 0).at_end()
    assert daemon.alive()


@pytest.mark.spec("WIRE-066", "WIRE-067", "WIRE-068", "WIRE-069")
def test_a_port_is_released_by_its_end(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    first, _ = daemon.allocated(7)
    second, port = daemon.allocated(7)
    assert port == 515
    for _ in range(2):
        agent.expect(EXEC_CMDLINE)
    agent.send(message(TERMINATED, exec_body(8, 513)))
    assert first.silent()
    second.close()
    assert daemon.allocated(7)[1] == 517
    agent.send(message(TERMINATED, exec_body(7, 513)))
    assert first.at_end()
    assert daemon.allocated(7)[1] == 513


def stop(pid: int) -> None:
    """Have a process stand still, and wait until it does."""
    os.kill(pid, signal.SIGSTOP)
    stat = Path(f"/proc/{pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "standing still")


@pytest.mark.spec("WIRE-042")
def test_a_client_that_left_gets_no_port_and_nothing_is_forwarded(
    daemon: DaemonHarness,
) -> None:
    agent = daemon.start()
    for _ in range(3):
        client = daemon.local()
        assert daemon.process is not None
        stop(daemon.process.pid)  # it must not answer before the client is gone
        client.send(message(EXEC_CMDLINE, exec_body(0, 0, b"user:left\0")))
        client.sock.close()
        daemon.process.send_signal(signal.SIGCONT)
    assert daemon.allocated()[1] == 513
    assert agent.expect(EXEC_CMDLINE) == exec_body(0, 513, b"user:x\0")


@pytest.mark.spec("WIRE-070", "WIRE-071")
@pytest.mark.parametrize("body", [exec_body(0, 512), exec_body(0, 769), exec_body(0, 513, b"x")])
def test_an_impossible_end_ends_the_daemon(daemon: DaemonHarness, body: bytes) -> None:
    agent = daemon.start()
    agent.send(message(TERMINATED, body))
    assert agent.at_end()
    assert daemon.ended() == 1
    assert daemon.names() == set()


@pytest.mark.spec("WIRE-042", "WIRE-059")
def test_clients_wait_while_the_agent_does_not_read(daemon: DaemonHarness) -> None:
    """What is queued for the agent is bounded: further clients wait, none is lost."""
    agent = daemon.start()
    text = b"u:" + b"x" * 65000 + b"\0"
    clients = [daemon.local() for _ in range(30)]
    for client in clients:
        client.send(message(EXEC_CMDLINE, exec_body(0, 0, text)))
    for _ in clients:
        assert agent.expect(EXEC_CMDLINE)[8:] == text
    ports = {struct.unpack_from("<I", client.expect(EXEC_CMDLINE), 4)[0] for client in clients}
    assert ports == set(range(513, 543))
    assert daemon.alive()


def test_a_refusal_reaches_the_agent_while_clients_come_and_go(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    agent.send(trigger4(ident=b"A"))
    for _ in range(5):
        daemon.local().close()
    answer(policy, b"result=deny")
    assert agent.expect(SERVICE_REFUSED) == b"A".ljust(32, b"\0")
    wait_until(daemon.alive, "the daemon")
