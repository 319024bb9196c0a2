"""qrexec-daemon: agents that lie about ends or come and go, and neighbours that are slow."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.adminvm import (
    EXEC_CMDLINE,
    HELLO,
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
from tests.support.qrexec_daemon import (
    DaemonHarness,
    accept,
    allow,
    answer,
    harness,
    listener,
    qubesd_call,
    read_policy_request,
    serve_local,
)


@pytest.fixture
def daemon() -> Iterator[DaemonHarness]:
    with harness() as it:
        yield it


def children(daemon: DaemonHarness) -> list[str]:
    """The processes that the daemon has started and not reaped."""
    assert daemon.process is not None
    pid = daemon.process.pid
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def descriptors(daemon: DaemonHarness) -> int:
    """How many descriptors the daemon has open."""
    assert daemon.process is not None
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def restart(daemon: DaemonHarness, agent: Wire) -> Wire:
    """Go, and come again as a new agent."""
    daemon.listen()
    agent.close()
    return daemon.greet()


# --- agents -------------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-066", "WIRE-110")
def test_what_dom0_runs_for_an_agent_is_bounded_by_what_runs(daemon: DaemonHarness) -> None:
    """The agent reports the end of each call at once, so that its port is free, and goes on."""
    daemon.service("test.Svc", "#!/bin/sh\nexec cat\n")
    agent = daemon.start()
    policy = daemon.policy()
    callers = []
    with listener(daemon.vchan / "vchan.42.0.513.sock") as channel:
        for _ in range(256):
            agent.send(trigger4())
            answer(policy, allow(target="dom0"))
            assert agent.expect(SERVICE_CONNECT)[:8] == exec_body(0, 513)
            callers.append(daemon.keep(accept(channel)))
            callers[-1].send(hello(4))
            callers[-1].expect(HELLO)
            agent.send(message(TERMINATED, exec_body(0, 513)))
        agent.send(trigger4())
        answer(policy, allow(target="dom0"))
        agent.expect(SERVICE_REFUSED)
        assert len(children(daemon)) == 256
        # The end of one makes room for another.
        callers[7].close()
        wait_until(lambda: len(children(daemon)) == 255, "the end of a service")
        agent.send(trigger4())
        answer(policy, allow(target="dom0"))
        agent.expect(SERVICE_CONNECT)


@pytest.mark.spec("WIRE-117")
def test_questions_about_calls_of_an_agent_that_is_gone_are_given_up(
    daemon: DaemonHarness,
) -> None:
    """Else an agent that comes and goes heaps up as many of them as it likes."""
    agent = daemon.start()
    policy, qubesd = daemon.policy(), daemon.qubesd()
    before = descriptors(daemon)
    for number in range(3):
        agent.send(b"".join(trigger4(ident=b"N%d" % n) for n in range(20)))
        held = [daemon.keep(accept(policy)) for _ in range(20)]
        for conn in held:
            read_policy_request(conn)
        agent = restart(daemon, agent)
        assert all(conn.at_end() for conn in held), number
    wait_until(lambda: descriptors(daemon) <= before + 1, "all connections to be closed")
    os.unlink(daemon.directory / "policy.sock")
    daemon.program(": > begun; exec sleep 100")
    agent.send(trigger4())
    wait_until((daemon.sockets / "begun").exists, "the policy program")
    os.unlink(daemon.sockets / "begun")
    agent = restart(daemon, agent)
    wait_until(lambda: not children(daemon), "the end of the policy program")
    qubesd.settimeout(0.1)
    with pytest.raises(TimeoutError):
        qubesd.accept()


@pytest.mark.alone
@pytest.mark.spec("WIRE-118")
def test_an_agent_that_comes_and_goes_is_slowed_down(daemon: DaemonHarness) -> None:
    """Each time costs log lines and work, and nothing else bounds how often."""
    agent = daemon.start()
    began = time.monotonic()
    for _ in range(8):
        agent = restart(daemon, agent)
    assert time.monotonic() - began < 10  # the first times are free: not two seconds each
    for _ in range(4):
        agent = restart(daemon, agent)
    assert time.monotonic() - began > 2
    began = time.monotonic()
    agent.close()
    wait_until(lambda: not daemon.names(), "the removal of the sockets")
    assert daemon.process is not None
    daemon.process.terminate()
    assert daemon.ended() == -signal.SIGTERM
    assert time.monotonic() - began < 10


# --- neighbours ---------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-092", "WIRE-098")
def test_a_policy_daemon_that_is_slow_to_accept_is_waited_for(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    policy.listen(1)
    for number in range(30):
        agent.send(trigger4(ident=b"N%d" % number))
    # The 31st has been refused unseen, so that the other 30 have been taken up.
    agent.send(trigger4(ident=b"a/b"))
    assert agent.expect(SERVICE_REFUSED).startswith(b"a/b")
    for _ in range(30):
        answer(policy, b"result=deny")
        agent.expect(SERVICE_REFUSED)
    assert daemon.program_calls() == []


@pytest.mark.spec("WIRE-099")
def test_a_target_daemon_that_is_slow_to_accept_is_waited_for(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy, target = daemon.policy(), daemon.daemon_of("dst")
    target.listen(1)
    agent.send(b"".join(trigger4(ident=b"N%d" % n) for n in range(20)))
    for _ in range(20):
        answer(policy, allow())
    assert agent.silent()
    ports = set(range(514, 554, 2))
    for port in sorted(ports):
        conn = daemon.keep(accept(target))
        serve_local(conn)
        conn.send(message(EXEC_CMDLINE, exec_body(43, port)))
    assert {struct.unpack_from("<I", agent.expect(SERVICE_CONNECT), 4)[0] for _ in ports} == ports


def making_a_disposable(daemon: DaemonHarness) -> tuple[socket.socket, Wire, Wire]:
    """Have a call wait for its disposable: qubesd, the agent, and the request to make it."""
    qubesd = daemon.qubesd()
    agent = daemon.start()
    policy = daemon.policy()
    agent.send(trigger4())
    answer(policy, allow(target="@dispvm:dvm", autostart="True"))
    conn = daemon.keep(accept(qubesd))
    qubesd_call(conn)
    return qubesd, agent, conn


@pytest.mark.spec("WIRE-107")
def test_a_disposable_must_have_a_name(daemon: DaemonHarness) -> None:
    qubesd, agent, conn = making_a_disposable(daemon)
    conn.send(b"0\0")
    conn.close()
    agent.expect(SERVICE_REFUSED)
    qubesd.settimeout(0.1)
    with pytest.raises(TimeoutError):
        qubesd.accept()


@pytest.mark.spec("WIRE-107", "WIRE-117")
def test_a_disposable_for_an_agent_that_is_gone_is_not_started(daemon: DaemonHarness) -> None:
    qubesd, agent, conn = making_a_disposable(daemon)
    agent = restart(daemon, agent)
    conn.send(b"0\0disp1")
    conn.close()
    assert qubesd_call(daemon.keep(accept(qubesd))) == b"admin.vm.Kill+ dom0 name disp1\0"
    assert agent.silent()


@pytest.mark.alone
@pytest.mark.spec("WIRE-107")
def test_a_disposable_that_is_made_while_we_end_is_killed(daemon: DaemonHarness) -> None:
    qubesd, _agent, conn = making_a_disposable(daemon)
    assert daemon.process is not None
    daemon.process.terminate()
    wait_until(lambda: not daemon.names(), "the removal of the sockets")
    conn.send(b"0\0disp1")
    conn.close()
    conn = daemon.keep(accept(qubesd))
    assert qubesd_call(conn) == b"admin.vm.Kill+ dom0 name disp1\0"
    conn.close()
    assert daemon.ended() == 0


# --- places -------------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-025")
@pytest.mark.parametrize("name", ["qrexec.42", "qrexec.src"])
def test_a_name_that_cannot_be_replaced_ends_the_start(daemon: DaemonHarness, name: str) -> None:
    (daemon.sockets / name).mkdir()
    daemon.listen()
    process = daemon.spawn()
    assert daemon.control is not None
    daemon.keep(accept(daemon.control)).greet()
    assert daemon.ended() == 1
    assert daemon.names() == {name}
    assert process.stderr is not None
    said = process.stderr.read()
    assert b"Traceback" not in said
    assert name.encode() + b": Is a directory" in said


@pytest.mark.spec("WIRE-022", "WIRE-027")
def test_numbers_are_those_of_c(daemon: DaemonHarness) -> None:
    """What does not fit an int wraps around, here to 42."""
    daemon.listen()
    daemon.spawn(str((1 << 32) + 42), "src", QREXEC_STARTUP_TIMEOUT="9" * 400)
    agent = daemon.greet()
    assert daemon.allocated()[1] == 513
    agent.expect(EXEC_CMDLINE)


@pytest.mark.spec("WIRE-022")
def test_a_number_that_wraps_below_zero(daemon: DaemonHarness) -> None:
    daemon.spawn(str(1 << 31), "src")
    assert daemon.ended() == 1


def test_an_interrupt_at_the_terminal_ends_it_in_order(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.ended() == -signal.SIGINT
    assert agent.at_end()
    assert daemon.names() == set()
    assert daemon.process.stderr is not None
    assert b"Traceback" not in daemon.process.stderr.read()


@pytest.mark.spec("WIRE-058", "WIRE-116")
def test_a_connection_written_while_clients_wait_comes_before_the_refusal(
    daemon: DaemonHarness,
) -> None:
    """The agent does not read, so that nothing more is taken from local clients for a while."""
    agent = daemon.start()
    policy = daemon.policy()
    agent.send(trigger4())
    asked = daemon.keep(accept(policy))
    read_policy_request(asked)
    text = b"u:" + b"x" * 65000 + b"\0"
    clients = [daemon.local() for _ in range(12)]
    handler = daemon.local()
    for client in clients:
        client.send(message(EXEC_CMDLINE, exec_body(0, 0, text)))
    # Some are answered, then it stops: as much is queued as may be.
    answered = [client for client in clients if not client.silent(0.3)]
    assert 0 < len(answered) < len(clients)
    ident = b"SOCKET12".ljust(32, b"\0")
    handler.send(message(SERVICE_CONNECT, exec_body(43, 514, ident)))
    asked.send(b"result=deny")
    asked.sock.shutdown(socket.SHUT_WR)
    assert asked.at_end()  # the daemon knows the answer
    kinds = [agent.receive()[0] for _ in range(len(clients) + 1)]
    assert kinds.count(SERVICE_CONNECT) == 1
    assert SERVICE_REFUSED not in kinds
    assert agent.silent()


@pytest.mark.spec("WIRE-107")
def test_the_disposables_of_a_domain_are_bounded(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy, qubesd, target = daemon.policy(), daemon.qubesd(), daemon.daemon_of("disp1")
    reply = allow(target="@dispvm:dvm", autostart="True")

    def asked_of_qubesd(content: bytes) -> None:
        conn = accept(qubesd)
        qubesd_call(conn)
        conn.send(b"0\0" + content)
        conn.close()

    sessions = []
    for number in range(257):
        agent.send(trigger4(ident=b"N%d" % number))
        answer(policy, reply)
        if number == 256:
            break
        asked_of_qubesd(b"disp1")
        asked_of_qubesd(b"")
        sessions.append(daemon.keep(accept(target)))
        serve_local(sessions[-1])
        sessions[-1].send(message(EXEC_CMDLINE, exec_body(43, 514)))
        agent.expect(SERVICE_CONNECT)
    assert agent.expect(SERVICE_REFUSED).startswith(b"N256\0")
    # The end of one makes room for another.
    sessions[7].close()
    asked_of_qubesd(b"")
    agent.send(trigger4())
    answer(policy, reply)
    asked_of_qubesd(b"disp1")


@pytest.mark.spec("WIRE-111", "WIRE-116")
def test_a_service_whose_caller_does_not_appear_is_ended(daemon: DaemonHarness) -> None:
    """After five seconds (15); the caller was told to connect, so that it is not refused."""
    daemon.service("test.Svc", "#!/bin/sh\nexec sleep 100\n")
    agent = daemon.start()
    policy = daemon.policy()
    agent.send(trigger4())
    answer(policy, allow(target="dom0"))
    agent.expect(SERVICE_CONNECT)
    wait_until(lambda: children(daemon), "the service")
    began = time.monotonic()
    wait_until(lambda: not children(daemon), "its end", 30)
    assert time.monotonic() - began > 3
    assert agent.silent()
    assert daemon.alive()
