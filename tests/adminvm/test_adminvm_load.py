"""Many calls at once: all are answered or refused with a reason, none hangs, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import pwd
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from tests.support.adminvm import (
    BIN,
    AgentSandbox,
    PlayedJudge,
    adminvm,
    domain,
    open_descriptors,
    short_directory,
    until,
    wait_until,
)
from tests.support.callers import CallRefused, ask, call
from tests.support.listening import listens
from tests.support.qrexec_daemon import allow

from sluice.adminvm.system import AdminVM

USER = pwd.getpwuid(os.geteuid()).pw_name


class Load:
    """A system of real agents ``d0`` to ``d10``; ``d10`` answers."""

    def __init__(self, directory: Path, system: AdminVM, sandbox: AgentSandbox) -> None:
        self.directory = directory
        self.system = system
        self.sandbox = sandbox

    def records(self) -> list[dict[str, Any]]:
        text = (self.directory / "state/log/audit.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


@contextlib.asynccontextmanager
async def load(directory: Path, *names: str) -> AsyncIterator[Load]:
    """Start the domains ``names``."""
    sandbox = AgentSandbox(directory / "vm")
    judge = PlayedJudge()
    domains = [domain(f"d{n}", 10 + n, "agent", default_user=USER) for n in range(11)]
    for config in domains:
        judge.allow(config.name)
    judge.allow("dom0")
    async with adminvm(directory, domains, sandbox, judge) as system:
        for name in names:
            sandbox.service(name, "test.Echo", "#!/bin/sh\nexec cat\n")
            await system.start_domain(name)
        yield Load(directory, system, sandbox)


def test_200_calls_at_once_from_one_domain() -> None:
    async def main() -> None:
        with short_directory() as directory:
            async with load(directory, "d0", "d10") as it, asyncio.timeout(50):
                path = it.sandbox.socket_of("d0")
                # What the first call makes for all that follow is not counted.
                assert await call(path, "d10", "test.Echo", b"") is not None
                before = open_descriptors()
                done = await asyncio.gather(
                    *(call(path, "d10", "test.Echo", b"%d" % n) for n in range(200))
                )
                for number, result in enumerate(done):
                    assert result is not None
                    assert (result.status, result.stdout) == (0, b"%d" % number)
                await until(lambda: len(it.records()) == 201, "201 records")
                assert {record["cause"] for record in it.records()} == {"ended"}
                await until(lambda: open_descriptors() <= before, "all descriptors to be closed")

    asyncio.run(main())


def test_500_calls_at_once_from_ten_domains() -> None:
    async def main() -> None:
        with short_directory() as directory:
            names = [f"d{n}" for n in range(10)]
            async with load(directory, *names, "d10") as it, asyncio.timeout(80):
                sockets = [it.sandbox.socket_of(name) for name in names]
                done = await asyncio.gather(
                    *(call(sockets[n % 10], "d10", "test.Echo", b"%d" % n) for n in range(500))
                )
                answered = [result for result in done if result is not None]
                assert all(result.status == 0 for result in answered)
                await until(lambda: len(it.records()) == 500, "500 records")
                causes = [record["cause"] for record in it.records()]
                assert causes.count("ended") == len(answered)
                assert all(causes)
                # A target with 1024 descriptors at most can hold that many.
                assert len(answered) == 500

    asyncio.run(main())


@pytest.mark.alone
def test_the_end_under_load_comes_soon() -> None:
    async def main() -> None:
        with short_directory() as directory:
            children = set(child_processes())
            async with load(directory, "d0", "d10") as it, asyncio.timeout(50):
                service = directory / "config/rpc/test.Sleep"
                service.write_text("#!/bin/sh\ntrap '' TERM INT HUP\nsleep 1000\n")
                service.chmod(0o755)
                path = it.sandbox.socket_of("d0")
                opened = await asyncio.gather(
                    *(ask(path, "d10", "test.Echo") for _ in range(100)),
                    *(ask(path, "dom0", "test.Sleep") for _ in range(50)),
                )
                await until(lambda: len(child_processes()) >= 50, "the services of dom0")
                began = time.monotonic()
                await it.system.stop()
                assert time.monotonic() - began < 10
                for one in opened:
                    os.close(one.read_fd)
                    os.close(one.write_fd)
                    one.request.close()
                assert len(it.records()) == 150
            await until(lambda: set(child_processes()) == children, "the end of all children")

    asyncio.run(main())


def child_processes() -> list[int]:
    """The children of this process that are not zombies."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in (task / "children").read_text().split():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        found.append(int(child))
    return found


# --- over socketdir: the stand-alone programs -----------------------------------------------------


