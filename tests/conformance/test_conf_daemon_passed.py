"""The transport `passed`, the AdminVM's side, with agents played by the test (section 20)."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import struct
import subprocess
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.adminvm import (
    BIN,
    EXEC_CMDLINE,
    JUST_EXEC,
    ROOT,
    SERVICE_CONNECT,
    SERVICE_REFUSED,
    TERMINATED,
    AgentSandbox,
    PlayedJudge,
    PlayedRun,
    PlayedSandbox,
    adminvm,
    client_environment,
    domain,
    exec_body,
    hello,
    message,
    open_descriptors,
    short_directory,
    trigger4,
    until,
)

from sluice.adminvm.system import AdminVM
from sluice.errors import ResourceError

HELLO = 0x300
STDIN, STDOUT, STDERR, EXIT = 0x190, 0x191, 0x192, 0x193


class World:
    """A running AdminVM with played domains ``a``, ``b``, ``c`` (7, 8, 9)."""

    def __init__(self, directory: Path, system: AdminVM, sandbox: PlayedSandbox) -> None:
        self.directory = directory
        self.system = system
        self.sandbox = sandbox

    async def start(self, *names: str) -> list[PlayedRun]:
        """Start domains and read the AdminVM's HELLO in each."""
        runs = []
        for name in names:
            await self.system.start_domain(name)
            run = self.sandbox.runs[name]
            assert await run.greeted() == 4
            runs.append(run)
        return runs

    def records(self) -> list[dict[str, Any]]:
        """The audit log."""
        text = (self.directory / "state/log/audit.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    async def recorded(self, count: int) -> list[dict[str, Any]]:
        """Wait for so many audit records."""
        found: list[dict[str, Any]] = await until(
            lambda: len(self.records()) >= count and self.records(), f"{count} audit records"
        )
        return found


Scene = Callable[[World, PlayedJudge], Awaitable[None]]


def play(scene: Scene, **options: Any) -> None:
    """Run a scene in a world of its own."""

    async def main() -> None:
        with short_directory() as directory:
            judge = PlayedJudge()
            for name in ("a", "b", "c", "dom0"):
                judge.allow(name)
            sandbox = PlayedSandbox()
            domains = [
                domain(name, 7 + number, "played") for number, name in enumerate(("a", "b", "c"))
            ]
            async with adminvm(directory, domains, sandbox, judge, **options) as system:
                async with asyncio.timeout(60):
                    await scene(World(directory, system, sandbox), judge)

    asyncio.run(main())


async def connected(a: PlayedRun, b: PlayedRun) -> tuple[int, list[int], list[int]]:
    """Have ``a`` call ``b``; returns the call number and both sides' descriptors."""
    a.send(trigger4(b"b", b"test.Svc", b"SOCKET5"))
    kind, body, far = await b.receive()
    assert kind == EXEC_CMDLINE
    number = struct.unpack_from("<I", body, 4)[0]
    kind, body, near = await a.receive()
    assert kind == SERVICE_CONNECT
    assert struct.unpack_from("<I", body, 4)[0] == number
    return number, near, far


def close_all(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


# --- two pipes, handed over ---------------------------------------------------------------------


@pytest.mark.spec("WIRE-242", "WIRE-245")
def test_both_agents_get_their_ends() -> None:
    async def scene(world: World, judge: PlayedJudge) -> None:
        a, b = await world.start("a", "b")
        a.send(trigger4(b"b", b"test.Svc+x", b"SOCKET5"))
        # The two descriptors come with the very first byte of the message.
        first = await b.read(1)
        far = b.wire.take_fds()
        assert len(far) == 2
        rest = await b.read(7 + 8 + len(b"DEFAULT") - 3 + len(b":QUBESRPC test.Svc+x a\0"))
        data = first + rest
        number = struct.unpack_from("<I", data, 12)[0]
        assert data == message(EXEC_CMDLINE, exec_body(7, number, b"user:QUBESRPC test.Svc+x a\0"))
        assert not 513 <= number <= 768
        kind, body, near = await a.receive()
        assert (kind, body) == (SERVICE_CONNECT, exec_body(8, number, b"SOCKET5".ljust(32, b"\0")))
        # Read end, then write end: what one writes the other reads, both ways.
        os.write(near[1], b"question")
        assert os.read(far[0], 100) == b"question"
        os.write(far[1], b"answer")
        assert os.read(near[0], 100) == b"answer"
        # The AdminVM keeps no copy: closing one end is seen at the other.
        close_all(*near)
        assert os.read(far[0], 1) == b""
        with pytest.raises(BrokenPipeError):
            os.write(far[1], b"x")
        close_all(*far)

    play(scene)


@pytest.mark.spec("WIRE-241")
def test_nothing_that_two_domains_share_can_carry_descriptors() -> None:
    async def scene(world: World, judge: PlayedJudge) -> None:
        a, b = await world.start("a", "b")
        _, near, far = await connected(a, b)
        for fd in near + far:
            assert stat.S_ISFIFO(os.fstat(fd).st_mode)
            with pytest.raises(OSError) as caught:
                sock = socket.socket(fileno=os.dup(fd))
                sock.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 0))])
            assert caught.value.errno == errno.ENOTSOCK
        close_all(*near, *far)

    play(scene)


