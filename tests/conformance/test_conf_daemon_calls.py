"""qrexec-daemon: carrying out what policy allowed: domains, disposables, dom0."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
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
    Closed,
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
    serve_local,
)

IDENT = b"SOCKET12".ljust(32, b"\0")
DISP = "uuid:0123456789abcdef0123456789abcdef0123"
STDIN, STDOUT, STDERR, EXIT = 0x190, 0x191, 0x192, 0x193


@pytest.fixture
def daemon() -> Iterator[DaemonHarness]:
    with harness() as it:
        yield it


class Asked:
    """A call of the agent that policy allows."""

    def __init__(self, daemon: DaemonHarness, reply: bytes, **trigger: bytes) -> None:
        self.agent = daemon.start(QREXEC_STARTUP_TIMEOUT="30")
        self.policy = daemon.policy()
        self.agent.send(trigger4(**trigger))
        answer(self.policy, reply)


# --- domains (6.9.6) ----------------------------------------------------------------------------


@pytest.mark.spec("WIRE-099", "WIRE-103")
def test_the_target_is_told_first_then_the_source(daemon: DaemonHarness) -> None:
    target = daemon.daemon_of("dst")
    call = Asked(daemon, allow(user="bob"))
    conn = daemon.keep(accept(target))
    assert serve_local(conn) == (EXEC_CMDLINE, 42, 0, b"bob:QUBESRPC test.Svc+a src\0")
    assert call.agent.silent()
    conn.send(message(EXEC_CMDLINE, exec_body(43, 514)))
    assert call.agent.expect(SERVICE_CONNECT) == exec_body(43, 514, IDENT)
    assert conn.at_end()


@pytest.mark.spec("WIRE-100", "WIRE-101")
def test_service_and_source_may_be_replaced(daemon: DaemonHarness) -> None:
    target = daemon.daemon_of("dst")
    Asked(daemon, allow(service="other.Svc", policy_source="remote"))
    conn = daemon.keep(accept(target))
    assert serve_local(conn)[3] == b"user:QUBESRPC other.Svc+ remote\0"


@pytest.mark.spec("WIRE-100")
def test_a_service_without_argument_gets_a_plus(daemon: DaemonHarness) -> None:
    target = daemon.daemon_of("dst")
    Asked(daemon, allow(), service=b"test.Svc")
    assert serve_local(daemon.keep(accept(target)))[3] == b"user:QUBESRPC test.Svc+ src\0"


@pytest.mark.spec("WIRE-102")
def test_the_uuid_finds_the_daemon(daemon: DaemonHarness) -> None:
    target = daemon.daemon_of("uuid:X")
    daemon.daemon_of("dst")
    Asked(daemon, allow(target_uuid="uuid:X"))
    assert serve_local(daemon.keep(accept(target)))[0] == EXEC_CMDLINE


@pytest.mark.spec("WIRE-104")
def test_a_target_that_does_not_run_and_may_not(daemon: DaemonHarness) -> None:
    qubesd = daemon.qubesd()
    call = Asked(daemon, allow())
    assert call.agent.expect(SERVICE_REFUSED) == IDENT
    qubesd.settimeout(0.1)
    with pytest.raises(TimeoutError):
        qubesd.accept()


@pytest.mark.spec("WIRE-105", "WIRE-106")
@pytest.mark.parametrize(
    "reply", [b"0\0", b"2\0QubesVMNotHaltedError\0\0Cannot start\0"], ids=["started", "running"]
)
def test_a_target_is_started(daemon: DaemonHarness, reply: bytes) -> None:
    qubesd = daemon.qubesd()
    stale = listener(daemon.sockets / "qrexec.dst")
    stale.close()  # the file stays: connections are refused
    call = Asked(daemon, allow(autostart="True"))
    conn = daemon.keep(accept(qubesd))
    assert qubesd_call(conn) == b"admin.vm.Start+ dom0 name dst\0"
    target = daemon.daemon_of("dst")
    conn.send(reply)
    conn.close()
    session = daemon.keep(accept(target))
    serve_local(session)
    session.send(message(EXEC_CMDLINE, exec_body(43, 514)))
    assert call.agent.expect(SERVICE_CONNECT) == exec_body(43, 514, IDENT)


@pytest.mark.spec("WIRE-105")
@pytest.mark.parametrize("reply", [b"2\0QubesVMError\0\0no\0", b"", b"0", b"1\0x", b"00"])
def test_a_failed_start_refuses(daemon: DaemonHarness, reply: bytes) -> None:
    qubesd = daemon.qubesd()
    call = Asked(daemon, allow(autostart="True"))
    conn = daemon.keep(accept(qubesd))
    qubesd_call(conn)
    conn.send(reply)
    conn.close()
    assert call.agent.expect(SERVICE_REFUSED) == IDENT


@pytest.mark.spec("WIRE-103", "WIRE-116")
@pytest.mark.parametrize(
    "reply",
    [
        b"",
        message(0x201, exec_body(43, 514)),
        message(EXEC_CMDLINE, exec_body(43, 514, b"x")),
        message(EXEC_CMDLINE, exec_body(43, 512)),
    ],
)
def test_a_target_daemon_that_answers_wrongly(daemon: DaemonHarness, reply: bytes) -> None:
    target = daemon.daemon_of("dst")
    call = Asked(daemon, allow())
    conn = daemon.keep(accept(target))
    serve_local(conn)
    conn.send(reply)
    conn.close()
    assert call.agent.expect(SERVICE_REFUSED) == IDENT
    assert call.agent.silent()


@pytest.mark.spec("WIRE-103")
def test_a_target_daemon_of_an_old_version(daemon: DaemonHarness) -> None:
    target = daemon.daemon_of("dst")
    call = Asked(daemon, allow())
    daemon.keep(accept(target)).send(hello(2))
    assert call.agent.expect(SERVICE_REFUSED) == IDENT


# --- disposables (13.7) -------------------------------------------------------------------------


@pytest.mark.spec("WIRE-107", "WIRE-109")
@pytest.mark.parametrize(
    ("reply", "created", "name"),
    [
        (
            allow(target="@dispvm:dvm", autostart="True"),
            b"admin.vm.CreateDisposable+ dom0 name dvm\0",
            "disp1",
        ),
        (
            allow(target="@dispvm:dvm", target_uuid="@dispvm:uuid:X", autostart="True"),
            b"admin.vm.CreateDisposable+ dom0 name uuid:X\0uuid",
            DISP,
        ),
    ],
    ids=["name", "uuid"],
)
def test_a_disposable_lives_as_long_as_the_call(
    daemon: DaemonHarness, reply: bytes, created: bytes, name: str
) -> None:
    qubesd = daemon.qubesd()
    call = Asked(daemon, reply)
    conn = daemon.keep(accept(qubesd))
    assert qubesd_call(conn) == created
    conn.send(b"0\0" + name.encode())
    conn.close()
    conn = daemon.keep(accept(qubesd))
    assert qubesd_call(conn) == f"admin.vm.Start+ dom0 name {name}\0".encode()
    target = daemon.daemon_of(name)
    conn.send(b"0\0")
    conn.close()
    session = daemon.keep(accept(target))
    assert serve_local(session)[:3] == (EXEC_CMDLINE, 42, 0)
    session.send(message(EXEC_CMDLINE, exec_body(50, 514)))
    assert call.agent.expect(SERVICE_CONNECT) == exec_body(50, 514, IDENT)
    assert session.silent()
    qubesd.settimeout(0.1)
    with pytest.raises(TimeoutError):
        qubesd.accept()
    qubesd.settimeout(10)
    session.close()
    assert qubesd_call(daemon.keep(accept(qubesd))) == f"admin.vm.Kill+ dom0 name {name}\0".encode()


@pytest.mark.spec("WIRE-107")
@pytest.mark.parametrize("fails_at", ["start", "daemon"])
def test_a_disposable_of_a_failed_call_is_killed(daemon: DaemonHarness, fails_at: str) -> None:
    qubesd = daemon.qubesd()
    call = Asked(daemon, allow(target="@dispvm:dvm", autostart="True"))
    for reply in (b"0\0disp1", b"0\0" if fails_at == "daemon" else b"2\0QubesVMError\0\0\0"):
        conn = daemon.keep(accept(qubesd))
        qubesd_call(conn)
        conn.send(reply)
        conn.close()
    assert qubesd_call(daemon.keep(accept(qubesd))) == b"admin.vm.Kill+ dom0 name disp1\0"
    assert call.agent.expect(SERVICE_REFUSED) == IDENT


@pytest.mark.spec("WIRE-108")
def test_a_disposable_needs_autostart(daemon: DaemonHarness) -> None:
    qubesd = daemon.qubesd()
    call = Asked(daemon, allow(target="@dispvm:dvm"))
    assert call.agent.expect(SERVICE_REFUSED) == IDENT
    qubesd.settimeout(0.1)
    with pytest.raises(TimeoutError):
        qubesd.accept()


@pytest.mark.spec("WIRE-109")
@pytest.mark.parametrize("name", ["disp1", "uuid:short", DISP + "x", "UUID:" + DISP[5:]])
def test_a_disposable_must_be_named_by_its_uuid(daemon: DaemonHarness, name: str) -> None:
    qubesd = daemon.qubesd()
    call = Asked(
        daemon, allow(target="@dispvm:dvm", target_uuid="@dispvm:uuid:X", autostart="True")
    )
    conn = daemon.keep(accept(qubesd))
    qubesd_call(conn)
    conn.send(b"0\0" + name.encode())
    conn.close()
    assert call.agent.expect(SERVICE_REFUSED) == IDENT


# --- dom0 (6.9.5) -------------------------------------------------------------------------------


class Dom0Call:
    """A call that dom0 answers, seen from the caller in the domain."""

    def __init__(self, daemon: DaemonHarness, reply: bytes, **trigger: bytes) -> None:
        self.call = Asked(daemon, reply, **trigger)
        self.agent = self.call.agent
        body = self.agent.expect(SERVICE_CONNECT)
        domain, self.port = struct.unpack_from("<II", body)
        assert (domain, body[8:]) == (0, IDENT)
        self.listener = listener(daemon.vchan / f"vchan.42.0.{self.port}.sock")
        self.data = daemon.keep(accept(self.listener))
        self.listener.close()

    def greet(self) -> None:
        """Be the caller: HELLO first."""
        self.data.send(hello(4))
        assert struct.unpack("<I", self.data.expect(HELLO)) == (4,)

    def messages(self) -> list[tuple[int, bytes]]:
        """Everything until the channel closes."""
        found = []
        try:
            while True:
                found.append(self.data.receive())
        except Closed:
            return found


@pytest.mark.spec("WIRE-110")
@pytest.mark.parametrize(
    "target", ["dom0", "@adminvm", "uuid:00000000-0000-0000-0000-000000000000"]
)
def test_dom0_by_all_its_names(daemon: DaemonHarness, target: str) -> None:
    daemon.service("test.Svc", "#!/bin/sh\nexit 3\n")
    call = Dom0Call(daemon, allow(target=target))
    call.greet()
    assert call.messages()[-1] == (EXIT, struct.pack("<i", 3))


@pytest.mark.spec("WIRE-111", "WIRE-113")
def test_a_service_of_dom0(daemon: DaemonHarness) -> None:
    daemon.service("test.Svc", "#!/bin/sh\ncat; echo err >&2; exit 5\n")
    call = Dom0Call(daemon, allow(target="dom0"))
    assert call.port == 513
    assert call.data.silent()
    call.greet()
    assert call.data.receive() == (STDERR, b"")
    call.data.send(message(STDIN, b"hello"))
    assert call.data.receive() == (STDOUT, b"hello")
    call.data.send(message(STDIN))
    assert call.messages() == [(STDOUT, b""), (EXIT, struct.pack("<i", 5))]
    call.agent.send(message(TERMINATED, exec_body(0, 513)))
    wait_until(lambda: daemon.allocated()[1] == 513, "the port to be free")
    assert daemon.process is not None
    assert daemon.process.stderr is not None
    daemon.process.terminate()
    assert b"\nerr\n" in daemon.process.stderr.read()


@pytest.mark.spec("WIRE-112")
@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("dom0", b"src|test.Svc+a|a|name|dom0|-\n"),
        ("@adminvm", b"src|test.Svc+a|a|keyword|-|adminvm\n"),
    ],
)
def test_the_environment_of_a_service_of_dom0(
    daemon: DaemonHarness, requested: str, expected: bytes
) -> None:
    daemon.service(
        "test.Svc",
        "#!/bin/sh\n"
        'echo "$QREXEC_REMOTE_DOMAIN|$QREXEC_SERVICE_FULL_NAME|$QREXEC_SERVICE_ARGUMENT|'
        "$QREXEC_REQUESTED_TARGET_TYPE|${QREXEC_REQUESTED_TARGET--}|"
        '${QREXEC_REQUESTED_TARGET_KEYWORD--}"\n',
    )
    call = Dom0Call(daemon, allow(target="dom0", requested_target=requested))
    call.greet()
    output = b"".join(body for kind, body in call.messages() if kind == STDOUT)
    assert output == expected


@pytest.mark.spec("WIRE-112")
def test_the_rest_of_the_environment_is_that_of_the_daemon(daemon: DaemonHarness) -> None:
    daemon.service("test.Svc", "#!/bin/sh\nexec /usr/bin/env\n")
    call = Dom0Call(daemon, allow(target="dom0", policy_source="remote"), service=b"test.Svc")
    call.greet()
    output = b"".join(body for kind, body in call.messages() if kind == STDOUT)
    seen = dict(line.split(b"=", 1) for line in output.splitlines())
    assert seen[b"PATH"] == os.fsencode(os.environ["PATH"])
    assert seen[b"QREXEC_SERVICE_PATH"] == os.fsencode(daemon.directory / "rpc")
    assert seen[b"QREXEC_REMOTE_DOMAIN"] == b"remote"
    assert seen[b"QREXEC_SERVICE_FULL_NAME"] == b"test.Svc+"
    assert seen[b"QREXEC_SERVICE_ARGUMENT"] == b""
    assert not [name for name in seen if name.startswith(b"QREXEC_STARTUP")]


@pytest.mark.spec("WIRE-114", "WIRE-115")
@pytest.mark.parametrize("code", [127, 125])
def test_a_service_of_dom0_that_cannot_start(daemon: DaemonHarness, code: int) -> None:
    if code == 125:
        daemon.service("test.Svc", "#!/bin/sh\n")
        (daemon.directory / "conf" / "test.Svc").write_text("force-user=oops\n")
    call = Dom0Call(daemon, allow(target="dom0"))
    call.greet()
    assert call.messages() == [(STDERR, b""), (STDOUT, b""), (EXIT, struct.pack("<i", code))]
    assert call.agent.silent()


@pytest.mark.spec("WIRE-115")
def test_an_empty_requested_keyword_fails(daemon: DaemonHarness) -> None:
    daemon.service("test.Svc", "#!/bin/sh\n")
    call = Dom0Call(daemon, allow(target="dom0", requested_target="@"))
    call.greet()
    assert call.messages()[-1] == (EXIT, struct.pack("<i", 125))


@pytest.mark.spec("WIRE-116")
def test_a_failure_after_the_connection_is_no_refusal(daemon: DaemonHarness) -> None:
    daemon.service("test.Svc", "#!/bin/sh\ncat\n")
    call = Dom0Call(daemon, allow(target="dom0"))
    call.data.send(hello(1))
    assert call.data.at_end()
    assert call.agent.silent()
    assert daemon.alive()


def children(pid: int) -> list[int]:
    """The children of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread may end meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