class StandAlone:
    """Two real daemons and two real agents (42 ``src``, 43 ``dst``) on sockets in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[subprocess.Popen[bytes]] = []
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("s", "v", "rpc", "src", "dst"):
            (directory / name).mkdir()
        service = directory / "rpc" / "test.Echo"
        service.write_text("#!/bin/sh\nexec cat\n")
        service.chmod(0o755)
        self.program = directory / "program"
        self.program.write_text(f"#!/bin/sh\ncat <<X\n{allow(user=USER).decode()}\nX\n")
        self.program.chmod(0o755)

    def spawn(self, domid: int, *argv: str) -> subprocess.Popen[bytes]:
        environment = {
            "PATH": os.environ["PATH"],
            "VCHAN_SOCKET_DIR": str(self.directory / "v"),
            "VCHAN_DOMAIN": str(domid),
            "QREXEC_SERVICE_PATH": str(self.directory / "rpc"),
            "QUBES_RPC_CONFIG_PATH": str(self.directory / "none"),
            "SLUICE_POLICY_SOCKET": str(self.directory / "policy.sock"),
        }
        with open(self.directory / "log", "ab") as log:
            process = subprocess.Popen(
                argv, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    def start(self) -> None:
        for domid, name in ((42, "src"), (43, "dst")):
            agent = [str(BIN / "qrexec-agent"), "-S", "-a", str(self.directory / name / "agent")]
            if os.geteuid() == 0:
                agent = ["/usr/bin/setpriv", "--bounding-set=-setuid,-setgid", *agent]
            self.spawn(domid, *agent)
            self.daemons[name] = self.spawn(
                0,
                str(BIN / "qrexec-daemon"),
                "--direct",
                f"--uuid=u{domid}",
                f"--socket-dir={self.directory / 's'}",
                f"--policy-program={self.program}",
                str(domid),
                name,
                USER,
            )
        for name in ("src", "dst"):
            for path in (self.directory / name / "agent", self.directory / "s" / f"qrexec.{name}"):
                wait_until(lambda path=path: listens(path), str(path))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


@pytest.fixture
def stand_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandAlone]:
    with short_directory() as directory:
        it = StandAlone(directory)
        monkeypatch.setenv("VCHAN_SOCKET_DIR", str(directory / "v"))
        monkeypatch.setenv("VCHAN_DOMAIN", "42")
        try:
            it.start()
            yield it
        finally:
            it.close()


async def policy_daemon(path: Path) -> asyncio.Server:
    """A policy daemon that allows every call to ``dst``."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\n\n")
        writer.write(allow(user=USER))
        await writer.drain()
        writer.close()

    # Few wait to be accepted: the others' connections must wait for a place in the queue.
    return await asyncio.start_unix_server(serve, str(path), backlog=5)


@pytest.mark.spec("WIRE-065")
def test_128_calls_at_once_between_two_domains_then_refused(stand_alone: StandAlone) -> None:
    async def main() -> None:
        server = await policy_daemon(stand_alone.directory / "policy.sock")
        path = stand_alone.directory / "src" / "agent"
        async with server, asyncio.timeout(90):
            # The port table of the target's daemon has 128 entries for one other domain.
            asked = [asyncio.ensure_future(ask(path, "dst", "test.Echo")) for _ in range(140)]
            done = await asyncio.gather(*asked, return_exceptions=True)
            opened = [one for one in done if not isinstance(one, BaseException)]
            refused = [one for one in done if isinstance(one, CallRefused)]
            said = (stand_alone.directory / "log").read_text()[-2000:]
            others = [one for one in done if isinstance(one, BaseException) and one not in refused]
            assert not others, said
            assert (len(opened), len(refused)) == (128, 12), said
            results = await asyncio.gather(*(one.finish(b"x" * 9000) for one in opened))
            assert {(one.status, one.stdout) for one in results} == {(0, b"x" * 9000)}
            # All ports come back: another call goes through.
            for _ in range(200):
                again = await call(path, "dst", "test.Echo", b"again")
                if again is not None:
                    break
                await asyncio.sleep(0.05)
            assert again is not None
            assert again.stdout == b"again"

    asyncio.run(main())


@pytest.mark.alone
@pytest.mark.spec("WIRE-030")
def test_the_end_of_a_daemon_under_load_takes_less_than_two_seconds(
    stand_alone: StandAlone,
) -> None:
    """With calls between domains, services of dom0 that ignore signals, and open questions."""
    stand_alone.program.write_text(
        '#!/bin/sh\ncase "$4" in\n'
        "*Never*) sleep 1000;;\n"
        f"*Sleep*) cat <<X\n{allow(target='dom0', requested_target='dom0').decode()}\nX\n;;\n"
        f"*) cat <<X\n{allow(user=USER).decode()}\nX\n;;\nesac\n"
    )
    service = stand_alone.directory / "rpc" / "test.Sleep"
    service.write_text("#!/bin/sh\ntrap '' TERM INT HUP\nsleep 1000\n")
    service.chmod(0o755)
    daemon = stand_alone.daemons["src"]

    async def main() -> None:
        path = stand_alone.directory / "src" / "agent"
        async with asyncio.timeout(60):
            opened = await asyncio.gather(
                *(ask(path, "dst", "test.Echo") for _ in range(60)),
                *(ask(path, "dom0", "test.Sleep") for _ in range(40)),
            )
            asked = [asyncio.ensure_future(ask(path, "dst", "test.Never")) for _ in range(40)]
            # The service and its sleep, or the program and its, are one session each.
            await until(lambda: len(sessions_of(daemon.pid)) == 80, "services and programs")
            sessions = set(sessions_of(daemon.pid))
            began = time.monotonic()
            daemon.terminate()
            assert await asyncio.to_thread(daemon.wait, 30) == 0
            assert time.monotonic() - began < 10
            await until(lambda: not alive_in(sessions), "the end of all children")
            for ending in await asyncio.gather(*asked, return_exceptions=True):
                assert isinstance(ending, CallRefused)
            for one in opened:
                os.close(one.read_fd)
                if one.write_fd != one.read_fd:
                    os.close(one.write_fd)
                one.request.close()

    asyncio.run(main())


