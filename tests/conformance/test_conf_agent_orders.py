"""Every order of events at the end of a call, on both sides: each ends in time, with its code.

The events on the service side: the caller's end-of-file, the service's ends of stdout, stderr and
stdin, its exit, the peer's going. On the caller's side: end of the local stdin, the service's ends
and exit code, the peer's going, the local reader's going. All 720 orders of each run with --soak; a
fixed choice of them always.
"""

from __future__ import annotations

import itertools
import os
import random
import struct
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conformance.test_conf_agent_passed import PassedAgent
from tests.support.agent import (
    DEADLINE,
    EXIT,
    SELF,
    STDERR,
    STDIN,
    STDOUT,
    Place,
    Wire,
    a_place,
    code,
    send_fds,
    streams,
)

ME = SELF.encode()
SERVICE_EVENTS = ("stdin", "out", "err", "in", "exit", "gone")
CALLER_EVENTS = ("stdin", "out", "err", "code", "gone", "reader")


def choice(events: tuple[str, ...], count: int) -> list[tuple[str, ...]]:
    """Return a fixed choice of orders."""
    return random.Random(7).sample(list(itertools.permutations(events)), count)


# A service that closes what it is told to close, and says when it has.
OBEDIENT = """#!/usr/bin/python3 -IS
import os, _socket
link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
link.connect(PATH)
while True:
    order = link.recv(1)
    if order == b"x" or not order:
        os._exit(7)
    os.close({b"i": 0, b"o": 1, b"e": 2}[order])
    link.send(order)
"""


class Serving:
    """One agent, and services that obey."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.agent = PassedAgent(place)
        self.listener = place.listen("run/orders")
        place.service("test.Obey", OBEDIENT.replace("PATH", repr(str(place.path / "run/orders"))))
        self.number = 0

    def play(self, order: tuple[str, ...]) -> None:
        self.number += 1
        wire = self.agent.call(ME + b":QUBESRPC test.Obey work", self.number)
        link = self.listener.accept()[0]
        link.settimeout(DEADLINE)
        exited = gone = False
        for event in order:
            if event == "stdin" and not gone:
                try:
                    wire.message(STDIN, b"some")
                    wire.message(STDIN)
                except BrokenPipeError:
                    # The call may be over already where the service has ended.
                    assert exited, order
            elif event == "gone":
                gone = True
                if exited:
                    self.check(wire)
                wire.close()
            elif event == "exit":
                exited = True
                link.send(b"x")
                link.close()
            elif event in ("out", "err", "in") and not exited:
                link.send({"out": b"o", "err": b"e", "in": b"i"}[event])
                assert link.recv(1), order
        self.agent.terminated(self.number)

    def check(self, wire: Wire) -> None:
        messages = wire.rest()
        assert streams(messages, STDOUT) == b"" and streams(messages, STDERR) == b""
        assert code(messages) == 7


@pytest.fixture(scope="module")
def serving() -> Iterator[Serving]:
    with a_place() as place:
        yield Serving(place)


def test_orders_at_the_service(serving: Serving) -> None:
    for order in choice(SERVICE_EVENTS, 90):
        serving.play(order)
    assert serving.agent.control.silent()


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_all_orders_at_the_service(serving: Serving) -> None:
    for order in itertools.permutations(SERVICE_EVENTS):
        serving.play(order)
    assert serving.agent.control.silent()


class Calling:
    """Runs of qrexec-client-vm against a tester who is agent and service."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.listener = place.listen("run/agent")

    def play(self, order: tuple[str, ...]) -> None:
        process = self.place.start(
            "qrexec-client-vm",
            *("-a", str(self.place.agent_socket), "vm", "s"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.place._processes.remove(process)
        trigger = self.listener.accept()[0]
        assert Wire(trigger).next() is not None
        one_read, one_write = os.pipe()
        other_read, other_write = os.pipe()
        send_fds(trigger, struct.pack("<II", 43, 1), [one_read, other_write])
        os.close(one_read)
        os.close(other_write)
        wire = Wire(other_read, one_write)
        wire.shake()
        assert process.stdin is not None and process.stdout is not None
        status = 255
        lost = False
        for event in order:
            try:
                if event == "stdin":
                    process.stdin.close()
                elif event == "reader":
                    process.stdout.close()
                elif event == "gone":
                    wire.close()
                    lost = True
                elif not lost and event == "code":
                    wire.message(EXIT, struct.pack("<i", 7))
                    status = 7
                elif not lost:
                    wire.message(STDOUT if event == "out" else STDERR)
            except BrokenPipeError:
                # It has ended meanwhile, as it may once it knows the code.
                assert status == 7, order
        assert process.wait(DEADLINE) == status, order
        process.stdin.close()
        process.stdout.close()
        assert Wire(trigger).ended()
        trigger.close()
        wire.close()


@pytest.fixture
def calling() -> Iterator[Calling]:
    with a_place() as place:
        yield Calling(place)


def test_orders_at_the_caller(calling: Calling) -> None:
    for order in choice(CALLER_EVENTS, 90):
        calling.play(order)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_all_orders_at_the_caller(calling: Calling) -> None:
    for order in itertools.permutations(CALLER_EVENTS):
        calling.play(order)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pieces=st.lists(st.integers(0, 70000), max_size=8),
    cuts=st.randoms(use_true_random=False),
    answer_first=st.booleans(),
)
def test_random_sizes_and_pauses(
    serving: Serving, pieces: list[int], cuts: random.Random, answer_first: bool
) -> None:
    """What a service gets and gives does not depend on how the bytes were cut on their way."""
    serving.number += 1
    wire = serving.agent.call(ME + b":cat; echo end >&2; exit 5", serving.number)
    sent = b"".join(os.urandom(size) for size in pieces)
    stream = b""
    at = 0
    while at < len(sent):
        size = cuts.randint(1, 65536)
        part = sent[at : at + size]
        stream += struct.pack("<II", STDIN, len(part)) + part
        at += size
    stream += struct.pack("<II", STDIN, 0)
    received: list[tuple[int, bytes]] = []
    while stream:
        # Never more than the pipes and socket buffers on the way hold, or we should wait for us.
        size = cuts.choice([1, 7, 8, 9, 100, 4096, 30000])
        wire.send(stream[:size])
        stream = stream[size:]
        while not wire.silent(0 if answer_first else 0.0005):
            message = wire.next()
            if message is None:
                break
            received.append(message)
    received += wire.rest()
    assert b"".join(body for kind, body in received if kind == STDOUT) == sent
    assert streams(received, STDERR) == b"end\n" and code(received) == 5
    serving.agent.terminated(serving.number)
    wire.close()
