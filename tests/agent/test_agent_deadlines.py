"""Every state has its deadline, every queue its bound: on one loop, with short times put in."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.agent import trigger_body

from sluice.agent import caller, local
from sluice.agent.caller import CallRequest
from sluice.agent.control import MAX_HELD, Control
from sluice.agent.local import MAX_READING, LocalClient, TriggerSocket
from sluice.agent.waiting import MAX_PARKED, SessionWaiter
from sluice.errors import LocalError
from sluice.flow.reactor import Reactor
from sluice.service.address import Connecting, connect_blocking
from sluice.service.command import ServiceError

SHORT = 0.05


@pytest.fixture
def loop() -> Iterator[Reactor]:
    reactor = Reactor()
    yield reactor
    reactor.close()


@pytest.fixture
def path() -> Iterator[str]:
    name = f"/tmp/s-dl-{os.getpid()}"
    yield name
    Path(name).unlink(missing_ok=True)


def drive(loop: Reactor, condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        loop._run_due()
        loop.run_once(0.01)


# --- the trigger socket --------------------------------------------------------------------------


class Trigger:
    def __init__(self, loop: Reactor, path: str) -> None:
        self.requests: list[tuple[LocalClient, bytes]] = []
        self.logged: list[str] = []
        self.socket = TriggerSocket(
            loop, path, lambda *request: self.requests.append(request), self.logged.append
        )
        self.path = path

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)
        connection.settimeout(10)
        return connection


def test_a_client_that_sends_nothing_is_closed_in_time(
    loop: Reactor, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "REQUEST_TIMEOUT", SHORT)
    trigger = Trigger(loop, path)
    slow, silent = trigger.connect(), trigger.connect()
    slow.sendall(struct.pack("<II", 0x213, 200) + b"half")
    drive(loop, lambda: len(trigger.logged) == 2)
    assert slow.recv(1) == silent.recv(1) == b""
    assert not trigger.socket.clients and not trigger.requests
    trigger.socket.close()


def test_a_request_in_time_may_wait_for_ever(loop: Reactor, path: str) -> None:
    trigger = Trigger(loop, path)
    connection = trigger.connect()
    body = trigger_body(b"s\0")
    connection.sendall(struct.pack("<II", 0x213, len(body)) + body)
    drive(loop, lambda: trigger.requests)
    # Whatever time it had to send its request in is over now.
    for timer in loop._timers:
        timer.due = 0.0
    loop._run_due()
    assert trigger.socket.clients and not trigger.logged
    # A client that is not answered is closed with the agent, not with the listening socket.
    trigger.socket.close()
    assert trigger.socket.clients
    trigger.requests[0][0].close()
    assert connection.recv(1) == b""


def test_clients_over_the_bound_are_closed_at_once(loop: Reactor, path: str) -> None:
    trigger = Trigger(loop, path)
    connections = []
    for number in range(MAX_READING + 3):
        connections.append(trigger.connect())
        if number % 50 == 49:
            # The queue of the listening socket is shorter than all of them.
            for _ in range(50):
                loop.run_once(0)
    drive(loop, lambda: len(trigger.socket.reading) == MAX_READING)
    for connection in connections[MAX_READING:]:
        while True:
            loop.run_once(0)
            connection.setblocking(False)
            try:
                assert connection.recv(1) == b""
                break
            except BlockingIOError:
                continue
    trigger.socket.close()
    for connection in connections:
        connection.close()


def test_a_socket_path_that_cannot_be(loop: Reactor) -> None:
    for bad in ("/nowhere/socket", "/tmp/" + "x" * 120):
        with pytest.raises(LocalError):
            TriggerSocket(loop, bad, lambda *_: None, lambda _: None)


# --- the control channel -------------------------------------------------------------------------


def test_a_daemon_that_says_nothing(loop: Reactor) -> None:
    ours, theirs = socket.socketpair()
    ended: list[str | None] = []
    Control(
        loop,
        theirs.detach(),
        passed=False,
        on_event=lambda _event, _fds: None,
        on_end=ended.append,
        on_pressure=lambda _pressed: None,
        handshake_timeout=SHORT,
    )
    drive(loop, lambda: ended)
    assert ended == ["no HELLO came in time"]
    assert ours.recv(12) and ours.recv(1) == b""
    ours.close()


def test_what_the_daemon_does_not_take_stops_new_requests(loop: Reactor) -> None:
    ours, theirs = socket.socketpair()
    pressed: list[bool] = []
    control = Control(
        loop,
        theirs.detach(),
        passed=False,
        on_event=lambda _event, _fds: None,
        on_end=lambda _reason: None,
        on_pressure=pressed.append,
    )
    sent = 12
    while not pressed:
        control.send(b"x" * 10000)
        sent += 10000
        assert sent < (4 << 20) + MAX_HELD
    received = 0
    ours.setblocking(False)
    while received < sent:
        loop.run_once(0)
        try:
            received += len(ours.recv(1 << 20))
        except BlockingIOError:
            continue
    assert pressed == [True, False]
    control.close()
    ours.close()


# --- requests and connections --------------------------------------------------------------------


class Outcome:
    """Collects what a request or a connection comes to."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def request(self, loop: Reactor, path: str, timeout: float | None) -> CallRequest:
        return CallRequest(
            loop,
            b"vm",
            b"s",
            agent_socket=path,
            on_open=lambda r, w: self.events.append((r, w)),
            on_refused=lambda: self.events.append("refused"),
            on_error=self.events.append,
            timeout=timeout,
        )