def sessions_of(pid: int) -> list[int]:
    """The sessions of the children of a process; each child leads one."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive_in(sessions: set[int]) -> list[int]:
    """The processes of sessions that are no zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = (entry / "stat").read_text().rpartition(")")[2].split()
                if words[0] != "Z" and int(words[3]) in sessions:
                    found.append(int(entry.name))
    return found


def test_50_calls_at_once_with_the_policy_program(stand_alone: StandAlone) -> None:
    async def main() -> None:
        path = stand_alone.directory / "src" / "agent"
        async with asyncio.timeout(60):
            done = await asyncio.gather(
                *(call(path, "dst", "test.Echo", b"%d" % n) for n in range(50))
            )
            for number, result in enumerate(done):
                assert result is not None
                assert (result.status, result.stdout) == (0, b"%d" % number)

    asyncio.run(main())


# --- with the real client program ---------------------------------------------------------------


async def programs(
    agent_socket: Path, target: str, count: int, environment: dict[str, str]
) -> None:
    """Make ``count`` calls by ``qrexec-client-vm``, eight at a time; none may hang or fail."""
    turns = asyncio.Semaphore(8)

    async def one(number: int) -> None:
        async with turns:
            process = await asyncio.create_subprocess_exec(
                str(BIN / "qrexec-client-vm"),
                f"--agent-socket={agent_socket}",
                target,
                "test.Echo",
                env={"PATH": os.environ["PATH"], **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            data = b"%d" % number * 1000
            out, err = await asyncio.wait_for(process.communicate(data), 60)
            if process.returncode == 126 and number > 400:
                await asyncio.sleep(0.5)  # faster than the rate limit allows
                return
            assert (process.returncode, out, err) == (0, data, b""), number

    await asyncio.gather(*(one(number) for number in range(count)))


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.soak)])
def test_eight_programs_at_once_over_passed(count: int) -> None:
    async def main() -> None:
        with short_directory() as directory:
            async with load(directory, "d0", "d10") as it:
                await programs(it.sandbox.socket_of("d0"), "d10", count, {})

    asyncio.run(main())


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.soak)])
def test_eight_programs_at_once_over_socketdir(stand_alone: StandAlone, count: int) -> None:
    async def main() -> None:
        server = await policy_daemon(stand_alone.directory / "policy.sock")
        async with server:
            environment = {
                "VCHAN_DOMAIN": "42",
                "VCHAN_SOCKET_DIR": str(stand_alone.directory / "v"),
            }
            await programs(stand_alone.directory / "src" / "agent", "dst", count, environment)

    asyncio.run(main())


# --- for a long time ------------------------------------------------------------------------------


def memory_of(pid: int | str) -> int:
    """Resident memory in KiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0])


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_10000_calls_with_flat_memory_and_descriptors() -> None:
    async def main() -> None:
        with short_directory() as directory:
            names = [f"d{n}" for n in range(5)]
            async with load(directory, *names, "d10") as it:
                sockets = [it.sandbox.socket_of(name) for name in names]
                agents = [it.sandbox.runs[name].pid for name in ("d0", "d10")]

                async def batch(count: int) -> None:
                    # Slower than each domain's rate limit, so that none is refused.
                    for _ in range(count // 50):
                        began = time.monotonic()
                        results = await asyncio.gather(
                            *(call(sockets[n % 5], "d10", "test.Echo", b"data") for n in range(50))
                        )
                        assert all(one is not None and one.status == 0 for one in results)
                        await asyncio.sleep(max(0.0, 0.11 - (time.monotonic() - began)))

                await batch(2000)  # the allocator grows to its working size
                gc.collect()
                descriptors = open_descriptors()
                theirs = [len(os.listdir(f"/proc/{pid}/fd")) for pid in agents]
                memory: list[list[int]] = []
                for _ in range(8):
                    await batch(1000)
                    gc.collect()
                    memory.append([memory_of(pid) for pid in ("self", *agents)])
                assert it.system._audit is not None
                await until(lambda: it.system._audit.written == 10_000, "10000 records")
                assert open_descriptors() == descriptors
                assert [len(os.listdir(f"/proc/{pid}/fd")) for pid in agents] == theirs
                # It goes up and down with what is under way; its middle must not rise.
                for process in zip(*memory, strict=True):
                    assert median(process[4:]) - median(process[:4]) < 6000, memory

    asyncio.run(main())
