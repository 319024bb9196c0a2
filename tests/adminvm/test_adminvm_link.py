"""The sans-I/O link of a control channel: what an agent may send, and what becomes of it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.support.adminvm import (
    EXEC_CMDLINE,
    SERVICE_CONNECT,
    SERVICE_REFUSED,
    TERMINATED,
    exec_body,
    hello,
    message,
    trigger2,
    trigger3,
    trigger4,
)

from sluice.adminvm.bucket import TokenBucket
from sluice.adminvm.channels import CallTable, Channel, PortTable
from sluice.adminvm.link import (
    Broken,
    Ended,
    Greeted,
    Link,
    Rejected,
    Request,
    Requested,
    State,
    Verdict,
)
from sluice.errors import LocalError, RemoteError, ResourceError


def greeted(version: int = 4, **options: object) -> Link:
    """A link that is open."""
    link = Link(PortTable(42), **options)  # type: ignore[arg-type]
    (event,) = link.receive(hello(version))
    assert isinstance(event, Greeted)
    return link


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("offered", "effective"), [(2, 2), (3, 3), (4, 4), (5, 4), (2**32 - 1, 4)])
def test_the_answer_is_the_lower_version(offered: int, effective: int) -> None:
    link = Link(PortTable(42))
    (event,) = link.receive(hello(offered))
    assert event == Greeted(effective, hello(effective))
    assert link.state is State.OPEN


@pytest.mark.parametrize("first", [hello(0), hello(1), message(0x300, b"\4\0\0"), trigger4()])
def test_a_bad_first_message_breaks_the_link(first: bytes) -> None:
    link = Link(PortTable(42))
    (event,) = link.receive(first)
    assert isinstance(event, Broken)
    assert link.state is State.CLOSED
    assert link.receive(hello(4)) == []


def test_messages_arrive_one_byte_at_a_time_or_all_at_once() -> None:
    stream = hello(4) + trigger4(ident=b"a") + trigger4(ident=b"b")
    whole = Link(PortTable(42)).receive(stream)
    link = Link(PortTable(42))
    single = [event for byte in stream for event in link.receive(bytes([byte]))]
    assert [type(event) for event in whole] == [Greeted, Requested, Requested]
    assert [type(event) for event in single] == [type(event) for event in whole]


@pytest.mark.parametrize(
    ("version", "data"),
    [
        (4, hello(4)),
        (4, message(EXEC_CMDLINE, exec_body(0, 0, b"x\0"))),
        (4, message(0x999)),
        (4, trigger2(b"d", b"s", b"i")),
        (3, trigger4()),
        (3, trigger2(b"d", b"s", b"i")),
        (2, trigger3(b"d", b"s", b"i")),
        (2, message(0x210, bytes(127))),
        (2, message(0x210, bytes(129))),
        (4, message(0x212, bytes(96))),
        (4, struct.pack("<II", 0x212, 65097)),
        (4, message(0x213, bytes(160))),
        (4, struct.pack("<II", 0x213, 65161)),
        (4, message(TERMINATED, exec_body(0, 513, b"x"))),
        (4, message(TERMINATED, exec_body(0, 512))),
        (4, message(TERMINATED, exec_body(0, 769))),
    ],
)
def test_what_the_version_does_not_allow_breaks_the_link(version: int, data: bytes) -> None:
    link = greeted(version)
    (event,) = link.receive(data)
    assert isinstance(event, Broken)
    assert link.state is State.CLOSED


def test_what_came_before_a_breach_is_still_told() -> None:
    link = greeted()
    first, second = link.receive(trigger4() + message(0x999))
    assert isinstance(first, Requested)
    assert isinstance(second, Broken)
    assert link.refuse(first.request) == b""
    link.end()
    assert first.request.verdict is Verdict.DROPPED


def test_a_request_is_answered_once() -> None:
    link = greeted()
    (event,) = link.receive(trigger4(ident=b"I"))
    assert isinstance(event, Requested)
    sent = link.connect(event.request, 43, 514)
    assert sent == message(SERVICE_CONNECT, exec_body(43, 514, b"I".ljust(32, b"\0")))
    assert link.refuse(event.request) == b""
    with pytest.raises(LocalError):
        link.connect(event.request, 43, 514)
    assert link.pending == 0


def test_a_refusal_carries_the_ident_and_excludes_a_connection() -> None:
    link = greeted()
    (event,) = link.receive(trigger4(ident=b"I"))
    assert isinstance(event, Requested)
    assert link.refuse(event.request) == message(SERVICE_REFUSED, b"I".ljust(32, b"\0"))
    with pytest.raises(LocalError):
        link.connect(event.request, 43, 514)


def test_nothing_is_sent_before_the_handshake() -> None:
    link = Link(PortTable(42))
    with pytest.raises(LocalError):
        link.execute(EXEC_CMDLINE, 0, 513, b"u:x\0")


def test_a_cut_message_is_noticed() -> None:
    link = greeted()
    link.receive(trigger4()[:50])
    assert link.end() is True
    assert greeted().end() is False


@pytest.mark.spec("WIRE-250")
def test_triggers_over_the_rate_are_refused_before_they_are_looked_at() -> None:
    clock = Clock()
    link = greeted(bucket=TokenBucket(100, 500, clock), max_pending=10_000)
    flood = b"".join(trigger4(ident=b"%d" % number) for number in range(600))
    events = link.receive(flood)
    assert sum(isinstance(event, Requested) for event in events) == 500
    refused = [event for event in events if isinstance(event, Rejected)]
    assert len(refused) == 100
    assert all(event.flood for event in refused)
    assert refused[0].answer == message(SERVICE_REFUSED, b"500".ljust(32, b"\0"))
    # A malformed one over the rate is refused by the rate: its body is not parsed.
    (event,) = link.receive(trigger4(service=b"", ident=b"x/y"))
    assert event == Rejected(
        "too many requests a second", True, message(SERVICE_REFUSED, b"x/y".ljust(32, b"\0"))
    )
    clock.now += 0.05
    events = link.receive(b"".join(trigger4() for _ in range(10)))
    assert sum(isinstance(event, Requested) for event in events) == 5


@pytest.mark.spec("WIRE-250")
def test_the_257th_pending_request_is_refused() -> None:
    link = greeted()
    events = link.receive(b"".join(trigger4(ident=b"%d" % number) for number in range(257)))
    assert sum(isinstance(event, Requested) for event in events) == 256
    last = events[-1]
    assert isinstance(last, Rejected)
    assert last.flood
    first = events[0]
    assert isinstance(first, Requested)
    link.refuse(first.request)
    (event,) = link.receive(trigger4())
    assert isinstance(event, Requested)


def test_ports_are_taken_lowest_first_by_parity() -> None:
    ports = PortTable(42)
    assert [ports.allocate(0).number for _ in range(3)] == [513, 514, 515]
    ports = PortTable(42)
    assert ports.allocate(41).number == 513
    assert ports.allocate(42).number == 515
    assert ports.allocate(43).number == 514
    assert ports.allocate(43).number == 516
    assert ports.allocate(0xFFFFFFFF).number == 517
    for _ in range(125):
        ports.allocate(1)
    with pytest.raises(ResourceError):
        ports.allocate(1)


def test_a_port_is_freed_by_its_own_peer_only() -> None:
    ports = PortTable(42)
    channel = ports.allocate(43)
    assert ports.terminated(44, channel.number) is None
    assert ports.terminated(43, channel.number) is channel
    assert ports.terminated(43, channel.number) is None
    with pytest.raises(RemoteError):
        ports.terminated(43, 512)


@pytest.mark.spec("WIRE-245")
def test_1024_calls_of_one_domain_can_live_at_once() -> None:
    calls = CallTable()
    channels = [calls.open(7, number, outgoing=True) for number in range(2000, 3024)]
    with pytest.raises(ResourceError):
        calls.open(7, 5000, outgoing=True)
    # Being called is bounded apart, so that others cannot take away the ability to call.
    calls.open(7, 5000, outgoing=False)
    assert calls.terminated(7, 2000) is channels[0]
    calls.open(7, 5001, outgoing=True)


def test_other_domains_cannot_keep_dom0_out() -> None:
    calls = CallTable(2)
    channels = [calls.open(7, 2000, outgoing=False), calls.open(8, 2001, outgoing=False)]
    with pytest.raises(ResourceError):
        calls.open(9, 2002, outgoing=False)
    channels += [calls.open(0, number, outgoing=False) for number in (2003, 2004)]
    with pytest.raises(ResourceError):
        calls.open(0, 2005, outgoing=False)
    # What the domain asks of dom0 is among the calls that it makes.
    channels += [calls.open(0, 2006, outgoing=True), calls.open(7, 2007, outgoing=True)]
    with pytest.raises(ResourceError):
        calls.open(0, 2008, outgoing=True)
    for channel in channels:
        calls.release(channel)
    assert len(calls) == 0
    calls.open(0, 2009, outgoing=True)


class LinkMachine(RuleBasedStateMachine):
    """Any order of an agent's messages and of our decisions, seen from outside.

    What must always hold: each request gets at most one of SERVICE_CONNECT and SERVICE_REFUSED,
    at most 256 are pending, a port has one owner, a closed link says and takes nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ports = PortTable(42)
        self.link = Link(self.ports, max_pending=8)
        self.requests: list[Request] = []
        self.answers: dict[int, list[int]] = {}
        self.channels: list[Channel] = []
        self.closed = False

    @initialize(version=st.sampled_from([2, 3, 4]))
    def handshake(self, version: int) -> None:
        self.take(hello(version))
        self.version = version

    def take(self, data: bytes) -> None:
        for event in self.link.receive(data):
            assert not self.closed
            match event:
                case Requested():
                    self.requests.append(event.request)
                case Rejected():
                    assert event.answer[:4] == struct.pack("<I", SERVICE_REFUSED)
                case Ended():
                    assert event.channel in self.channels
                    self.channels.remove(event.channel)
                case Broken():
                    self.closed = True

    def answered(self, request: Request, data: bytes) -> None:
        if data:
            self.answers.setdefault(id(request), []).append(struct.unpack_from("<I", data)[0])

    @rule(ident=st.binary(max_size=32), service=st.binary(max_size=12), name=st.binary(max_size=9))
    def trigger(self, ident: bytes, service: bytes, name: bytes) -> None:
        if self.version == 4:
            self.take(trigger4(name, service, ident))
        elif self.version == 3:
            self.take(trigger3(name, service, ident))
        else:
            self.take(trigger2(name, service, ident))

    @rule(data=st.binary(min_size=8, max_size=40))
    def garbage(self, data: bytes) -> None:
        self.take(data)

    @rule(domain=st.integers(0, 50), port=st.integers(513, 530))
    def terminated(self, domain: int, port: int) -> None:
        self.take(message(TERMINATED, exec_body(domain, port)))

    @precondition(lambda self: self.channels)
    @rule(data=st.data())
    def terminated_properly(self, data: st.DataObject) -> None:
        channel = data.draw(st.sampled_from(self.channels))
        self.take(message(TERMINATED, exec_body(channel.domain, channel.number)))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.answered(request, self.link.refuse(request))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def connect(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        decided = request.verdict is not Verdict.PENDING
        try:
            self.answered(request, self.link.connect(request, 43, 514))
            assert not decided
        except LocalError:
            assert decided or self.closed

    @rule(domain=st.integers(0, 60))
    def allocate(self, domain: int) -> None:
        channel = self.ports.allocate(domain)
        assert domain == 0 or channel.number % 2 == (domain <= 42)
        self.channels.append(channel)

    @precondition(lambda self: not self.closed)
    @rule()
    def end(self) -> None:
        self.link.end()
        self.closed = True

    @invariant()
    def one_answer_each(self) -> None:
        assert all(len(answers) == 1 for answers in self.answers.values())
        assert self.link.pending <= 8

    @invariant()
    def ports_are_unique(self) -> None:
        numbers = [channel.number for channel in self.channels]
        assert len(numbers) == len(set(numbers))


TestLinkMachine = LinkMachine.TestCase
TestLinkMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.soak
def test_the_link_for_a_long_time() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        LinkMachine, settings=settings(max_examples=3000, stateful_step_count=100, deadline=None)
    )


@given(st.lists(st.binary(min_size=1, max_size=80), max_size=30))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_the_link_raise(pieces: list[bytes]) -> None:
    link = Link(PortTable(42))
    broken = False
    for piece in pieces:
        events = link.receive(piece)
        assert not (broken and events)
        broken = broken or any(isinstance(event, Broken) for event in events)
    assert (link.state is State.CLOSED) == broken
