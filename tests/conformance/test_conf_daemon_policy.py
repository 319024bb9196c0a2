"""qrexec-daemon: triggers of the agent, their validation, and what policy answers."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from tests.support.adminvm import (
    EXEC_CMDLINE,
    SERVICE_CONNECT,
    SERVICE_REFUSED,
    Wire,
    exec_body,
    hello,
    message,
    trigger2,
    trigger3,
    trigger4,
)
from tests.support.qrexec_daemon import (
    DaemonHarness,
    accept,
    allow,
    answer,
    harness,
    read_policy_request,
)


@pytest.fixture
def daemon() -> Iterator[DaemonHarness]:
    with harness() as it:
        yield it


def refused(agent: Wire, ident: bytes) -> None:
    """The agent gets SERVICE_REFUSED with exactly these 32 bytes."""
    assert agent.expect(SERVICE_REFUSED) == ident.ljust(32, b"\0")


# --- headers (6.7) ------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-072", "WIRE-073", "WIRE-074", "WIRE-075", "WIRE-077")
@pytest.mark.parametrize(
    ("version", "data"),
    [
        (3, trigger2(b"d", b"s", b"i")),
        (4, trigger2(b"d", b"s", b"i")),
        (2, message(0x210, bytes(127))),
        (2, message(0x210, bytes(129))),
        (2, trigger3(b"d", b"s", b"i")),
        (3, trigger4()),
        (4, message(0x212, bytes(96))),
        (4, struct.pack("<II", 0x212, 65097)),
        (4, message(0x213, bytes(160))),
        (4, struct.pack("<II", 0x213, 65161)),
        (4, hello(4)),
        (4, message(EXEC_CMDLINE, exec_body(0, 513, b"x\0"))),
        (4, message(SERVICE_REFUSED, bytes(32))),
        (4, message(0x1234)),
    ],
)
def test_what_an_agent_may_not_send_ends_the_daemon(
    daemon: DaemonHarness, version: int, data: bytes
) -> None:
    agent = daemon.start(version)
    agent.send(data)
    assert agent.at_end()
    assert daemon.ended() == 1
    assert daemon.names() == set()


@pytest.mark.spec("WIRE-073", "WIRE-086")
@pytest.mark.parametrize("version", [2, 3, 4])
def test_older_triggers(daemon: DaemonHarness, version: int) -> None:
    agent = daemon.start(version)
    policy = daemon.policy()
    make = trigger2 if version == 2 else trigger3
    agent.send(make(b"dst", b"test.Svc+a", b"I"))
    asked = answer(policy, b"result=deny")
    assert asked == b"source=src\nintended_target=dst\nservice_and_arg=test.Svc+a\n\n"
    refused(agent, b"I")


@pytest.mark.spec("WIRE-076")
def test_the_longest_service_name(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    service = b"s" * 64999
    agent.send(trigger4(service=service))
    assert b"service_and_arg=" + service + b"\n" in answer(policy, b"result=deny")
    refused(agent, b"SOCKET12")


# --- bodies (6.8) -------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-078")
def test_bad_services_are_refused_unasked(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    daemon.program("exit 0")
    for service, nul in [
        (b"", b"\0"),
        (b"+", b"\0"),
        (b"+a", b"\0"),
        (b"a\0b", b"\0"),
        (b"ab", b""),
    ]:
        agent.send(trigger4(service=service, ident=b"I", nul=nul))
        refused(agent, b"I")
    assert daemon.program_calls() == []
    assert daemon.alive()


@pytest.mark.spec("WIRE-079")
def test_bad_services_of_version_2(daemon: DaemonHarness) -> None:
    agent = daemon.start(2)
    for service in (b"", b"\0a", b"+", b"+a"):
        agent.send(trigger2(b"dst", service, b"I"))
        refused(agent, b"I")
    assert daemon.program_calls() == []
    assert daemon.alive()


@pytest.mark.spec("WIRE-080")
def test_bad_idents_are_echoed(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    for ident in (b"a/b", b"\1\2\3", b"a\0b", b"x" * 32):
        agent.send(trigger4(ident=ident))
        refused(agent, ident)
    assert daemon.program_calls() == []
    assert daemon.alive()


@pytest.mark.spec("WIRE-081")
def test_good_idents_reach_policy(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    for ident in (b"", b"a b", b"a_-.b", b"x" * 31):
        agent.send(trigger4(ident=ident))
        answer(policy, b"result=deny")
        refused(agent, ident)


NAMES = [
    ("service", b"q/S$\xff+a*:@ ", b"q_S__+a____"),
    ("target", b"$disp@vm:x y", b"_disp@vm:x_y"),
    ("target", b"x" * 64, b"x" * 63),
    ("target", b"$adminvm", b"_adminvm"),
    ("source", b"a$b@c:", b"a_b@c:"),
    ("source", b"a\nresult=allow", b"a_result_allow"),
    ("target", b"a\0garbage\n", b"a"),
]


@pytest.mark.spec("WIRE-082", "WIRE-083", "WIRE-084", "WIRE-087")
def test_names_are_sanitised(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    lines = {"service": b"service_and_arg", "target": b"intended_target"}
    for field, raw, after in NAMES:
        agent.send(trigger4(**{field: raw}))
        line = lines.get(field, b"requested_source")
        assert line + b"=" + after + b"\n" in answer(policy, b"result=deny"), raw
        refused(agent, b"SOCKET12")


# --- the policy daemon (6.9.1, 6.9.2) -----------------------------------------------------------


@pytest.mark.spec("WIRE-085")
def test_the_request_text(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    agent.send(trigger4(target=b"dst", service=b"qubes.Svc+a"))
    conn = daemon.keep(accept(policy))
    assert read_policy_request(conn) == (
        b"source=src\nrequested_source=\nintended_target=dst\nservice_and_arg=qubes.Svc+a\n\n"
    )
    assert conn.silent()  # nothing follows, and the write side is not shut down
    conn.send(b"result=")
    assert agent.silent()
    conn.send(b"deny")
    assert agent.silent()  # the reply ends with the connection
    conn.close()
    refused(agent, b"SOCKET12")


DENIALS = [
    b"result=deny",
    b"result=deny\n",
    b"result=deny\nfuture=1",
    b"result=deny\ntarget_uuid=uuid:x\nservice=a\npolicy_source=b",
]


@pytest.mark.spec("WIRE-088", "WIRE-091")
def test_a_denial_is_final(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    for reply in DENIALS:
        agent.send(trigger4())
        answer(policy, reply)
        refused(agent, b"SOCKET12")
        assert daemon.program_calls() == [], reply


MALFORMED = [
    b"result=deny\nuser=x",
    b"result=deny\ntarget=x",
    b"result=deny\nrequested_target=x",
    b"result=deny\nautostart=True",
    b"",
    b"\n",
    b"result=deny\0",
    b"result=deny\n\n",
    b"result=deny\nnonsense",
    b"result=deny\nresult=deny",
    b"result=DENY",
    b"user=x",
    (b"result=deny\nx=").ljust(4096, b"y"),
    (b"result=deny\nx=").ljust(70000, b"y"),
    allow(user=None),
    allow(target=None),
    allow(requested_target=None),
    allow(autostart=None),
    allow(autostart="true"),
    allow(autostart="TRUE"),
]


@pytest.mark.spec("WIRE-089", "WIRE-090", "WIRE-095", "WIRE-096")
def test_a_malformed_reply_makes_the_program_decide(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    for reply in MALFORMED:
        daemon.program_log.unlink(missing_ok=True)
        agent.send(trigger4())
        answer(policy, reply)
        refused(agent, b"SOCKET12")
        assert daemon.program_calls() == ["-- src dst test.Svc+a"], reply


@pytest.mark.spec("WIRE-090")
def test_the_longest_reply_is_read(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    reply = b"result=deny\nx="
    agent.send(trigger4())
    answer(policy, reply + b"y" * (4095 - len(reply)))
    refused(agent, b"SOCKET12")
    assert daemon.program_calls() == []


@pytest.mark.spec("WIRE-091", "WIRE-099")
def test_unknown_keys_of_an_allowing_reply_are_ignored(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    target = daemon.daemon_of("dst")
    agent.send(trigger4())
    answer(policy, allow() + b"\nfuture=yes\nother=")
    daemon.keep(accept(target))
    assert daemon.program_calls() == []


# --- the policy program (6.9.3) -----------------------------------------------------------------


@pytest.mark.spec("WIRE-092")
def test_without_a_policy_daemon_the_program_is_asked(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    agent.send(trigger4(target=b"", service=b"qubes.Svc"))
    refused(agent, b"SOCKET12")
    agent.send(trigger4(target=b"-x", service=b"-y+z"))
    refused(agent, b"SOCKET12")
    assert daemon.program_calls() == ["-- src  qubes.Svc", "-- src -x -y+z"]


@pytest.mark.spec("WIRE-092")
def test_the_program_allows(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    target = daemon.daemon_of("dst")
    daemon.program(f"cat <<X\n{allow().decode()}\nX")
    agent.send(trigger4())
    daemon.keep(accept(target))


REFUSING_SCRIPTS = [
    f"cat <<X\n{allow().decode()}\nX\nexit 1",
    "echo nonsense",
    "echo result=DENY",
    "true",
    "echo result=deny",
    f"cat <<X\n{allow().decode()}\nX\nkill -9 $$",
    "kill -9 $$",
    "head -c 100000 /dev/zero | tr '\\0' x",
]


@pytest.mark.spec("WIRE-093", "WIRE-094", "WIRE-097")
def test_the_program_refuses(daemon: DaemonHarness) -> None:
    target = daemon.daemon_of("dst")
    agent = daemon.start()
    for script in REFUSING_SCRIPTS:
        daemon.program(script)
        agent.send(trigger4())
        refused(agent, b"SOCKET12")
    assert len(daemon.program_calls()) == len(REFUSING_SCRIPTS)
    # The target, which is there, was never asked.
    target.settimeout(0.1)
    with pytest.raises(TimeoutError):
        target.accept()
    assert daemon.alive()


@pytest.mark.spec("WIRE-094")
def test_a_program_that_is_missing_refuses(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    (daemon.directory / "program").unlink()
    agent.send(trigger4())
    refused(agent, b"SOCKET12")


@pytest.mark.spec("WIRE-093")
def test_nothing_of_a_malformed_reply_reaches_the_second_decision(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    target = daemon.daemon_of("dst")
    daemon.program(f"cat <<X\n{allow().decode()}\nX")
    agent.send(trigger4())
    answer(policy, b"policy_source=evil\nresult=nonsense")
    conn = daemon.keep(accept(target))
    conn.send(hello(3))
    conn.expect(0x300)
    assert conn.expect(EXEC_CMDLINE)[8:] == b"user:QUBESRPC test.Svc+a src\0"


# --- many at once (6.10) ------------------------------------------------------------------------


@pytest.mark.spec("WIRE-098")
def test_the_257th_pending_request_is_refused_at_once(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    asked = []
    for number in range(256):
        agent.send(trigger4(ident=b"N%d" % number))
    for _ in range(256):
        conn = daemon.keep(accept(policy))
        read_policy_request(conn)
        asked.append(conn)
    agent.send(trigger4(ident=b"OVER"))
    refused(agent, b"OVER")
    # The others are untouched, and a place is free again once one of them is decided.
    asked[17].send(b"result=deny")
    asked[17].close()
    kind, _ = agent.receive()
    assert kind == SERVICE_REFUSED
    agent.send(trigger4(ident=b"AGAIN"))
    read_policy_request(daemon.keep(accept(policy)))


def test_a_pending_question_blocks_nobody(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    agent.send(trigger4(ident=b"SLOW"))
    slow = daemon.keep(accept(policy))
    agent.send(trigger4(ident=b"FAST"))
    answer(policy, b"result=deny")
    refused(agent, b"FAST")
    slow.send(b"result=deny")
    slow.close()
    refused(agent, b"SLOW")


@pytest.mark.spec("WIRE-116")
def test_a_connected_request_is_never_refused(daemon: DaemonHarness) -> None:
    agent = daemon.start()
    policy = daemon.policy()
    agent.send(trigger4(ident=b"I"))
    conn = daemon.keep(accept(policy))
    daemon.request(b"I\0", 43, 514, SERVICE_CONNECT)
    agent.expect(SERVICE_CONNECT)
    conn.send(b"result=deny")
    conn.close()
    assert agent.silent()