@pytest.mark.alone
def test_sigterm_ends_services_of_dom0_soon(daemon: DaemonHarness) -> None:
    daemon.service("test.Svc", "#!/bin/sh\ntrap '' TERM\nsleep 100\n")
    call = Dom0Call(daemon, allow(target="dom0"))
    call.greet()
    assert daemon.process is not None
    (service,) = wait_until(lambda: children(daemon.process.pid), "the service")
    began = time.monotonic()
    daemon.process.terminate()
    assert daemon.ended() == 0
    assert time.monotonic() - began < 10
    wait_until(lambda: not Path(f"/proc/{service}").exists() or is_zombie(service), "its end")


def is_zombie(pid: int) -> bool:
    """Tell whether a process is dead and only not reaped (by who adopted it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.spec("WIRE-105")
def test_sigterm_while_a_question_is_open(daemon: DaemonHarness) -> None:
    daemon.program("sleep 100")
    agent = daemon.start()
    agent.send(trigger4())
    assert daemon.process is not None
    process: subprocess.Popen[bytes] = daemon.process
    (program,) = wait_until(lambda: children(process.pid), "the policy program")
    process.send_signal(signal.SIGTERM)
    assert daemon.ended() == 0
    wait_until(lambda: is_zombie(program), "the end of the policy program")
    assert agent.expect(SERVICE_REFUSED) == IDENT
    assert not os.path.exists(daemon.sockets / "qrexec.42")