def full_listener(path: str) -> tuple[socket.socket, list[socket.socket]]:
    """A listening socket whose queue is full."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(0)
    waiting = []
    while True:
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        waiting.append(connection)
        if connection.connect_ex(path):
            return listener, waiting


def close(listener: socket.socket, waiting: list[socket.socket]) -> None:
    for one in (listener, *waiting):
        one.close()


def test_an_agent_that_does_not_accept_is_waited_for_and_given_up(loop: Reactor, path: str) -> None:
    listener, waiting = full_listener(path)
    outcome = Outcome()
    outcome.request(loop, path, SHORT)
    drive(loop, lambda: outcome.events)
    assert outcome.events == ["no answer in time"]
    patient = Outcome()
    patient.request(loop, path, None)
    loop._run_due()
    for _ in waiting[:-1]:
        listener.accept()[0].close()
    drive(loop, lambda: select.select([listener], [], [], 0)[0])
    accepted = listener.accept()[0]
    assert accepted.recv(8) == struct.pack("<II", 0x213, 162)
    accepted.close()
    drive(loop, lambda: patient.events)
    assert patient.events == ["refused"]
    close(listener, waiting)


def test_an_agent_that_does_not_answer(loop: Reactor, path: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    outcome = Outcome()
    outcome.request(loop, path, SHORT)
    drive(loop, lambda: outcome.events)
    assert outcome.events == ["no answer in time"]
    listener.close()


def test_a_peer_that_does_not_come(
    loop: Reactor, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller, "PEER_TIMEOUT", SHORT)
    monkeypatch.setenv("VCHAN_SOCKET_DIR", str(tmp_path))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    outcome = Outcome()
    outcome.request(loop, path, None)
    loop._run_due()
    connection = listener.accept()[0]
    connection.sendall(struct.pack("<II", 1, 2))
    drive(loop, lambda: outcome.events)
    assert outcome.events == ["the other side of the call does not connect"]
    connection.recv(10000)
    assert connection.recv(1) == b""
    connection.close()
    listener.close()


def test_cancelling_a_request_calls_nobody(loop: Reactor, path: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    outcome = Outcome()
    request = outcome.request(loop, path, SHORT)
    loop._run_due()
    request.cancel()
    request.cancel()
    due: list[int] = []
    loop.call_later(SHORT * 2, due.append, 1)
    drive(loop, lambda: due)
    assert outcome.events == []
    listener.close()


def test_a_service_whose_queue_is_full(loop: Reactor, path: str) -> None:
    listener, waiting = full_listener(path)
    outcome = Outcome()
    Connecting(
        loop,
        socket.AF_UNIX,
        path.encode(),
        outcome.events.append,
        outcome.events.append,
        timeout=SHORT,
    )
    drive(loop, lambda: outcome.events)
    (failure,) = outcome.events
    assert isinstance(failure, ServiceError) and failure.code == 125
    assert "does not answer" in str(failure)
    patient = Outcome()
    Connecting(loop, socket.AF_UNIX, path.encode(), patient.events.append, patient.events.append)
    loop._run_due()
    for _ in waiting[:-1]:
        listener.accept()[0].close()
    drive(loop, lambda: patient.events)
    (fd,) = patient.events
    assert isinstance(fd, int) and os.get_blocking(fd) and not os.get_inheritable(fd)
    os.close(fd)
    close(listener, waiting)


def test_giving_a_connection_up_calls_nobody(loop: Reactor) -> None:
    outcome = Outcome()
    attempt = Connecting(
        loop, socket.AF_UNIX, b"/nowhere", outcome.events.append, outcome.events.append
    )
    attempt.close()
    loop._run_due()
    assert outcome.events == []


def test_connections_of_one_shot_programs(path: str) -> None:
    with pytest.raises(ServiceError):
        connect_blocking(socket.AF_UNIX, path.encode())
    listener, waiting = full_listener(path)
    with pytest.raises(ServiceError, match=r"does not answer|unavailable"):
        connect_blocking(socket.AF_UNIX, path.encode(), SHORT)
    close(listener, waiting)


# --- waiting for a session -----------------------------------------------------------------------


class Processes:
    """Stands for the table of processes: nothing ends before it is told to."""

    def __init__(self) -> None:
        self.watched: dict[int, Callable[[int], None]] = {}

    def watch(self, pid: int, on_exit: Callable[[int], None]) -> None:
        self.watched[pid] = on_exit


def test_parked_requests_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "qubes.WaitForSession"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("QREXEC_SERVICE_PATH", str(tmp_path))
    processes = Processes()
    logged: list[str] = []
    waiter = SessionWaiter(processes, {b"PATH": b"/bin"}, logged.append)  # type: ignore[arg-type]
    proceeded: list[int] = []
    for number in range(MAX_PARKED + 2):
        waiter.wait(b"user", b"work", lambda number=number: proceeded.append(number))
    assert proceeded == [MAX_PARKED, MAX_PARKED + 1]
    assert len(processes.watched) == 1 and "too many" in logged[0]
    ((pid, ended),) = processes.watched.items()
    os.waitpid(pid, 0)
    ended(1)
    assert sorted(proceeded) == list(range(MAX_PARKED + 2)) and "ended with 1" in logged[-1]
    # The next request begins anew.
    waiter.wait(b"user", b"work", lambda: proceeded.append(-1))
    assert -1 not in proceeded and len(processes.watched) == 2
    os.waitpid(max(processes.watched), 0)
