"""WIRE-145 to 159: requests of local programs, and waiting for a session."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from tests.support.agent import (
    CONNECT,
    EXEC,
    REFUSED,
    SELF,
    STDERR,
    STDOUT,
    TRIGGER2,
    TRIGGER3,
    TRIGGER4,
    AgentUnderTest,
    Place,
    Wire,
    a_place,
    code,
    streams,
    trigger_body,
    until,
)

ME = SELF.encode()
IDENT = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. ")


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


def legal(ident: bytes) -> bool:
    """Apply 6.8 step 3."""
    text = ident.split(b"\0")[0]
    return 0 < len(text) < 32 and set(text) <= IDENT and ident == text.ljust(32, b"\0")


def ask(place: Place, body: bytes) -> Wire:
    client = Wire(place.connect(place.agent_socket))
    client.message(TRIGGER4, body)
    return client


@pytest.mark.spec("WIRE-145")
def test_only_the_ident_is_changed(place: Place) -> None:
    agent = AgentUnderTest(place)
    body = trigger_body(b"We\xffird+\0 $name", b"tar\x1bGet", b"Source")
    ask(place, body)
    message = agent.control.next()
    assert message is not None and message[0] == TRIGGER4
    assert message[1][:128] == body[:128] and message[1][160:] == body[160:]


@pytest.mark.spec("WIRE-145")
def test_the_longest_service_name(place: Place) -> None:
    agent = AgentUnderTest(place)
    body = trigger_body(b"s" * 64999 + b"\0")
    ask(place, body)
    message = agent.control.next()
    assert message is not None and message[1][160:] == body[160:]


@pytest.mark.spec("WIRE-146")
@pytest.mark.parametrize("ident", [b"", b"\xff" * 32, b"SOCKET\0garbage", b"SOCKET"])
def test_the_forwarded_ident_is_legal(place: Place, ident: bytes) -> None:
    agent = AgentUnderTest(place)
    ask(place, trigger_body(b"test.Add\0", ident=ident))
    message = agent.control.next()
    assert message is not None and legal(message[1][128:160])


@pytest.mark.spec("WIRE-147")
def test_idents_differ(place: Place) -> None:
    agent = AgentUnderTest(place)
    idents = {agent.trigger(b"test.Add\0")[1] for _ in range(20)}
    assert len(idents) == 20


@pytest.mark.spec("WIRE-148")
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (TRIGGER3, trigger_body(b"test.Add\0")[64:]),
        (TRIGGER2, bytes(128)),
        (TRIGGER4, trigger_body(b"")),
        (TRIGGER4, trigger_body(b"s" * 65001)),
        (0x777, b""),
    ],
)
def test_what_is_no_request(place: Place, kind: int, body: bytes) -> None:
    agent = AgentUnderTest(place)
    client = Wire(place.connect(place.agent_socket))
    client.send(struct.pack("<II", kind, len(body)) + body[:500])
    assert not client.silent(5), "it is dropped for what it said, not when its 10 s are over"
    assert client.ended()
    assert agent.control.silent()


@pytest.mark.spec("WIRE-149", "WIRE-150")
def test_the_right_client_gets_the_details(place: Place) -> None:
    agent = AgentUnderTest(place)
    clients = [agent.trigger(b"test.Add\0") for _ in range(3)]
    wire, ident = clients[1]
    agent.control.message(CONNECT, struct.pack("<II", 43, 514) + ident)
    assert wire.exactly(8) == struct.pack("<II", 43, 514)
    assert wire.silent() and clients[0][0].silent() and clients[2][0].silent()
    assert agent.control.silent()
    wire.close()
    agent.terminated(43, 514)


@pytest.mark.spec("WIRE-150")
def test_unexpected_bytes_end_the_tracking(place: Place) -> None:
    agent = AgentUnderTest(place)
    wire, ident = agent.trigger(b"test.Add\0")
    agent.control.message(CONNECT, struct.pack("<II", 43, 514) + ident)
    wire.exactly(8)
    wire.send(b"x")
    agent.terminated(43, 514)
    assert wire.ended()
    assert agent.control.silent()


@pytest.mark.spec("WIRE-151")
def test_a_client_that_left_meanwhile(place: Place) -> None:
    agent = AgentUnderTest(place)
    wire, ident = agent.trigger(b"test.Add\0")
    wire.close()
    assert agent.control.silent()
    agent.control.message(CONNECT, struct.pack("<II", 43, 514) + ident)
    agent.terminated(43, 514)
    assert agent.control.silent()


@pytest.mark.spec("WIRE-152")
def test_refusal_closes_the_right_client(place: Place) -> None:
    agent = AgentUnderTest(place)
    clients = [agent.trigger(b"test.Add\0") for _ in range(3)]
    agent.control.message(REFUSED, clients[1][1])
    assert clients[1][0].ended()
    assert clients[0][0].silent() and clients[2][0].silent()


@pytest.mark.spec("WIRE-153")
@pytest.mark.parametrize("ident", [b"", b"SOCKET999", b"nonsense", b"\xff" * 31])
def test_unknown_idents_are_ignored(place: Place, ident: bytes) -> None:
    agent = AgentUnderTest(place)
    wire, _ = agent.trigger(b"test.Add\0")
    agent.control.message(CONNECT, struct.pack("<II", 43, 514) + ident.ljust(32, b"\0"))
    agent.control.message(REFUSED, ident.ljust(32, b"\0"))
    assert wire.silent()
    assert agent.control.silent()
    assert code(agent.run(ME + b":true")) == 0


@pytest.mark.spec("WIRE-153")
def test_an_ident_is_good_for_one_answer(place: Place) -> None:
    agent = AgentUnderTest(place)
    wire, ident = agent.trigger(b"test.Add\0")
    agent.control.message(REFUSED, ident)
    assert wire.ended()
    agent.control.message(CONNECT, struct.pack("<II", 43, 514) + ident)
    assert agent.control.silent()


@pytest.mark.spec("WIRE-154")
def test_version_3_gets_trigger3(place: Place) -> None:
    agent = AgentUnderTest(place, version=3)
    body = trigger_body(b"test.Add+x\0", b"vault", b"src")
    ask(place, body)
    message = agent.control.next()
    assert message is not None and message[0] == TRIGGER3
    assert message[1][:64] == body[64:128] and message[1][96:] == body[160:]
    assert legal(message[1][64:96])


@pytest.mark.spec("WIRE-154")
def test_version_2_gets_trigger2_or_nothing(place: Place) -> None:
    agent = AgentUnderTest(place, version=2)
    ask(place, trigger_body(b"test.Add+x\0", b"vault"))
    message = agent.control.next()
    assert message is not None and message[0] == TRIGGER2 and len(message[1]) == 128
    assert message[1][:64] == b"test.Add+x".ljust(64, b"\0")
    assert message[1][64:96] == b"vault".ljust(32, b"\0")
    assert legal(message[1][96:])
    assert ask(place, trigger_body(b"s" * 64 + b"\0")).ended()
    assert ask(place, trigger_body(b"s\0", b"t" * 32)).ended()
    assert agent.control.silent()


@pytest.mark.spec("WIRE-155")
def test_a_stalled_client_blocks_nobody(place: Place) -> None:
    agent = AgentUnderTest(place)
    stalled = Wire(place.connect(place.agent_socket))
    stalled.send(struct.pack("<II", TRIGGER4, 200) + b"x" * 50)
    empty = Wire(place.connect(place.agent_socket))
    assert code(agent.run(ME + b":exit 3")) == 3
    agent.trigger(b"test.Add\0")
    assert stalled.silent() and empty.silent()


# --- waiting for a session ----------------------------------------------------------------------


class Session:
    """A qubes.WaitForSession that waits for the tester."""

    def __init__(self, place: Place, ending: str = "exit 0") -> None:
        self.fifo = place.path / "run" / "session"
        os.mkfifo(self.fifo)
        self.fifo.chmod(0o666)
        self.log = place.path / "run" / "waiters"
        place.service(
            "qubes.WaitForSession",
            # od shows the end of the line, which the shell would drop.
            "#!/bin/sh\ninput=$(od -An -c | tr -d ' \\n')\n"
            "printf '%s\\n'"
            ' "$#:$input:$QREXEC_REMOTE_DOMAIN:${QREXEC_SERVICE_FULL_NAME-none}"'
            f" >>{self.log}\n"
            f"read x <{self.fifo}\n{ending}\n",
        )
        place.service("test.S", "#!/bin/sh\necho started\n")
        (place.path / "conf" / "test.S").write_text("wait-for-session = true\n")

    def waiters(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def open(self) -> None:
        self.fifo.write_text("\n")


@pytest.mark.spec("WIRE-156")
def test_the_service_starts_after_the_waiter_ended(place: Place) -> None:
    session = Session(place)
    agent = AgentUnderTest(place)
    listener = agent.request(EXEC, 43, 1024, ME + b":QUBESRPC test.S work")
    assert listener is not None
    until(lambda: session.waiters() == [f"0:{SELF}\\n:work:none"], "the waiter")
    listener.settimeout(0.2)
    with pytest.raises(TimeoutError):
        listener.accept()
    listener.settimeout(20)
    session.open()
    wire = Wire(listener.accept()[0])
    wire.shake()
    assert streams(wire.rest(), STDOUT) == b"started\n"
    wire.close()


@pytest.mark.spec("WIRE-157")
@pytest.mark.parametrize("waiter", ["none", "fails", "not executable", "bad interpreter"])
def test_a_waiter_that_fails_or_does_not_exist(place: Place, waiter: str) -> None:
    place.service("test.S", "#!/bin/sh\necho started\n")
    (place.path / "conf" / "test.S").write_text("wait-for-session = 1\n")
    if waiter == "fails":
        place.service("qubes.WaitForSession", "#!/bin/sh\nexit 1\n")
    elif waiter == "not executable":
        place.service("qubes.WaitForSession", "#!/bin/sh\n", mode=0o644)
    elif waiter == "bad interpreter":
        place.service("qubes.WaitForSession", "#!/no/such\n")
    messages = AgentUnderTest(place).run(ME + b":QUBESRPC test.S work")
    assert streams(messages, STDOUT) == b"started\n"


@pytest.mark.spec("WIRE-158")
def test_one_waiter_for_all(place: Place) -> None:
    session = Session(place)
    agent = AgentUnderTest(place)
    listeners = []
    for port, source in ((1024, b"work"), (1025, b"other"), (1026, b"work")):
        listeners.append(agent.request(EXEC, 43, port, ME + b":QUBESRPC test.S " + source))
        until(lambda: len(session.waiters()) == 1, "the waiter")
    session.open()
    for listener in listeners:
        assert listener is not None
        wire = Wire(listener.accept()[0])
        wire.shake()
        assert streams(wire.rest(), STDOUT) == b"started\n"
        wire.close()
    assert len(session.waiters()) == 1


@pytest.mark.spec("WIRE-159")
def test_nogui_skips_the_wait_but_not_the_configuration(place: Place) -> None:
    session = Session(place)
    agent = AgentUnderTest(place)
    messages = agent.run(ME + b":nogui:QUBESRPC test.S work")
    assert streams(messages, STDOUT) == b"started\n"
    assert session.waiters() == []
    (place.path / "conf" / "test.S").write_text("wait-for-session = maybe\n")
    messages = agent.run(ME + b":nogui:QUBESRPC test.S work", port=1025)
    assert messages[:2] == [(STDOUT, b""), (STDERR, b"")] and code(messages) == 125