@pytest.mark.spec("WIRE-242")
def test_dom0s_calls_carry_descriptors_too() -> None:
    async def scene(world: World, judge: PlayedJudge) -> None:
        (a,) = await world.start("a")
        for kind in (EXEC_CMDLINE, JUST_EXEC):
            run = world.system.run_of("a")
            assert run is not None
            call = world.system.dispatcher.open(run, b"DEFAULT:true", kind)
            got, body, fds = await a.receive()
            assert (got, body) == (kind, exec_body(0, call.number, b"user:true\0"))
            assert len(fds) == 2
            os.write(fds[1], b"x")
            assert os.read(call.read_fd, 10) == b"x"
            close_all(*fds, call.read_fd, call.write_fd)

    play(scene)


@pytest.mark.spec("WIRE-242", "WIRE-253")
def test_a_local_client_gets_its_ends_with_the_reply() -> None:
    async def scene(world: World, judge: PlayedJudge) -> None:
        (a,) = await world.start("a")
        daemon_dir = world.system.paths.daemon_dir
        for name in ("qrexec.a", "qrexec.7", "qrexec.uuid:00000000-0000-4000-8000-000000000007"):
            client = PlayedRun(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            client.wire.sock.connect(str(daemon_dir / name))
            assert await client.receive() == (HELLO, struct.pack("<I", 3), [])
            client.send(hello(3) + message(EXEC_CMDLINE, exec_body(0, 0, b"DEFAULT:x\0")))
            kind, body, fds = await client.receive()
            number = struct.unpack_from("<I", body, 4)[0]
            assert (kind, body) == (EXEC_CMDLINE, exec_body(7, number))
            got, body, far = await a.receive()
            assert (got, body) == (EXEC_CMDLINE, exec_body(0, number, b"user:x\0"))
            os.write(fds[1], b"hi")
            assert os.read(far[0], 10) == b"hi"
            close_all(*fds, *far)
            a.send(message(TERMINATED, exec_body(0, number)))
            assert await asyncio.to_thread(client.wire.at_end)
            client.wire.close()
        records = await world.recorded(3)
        assert {(r["source"], r["target"], r["command"]) for r in records} == {("dom0", "a", "x")}

    play(scene)


@pytest.mark.parametrize(
    "request_",
    [
        message(SERVICE_CONNECT, exec_body(0, 0, b"SOCKET5\0")),
        message(EXEC_CMDLINE, exec_body(8, 0, b"user:x\0")),
        message(EXEC_CMDLINE, exec_body(0, 513, b"user:x\0")),
        message(EXEC_CMDLINE, exec_body(0, 0, b"user:x")),
    ],
)
def test_a_local_client_may_only_ask_for_itself(request_: bytes) -> None:
    async def scene(world: World, judge: PlayedJudge) -> None:
        (a,) = await world.start("a")
        client = PlayedRun(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        client.wire.sock.connect(str(world.system.paths.daemon_dir / "qrexec.a"))
        await client.receive()
        client.send(hello(3) + request_)
        assert await asyncio.to_thread(client.wire.at_end)
        assert a.wire.silent(0.05)
        client.wire.close()

    play(scene)


# --- bounds -------------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-245")
def test_the_1025th_call_is_refused() -> None:
    async def scene(world: World, judge: PlayedJudge) -> None:
        (a,) = await world.start("a")
        run = world.system.run_of("a")
        assert run is not None
        calls = [world.system.dispatcher.open(run, b"u:x", EXEC_CMDLINE) for _ in range(1024)]
        assert len({call.number for call in calls}) == 1024
        with pytest.raises(ResourceError):
            world.system.dispatcher.open(run, b"u:x", EXEC_CMDLINE)
        for call in calls:
            _, body, fds = await a.receive()
            assert struct.unpack_from("<I", body, 4)[0] == call.number
            close_all(*fds, call.read_fd, call.write_fd)
        a.send(message(TERMINATED, exec_body(0, calls[500].number)))
        await asyncio.wait_for(calls[500].ended, 20)
        call = world.system.dispatcher.open(run, b"u:x", EXEC_CMDLINE)
        close_all(call.read_fd, call.write_fd)

    play(scene)


@pytest.mark.spec("WIRE-245")
def test_a_domains_calls_over_its_bound_are_refused() -> None:
    async def scene(world: World, judge: PlayedJudge) -> None:
        a, b = await world.start("a", "b")
        for _ in range(3):
            number, near, far = await connected(a, b)
            close_all(*near, *far)
        a.send(trigger4(b"b", b"test.Svc", b"OVER"))
        assert await a.receive() == (SERVICE_REFUSED, b"OVER".ljust(32, b"\0"), [])
        (record,) = await world.recorded(1)
        assert "makes 3 calls already" in record["cause"]
        # Being called is bounded apart: b can still call a.
        b.send(trigger4(b"a", b"test.Svc", b"X"))
        assert (await a.receive())[0] == EXEC_CMDLINE
        for run, peer in ((a, 8), (b, 7)):
            run.send(message(TERMINATED, exec_body(peer, number)))
        await world.recorded(2)
        a.send(trigger4(b"b", b"test.Svc", b"AGAIN"))
        while (await a.receive())[0] != SERVICE_CONNECT:
            pass

    play(scene, max_calls=3)


@pytest.mark.spec("WIRE-250")
def test_a_flood_of_triggers_is_refused_and_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    # However long it takes to answer them, no more are taken than at once.
    monkeypatch.setattr("sluice.adminvm.run.TRIGGER_RATE", 1e-6)

    async def scene(world: World, judge: PlayedJudge) -> None:
        judge.rulings.clear()
        a, b = await world.start("a", "b")
        count = 900

        def flood() -> int:
            a.send(b"".join(trigger4(b"b", b"s", b"I%d" % n) for n in range(count)))
            return sum(a.wire.receive()[0] == SERVICE_REFUSED for _ in range(count))

        sender = asyncio.create_task(asyncio.to_thread(flood))
        # Another domain's call goes through meanwhile.
        judge.allow("c")
        (c,) = await world.start("c")
        b.send(trigger4(b"c", b"s", b"I"))
        assert (await c.receive())[0] == EXEC_CMDLINE
        assert await sender == count
        await until(
            lambda: sum(r.get("count", 1) for r in world.records()) >= count, "all refusals"
        )
        folded = [r for r in world.records() if r.get("count")]
        # One a second, while they come.
        assert 1 <= len(folded) <= 60
        assert all(r["source"] == "a" and "too many" in r["cause"] for r in folded)
        assert len(world.records()) < 700

    play(scene)


@pytest.mark.spec("WIRE-250")
def test_over_256_pending_are_refused() -> None:
    async def scene(world: World, judge: PlayedJudge) -> None:
        (a,) = await world.start("a")
        held = asyncio.Event()
        decide = judge.decide

        async def slowly(*arguments: Any) -> Any:
            await held.wait()
            return await decide(*arguments)

        judge.decide = slowly  # type: ignore[method-assign]
        a.send(b"".join(trigger4(b"x", b"s", b"I%d" % n) for n in range(258)))
        for ident in (b"I256", b"I257"):
            assert await a.receive() == (SERVICE_REFUSED, ident.ljust(32, b"\0"), [])
        held.set()
        for _ in range(256):
            assert (await a.receive())[0] == SERVICE_REFUSED

    play(scene)


@pytest.mark.spec("WIRE-247")
def test_a_descriptor_sent_up_never_arrives() -> None:
    async def scene(world: World, judge: PlayedJudge) -> None:
        a, b = await world.start("a", "b")
        await asyncio.sleep(0)
        before = open_descriptors()
        theirs, probe = os.pipe()
        fds = array.array("i", [probe] * 50)
        data = trigger4(b"none", b"s", b"I")
        for _ in range(20):
            a.wire.sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            assert (await a.receive())[0] == SERVICE_REFUSED
        os.close(probe)
        # Had it arrived anywhere, the pipe would still have a writer.
        assert os.read(theirs, 1) == b""
        os.close(theirs)
        await until(lambda: open_descriptors() <= before, "descriptors to be closed")
        _, near, far = await connected(a, b)
        close_all(*near, *far)

    play(scene)


# --- ends ---------------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-251", "WIRE-252")
def test_each_side_ends_once_and_nothing_is_left() -> None:
    async def scene(world: World, judge: PlayedJudge) -> None:
        a, b = await world.start("a", "b")
        before = open_descriptors()
        number, near, far = await connected(a, b)
        close_all(*near, *far)
        b.send(message(TERMINATED, exec_body(7, number)) * 3)
        b.send(message(TERMINATED, exec_body(9, number)))
        b.send(message(TERMINATED, exec_body(7, number + 1)))
        assert world.records() == []
        a.send(message(TERMINATED, exec_body(8, number)) * 2)
        (record,) = await world.recorded(1)
        assert record["cause"] == "ended"
        assert record["exit_code"] is None
        stages = record["stages"]
        assert stages["decided"] <= stages["connected"] <= stages["source_ended"]
        assert "target_ended" in stages
        await until(lambda: open_descriptors() <= before, "descriptors to be closed")
        assert len(world.system.dispatcher.numbers) == 0
        assert [entry["calls"] for entry in world.system.describe()] == [0, 0, 0, 0]

    play(scene)


@pytest.mark.spec("WIRE-246")
def test_a_service_of_dom0_on_pipes() -> None:
    async def scene(world: World, judge: PlayedJudge) -> None:
        service = world.directory / "config/rpc/test.Svc"
        service.write_text('#!/bin/sh\necho "$QREXEC_REMOTE_DOMAIN"; cat; exit 6\n')
        service.chmod(0o755)
        (a,) = await world.start("a")
        before = open_descriptors()
        a.send(trigger4(b"dom0", b"test.Svc", b"I"))
        kind, body, fds = await a.receive()
        domain_, number = struct.unpack_from("<II", body)
        assert (kind, domain_) == (SERVICE_CONNECT, 0)

        def caller() -> bytes:
            os.write(fds[1], hello(4) + message(STDIN, b"data") + message(STDIN))
            data = b""
            while piece := os.read(fds[0], 4096):
                data += piece
            return data

        data = await asyncio.to_thread(caller)
        assert data.startswith(hello(4) + message(STDERR))
        assert data.endswith(message(STDOUT) + message(EXIT, struct.pack("<i", 6)))
        assert b"a\n" in data
        assert b"data" in data
        close_all(*fds)
        a.send(message(TERMINATED, exec_body(0, number)))
        (record,) = await world.recorded(1)
        assert record["exit_code"] == 6
        assert record["rule"] == "test.policy:1"
        await until(lambda: open_descriptors() <= before, "descriptors to be closed")

    play(scene)


@pytest.mark.spec("WIRE-246")
@pytest.mark.parametrize(("broken", "code"), [(False, 127), (True, 125)])
def test_a_service_of_dom0_that_cannot_start(broken: bool, code: int) -> None:
    async def scene(world: World, judge: PlayedJudge) -> None:
        if broken:
            (world.directory / "config/rpc/test.Svc").write_text("no program")
        (a,) = await world.start("a")
        a.send(trigger4(b"dom0", b"test.Svc", b"I"))
        _, _, fds = await a.receive()
        os.write(fds[1], hello(4))
        expected = (
            hello(4) + message(STDERR) + message(STDOUT) + message(EXIT, struct.pack("<i", code))
        )
        data = b""
        while piece := await asyncio.to_thread(os.read, fds[0], 4096):
            data += piece
        assert data == expected
        close_all(*fds)

    play(scene)


def test_services_never_come_from_the_hosts_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    with short_directory() as host:
        (host / "test.Host").write_text("#!/bin/sh\n")
        (host / "test.Host").chmod(0o755)
        monkeypatch.setenv("QREXEC_SERVICE_PATH", str(host))

        async def scene(world: World, judge: PlayedJudge) -> None:
            (a,) = await world.start("a")
            a.send(trigger4(b"dom0", b"test.Host", b"I"))
            _, _, fds = await a.receive()
            os.write(fds[1], hello(4))
            data = b""
            while piece := await asyncio.to_thread(os.read, fds[0], 4096):
                data += piece
            assert data.endswith(message(EXIT, struct.pack("<i", 127)))
            close_all(*fds)

        play(scene)


# --- real agents --------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-252", "WIRE-253")
def test_the_manuals_commands_with_a_real_agent() -> None:
    async def main() -> None:
        with short_directory() as directory:
            sandbox = AgentSandbox(directory / "vm")
            user = os.environ.get("USER") or "root"
            domains = [domain("work", 5, "agent", default_user=_own_name(user))]
            async with adminvm(directory, domains, sandbox, PlayedJudge()) as system:
                await system.start_domain("work")
                agent = sandbox.runs["work"].pid
                # What the first call makes for all that follow is not counted.
                assert (await system.run("work", "true")).status == 0
                before = len(os.listdir(f"/proc/{agent}/fd")), open_descriptors()
                mark = directory / "touched"
                status, _, _ = await _client(system, "-e", "-d", "work", f"DEFAULT:touch {mark}")
                assert status == 0
                await until(mark.exists, "the file")
                status, out, err = await _client(
                    system, "-d", "work", "DEFAULT:bash", data=b"echo out; echo err >&2; exit 4\n"
                )
                assert (status, out, err) == (4, b"out\n", b"err\n")

                def calm() -> bool:
                    # Some of the first call's may still have been open then: fewer is right too.
                    count, ours = before
                    return (
                        len(os.listdir(f"/proc/{agent}/fd")) <= count and open_descriptors() <= ours
                    )

                await until(calm, "all descriptors of the calls to be closed")

    asyncio.run(main())


def _own_name(fallback: str) -> str:
    import pwd

    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return fallback


async def _client(system: AdminVM, *arguments: str, data: bytes = b"") -> tuple[int, bytes, bytes]:
    process = await asyncio.create_subprocess_exec(
        str(BIN / "qrexec-client"),
        f"--socket-dir={system.paths.daemon_dir}",
        *arguments,
        env=client_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(data), 60)
    assert process.returncode is not None
    return process.returncode, out, err


# --- what the kernel counts for a user ----------------------------------------------------------

# Runs as an unprivileged user, which the domains share: the hardest case.
FLIGHT = """
    import array, asyncio, os, resource, socket, sys
    sys.path[:0] = [ROOT, ROOT + "/src"]
    from sluice import runtime
    runtime.add_site_packages()
    from sluice.adminvm.system import raise_descriptor_limit
    from sluice.vchan.passed import make_pair, send_with_fds

    # The domain: at most 1024 descriptors, all it may have in flight are.
    ready, told = os.pipe()
    go, tell = os.pipe()
    if os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
        count = 0
        try:
            pairs = []
            while True:
                one, other = socket.socketpair()
                pairs.append((one, other))
                one.setblocking(False)
                fds = array.array("i", [1] * 250)
                for _ in range(4):
                    one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
                    count += 250
        except OSError as error:
            os.write(told, b"%d %d" % (error.errno, count))
        os.read(go, 1)
        os._exit(0)
    print("flood", os.read(ready, 100).decode())
    raise_descriptor_limit()
    # The AdminVM: calls of others go on.
    ours, theirs = socket.socketpair()
    sent = 0
    for _ in range(100):
        near, far = make_pair()
        try:
            send_with_fds(ours.fileno(), b"m", far)
            sent += 1
        except OSError as error:
            print("refused", error)
            break
        theirs.recvmsg(1, 100)
    print("sent", sent)
    os.write(tell, b"x")
    os.wait()
"""

PAGES = """
    import fcntl, os, sys
    sys.path[:0] = [ROOT + "/src"]
    from sluice.vchan.passed import make_pair
    if sys.argv[1] == "flood":
        pipes = []
        try:
            while True:
                read, write = os.pipe()
                pipes.append((read, write))
                fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20)
        except OSError as error:
            print(error.errno, len(pipes), flush=True)
        sys.stdin.read()
    else:
        ours, theirs = make_pair()
        print(min(fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) for fd in (*ours, *theirs)))
"""


def _as_user(uid: int, script: str, *arguments: str) -> list[str]:
    code = f"ROOT = {str(ROOT)!r}\n" + textwrap.dedent(script)
    return [
        "/usr/bin/setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups",
        "/usr/bin/python3", "-I", "-c", code, *arguments,
    ]  # fmt: skip


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")


@needs_root
@pytest.mark.spec("WIRE-248")
def test_descriptors_in_flight_of_one_domain_do_not_stop_the_calls_of_others() -> None:
    done = subprocess.run(
        _as_user(61000 + os.getpid() % 1000, FLIGHT),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    code, count = map(int, lines["flood"].split())
    assert code == errno.ETOOMANYREFS
    assert count >= 1000
    assert lines["sent"] == "100", done.stdout


@needs_root
@pytest.mark.spec("WIRE-249")
def test_pipe_pages_of_one_domain_do_not_shrink_the_pipes_of_others() -> None:
    """With a user id for each domain, which is how domains run wherever there are ids."""
    flood = subprocess.Popen(
        _as_user(62000 + os.getpid() % 1000, PAGES, "flood"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert flood.stdout is not None
    try:
        code, count = map(int, flood.stdout.readline().split())
        assert code == errno.EPERM
        assert count > 10
        other = subprocess.run(
            _as_user(63000 + os.getpid() % 1000, PAGES, "look"),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert int(other.stdout) == 65536
    finally:
        flood.communicate()


@pytest.mark.spec("WIRE-248")
def test_a_call_whose_descriptors_the_kernel_refuses_fails_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ETOOMANYREFS: the message goes without descriptors, which ends that call at the agent."""

    async def scene(world: World, judge: PlayedJudge) -> None:
        a, b = await world.start("a", "b")
        real = socket.send_fds

        def refused(*arguments: Any) -> int:
            monkeypatch.setattr(socket, "send_fds", real)
            raise OSError(errno.ETOOMANYREFS, "Too many references")

        before = open_descriptors()
        monkeypatch.setattr(socket, "send_fds", refused)
        a.send(trigger4(b"b", b"test.Svc", b"I"))
        kind, body, fds = await b.receive()
        assert (kind, fds) == (EXEC_CMDLINE, [])
        number = struct.unpack_from("<I", body, 4)[0]
        kind, _, near = await a.receive()
        assert kind == SERVICE_CONNECT
        assert os.read(near[0], 1) == b""
        close_all(*near)
        for run, peer in ((a, 8), (b, 7)):
            run.send(message(TERMINATED, exec_body(peer, number)))
        await world.recorded(1)
        await until(lambda: open_descriptors() <= before, "descriptors to be closed")
        _, near, far = await connected(a, b)
        close_all(*near, *far)

    play(scene)


def test_pipes_begin_at_their_default_size() -> None:
    async def scene(world: World, judge: PlayedJudge) -> None:
        a, b = await world.start("a", "b")
        _, near, far = await connected(a, b)
        assert all(fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) == 65536 for fd in near + far)
        close_all(*near, *far)

    play(scene)
