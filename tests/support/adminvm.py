"""What tests of the AdminVM need: agents that are played, agents that are real, raw messages."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sluice.adminvm.decision import Decision
from sluice.adminvm.judge import Ruling
from sluice.adminvm.system import AdminVM
from sluice.domains.model import DomainConfig
from sluice.domains.paths import Paths
from sluice.domains.registry import Registry
from sluice.domains.sandbox.base import Limit
from sluice.wire.names import Trigger

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / "src/sluice/bin"
DEADLINE = 30.0

EXEC_CMDLINE = 0x200
JUST_EXEC = 0x201
SERVICE_CONNECT = 0x202
SERVICE_REFUSED = 0x203
TRIGGER2 = 0x210
TERMINATED = 0x211
TRIGGER3 = 0x212
TRIGGER4 = 0x213
HELLO = 0x300


def message(kind: int, body: bytes = b"") -> bytes:
    """Header and body, written out here so that the tests do not lean on the code under test."""
    return struct.pack("<II", kind, len(body)) + body


def hello(version: int) -> bytes:
    """HELLO with a version."""
    return message(HELLO, struct.pack("<I", version))


def exec_body(domain: int, port: int, text: bytes = b"") -> bytes:
    """exec_params."""
    return struct.pack("<II", domain, port) + text


def trigger4(
    target: bytes = b"dst",
    service: bytes = b"test.Svc+a",
    ident: bytes = b"SOCKET12",
    source: bytes = b"",
    *,
    nul: bytes = b"\0",
) -> bytes:
    """TRIGGER_SERVICE4, fields cut and filled to their sizes."""
    return message(
        TRIGGER4,
        source[:64].ljust(64, b"\0")
        + target[:64].ljust(64, b"\0")
        + ident[:32].ljust(32, b"\0")
        + service
        + nul,
    )


def trigger3(target: bytes, service: bytes, ident: bytes, *, nul: bytes = b"\0") -> bytes:
    """TRIGGER_SERVICE3."""
    fields = target[:64].ljust(64, b"\0") + ident[:32].ljust(32, b"\0")
    return message(TRIGGER3, fields + service + nul)


def trigger2(target: bytes, service: bytes, ident: bytes) -> bytes:
    """TRIGGER_SERVICE."""
    return message(
        TRIGGER2, service[:64].ljust(64, b"\0") + target.ljust(32, b"\0") + ident.ljust(32, b"\0")
    )


class Closed(Exception):
    """The other side has closed the connection."""


class Wire:
    """A connected stream socket on which a test speaks raw messages, with deadlines."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(DEADLINE)
        self.fds: list[int] = []

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def exactly(self, size: int) -> bytes:
        """Read so many bytes; descriptors that come along are kept in ``fds``."""
        data = b""
        while len(data) < size:
            piece = self._read(size - len(data))
            if not piece:
                raise Closed(f"end of file after {len(data)} of {size} bytes")
            data += piece
        return data

    def _read(self, size: int) -> bytes:
        try:
            data, ancillary, _, _ = self.sock.recvmsg(size, 1024, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return b""
        for level, kind, payload in ancillary:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            numbers = array.array("i")
            numbers.frombytes(payload)
            self.fds += numbers
        return data

    def receive(self) -> tuple[int, bytes]:
        """Read one message."""
        kind, size = struct.unpack("<II", self.exactly(8))
        return kind, self.exactly(size)

    def expect(self, kind: int) -> bytes:
        """Read one message, which must be of this type; returns its body."""
        got, body = self.receive()
        assert got == kind, f"{got:#x} instead of {kind:#x}: {body!r}"
        return body

    def take_fds(self) -> list[int]:
        fds, self.fds = self.fds, []
        return fds

    def at_end(self, seconds: float = DEADLINE) -> bool:
        """Wait for the end of the connection; False where bytes come instead.

        ``seconds``: where a daemon would also drop a silent client after its ten, fewer.
        """
        self.sock.settimeout(seconds)
        try:
            return self._read(1) == b""
        finally:
            self.sock.settimeout(DEADLINE)

    def silent(self, seconds: float = 0.1) -> bool:
        """Tell that nothing comes for a moment. For claims of the kind "and then nothing"."""
        self.sock.settimeout(seconds)
        try:
            return not self.sock.recv(1, socket.MSG_PEEK) and False
        except TimeoutError:
            return True
        finally:
            self.sock.settimeout(DEADLINE)

    def greet(self, version: int = 4) -> int:
        """Make the handshake as an agent; returns the version answered."""
        self.send(hello(version))
        return int(struct.unpack("<I", self.expect(HELLO))[0])

    def close(self) -> None:
        for fd in self.take_fds():
            os.close(fd)
        self.sock.close()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """Wait for something that can only be polled; fails after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.005)


async def until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """The same, with the event loop running."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        await asyncio.sleep(0.005)


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A temporary directory whose path is short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# --- sandboxes for tests ------------------------------------------------------------------------


class PlayedSandbox:
    """A "sandbox" whose agent is the test: its end of the control channel is kept in ``wire``."""

    kind = "played"

    def __init__(self, *, greet: int | None = 4) -> None:
        """``greet``: the version with which to shake hands at once; None leaves it to the test."""
        self.version = greet
        self.runs: dict[str, PlayedRun] = {}
        self.started = asyncio.Event()

    async def sweep(self) -> list[str]:
        return []

    def privilege(self) -> str:
        return "no process"

    async def start(self, domain: DomainConfig, control: socket.socket) -> PlayedRun:
        run = PlayedRun(control.dup())
        self.runs[domain.name] = run
        if self.version is not None:
            run.wire.send(hello(self.version))
        self.started.set()
        return run


class PlayedRun:
    """One run of a played domain; it ends when the test, or the AdminVM, says so."""

    pid = -1
    pidfd = -1

    def __init__(self, sock: socket.socket) -> None:
        self.wire = Wire(sock)
        self.killed = False
        self.cleaned = False
        self._over = asyncio.Event()

    async def greeted(self) -> int:
        """Read the AdminVM's HELLO."""
        body = await self.read(12)
        assert body[:8] == struct.pack("<II", HELLO, 4)
        return int(struct.unpack("<I", body[8:])[0])

    async def read(self, size: int) -> bytes:
        """Read raw bytes without holding up the event loop; descriptors go to ``wire.fds``."""
        return await asyncio.to_thread(self.wire.exactly, size)

    async def receive(self) -> tuple[int, bytes, list[int]]:
        """Read one message and the descriptors that came with it."""
        kind, body = await asyncio.to_thread(self.wire.receive)
        return kind, body, self.wire.take_fds()

    def send(self, data: bytes) -> None:
        self.wire.send(data)

    def end(self) -> None:
        """Let the domain die."""
        self.wire.close()
        self._over.set()

    def kill(self) -> None:
        self.killed = True
        self._over.set()

    async def wait(self) -> int:
        """End as an agent does: when the control channel has ended, or by the kill."""
        if self._over.is_set():
            return 0
        poll = select.poll()
        poll.register(self.wire.sock.fileno(), 0)  # hang-up comes without asking
        while not self._over.is_set() and not poll.poll(0):
            await asyncio.sleep(0.01)
        return 0

    async def clean(self) -> None:
        self.cleaned = True
        self.wire.close()

    def limits(self) -> list[Limit]:
        return []


class AgentSandbox:
    """Runs the real agent as an ordinary process, with services from a directory of the test."""

    kind = "agent"

    def __init__(self, directory: Path) -> None:
        """``directory/NAME/`` is the home of each domain; services in ``directory/NAME/rpc``."""
        self.directory = directory
        self.runs: dict[str, AgentRun] = {}

    async def sweep(self) -> list[str]:
        return []

    def privilege(self) -> str:
        return "no isolation"

    def home(self, name: str) -> Path:
        home = self.directory / name
        (home / "rpc").mkdir(parents=True, exist_ok=True)
        return home

    def socket_of(self, name: str) -> Path:
        """The trigger socket of a domain's agent."""
        return self.home(name) / "agent"

    def service(self, name: str, service: str, script: str) -> None:
        """Write an executable service of a domain."""
        path = self.home(name) / "rpc" / service
        path.write_text(script)
        path.chmod(0o755)

    async def start(self, domain: DomainConfig, control: socket.socket) -> AgentRun:
        home = self.home(domain.name)
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "SLUICE_CONTROL_FD": "3",
            "QREXEC_SERVICE_PATH": str(home / "rpc"),
            "QUBES_RPC_CONFIG_PATH": str(home / "rpc-config"),
        }
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        argv = [str(BIN / "qrexec-agent"), "-a", str(home / "agent"), "-S"]
        if os.geteuid() == 0:
            # An agent that cannot become somebody else runs services directly, as a domain's does.
            argv = ["/usr/bin/setpriv", "--bounding-set=-setuid,-setgid", *argv]
        pid = os.posix_spawn(
            argv[0],
            argv,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, write_fd, 2),
                (os.POSIX_SPAWN_DUP2, control.fileno(), 3),
            ],
            setsid=True,
        )
        os.close(write_fd)
        run = AgentRun(pid, read_fd)
        self.runs[domain.name] = run
        return run


class AgentRun:
    """A running real agent."""

    def __init__(self, pid: int, stderr_fd: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.stderr_fd = stderr_fd
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self.pidfd, self._ended)

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self.pidfd)
        os.close(self.pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._status.set_result(status if status >= 0 else 128 - status)

    def kill(self) -> None:
        if not self._status.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def wait(self) -> int:
        return await asyncio.shield(self._status)

    async def clean(self) -> None:
        return None

    def limits(self) -> list[Limit]:
        return []


# --- policy and AdminVM -------------------------------------------------------------------------


class PlayedJudge:
    """A judge whose answers the test writes: target name -> decision."""

    def __init__(self, rulings: Mapping[str, Ruling] = MappingProxyType({})) -> None:
        self.rulings = dict(rulings)
        self.asked: deque[tuple[str, str, str]] = deque(maxlen=1000)

    def allow(self, target: str, *, to: str = "", **fields: Any) -> None:
        values: dict[str, Any] = {
            "user": "DEFAULT",
            "target": to or target,
            "requested_target": target,
            "autostart": True,
        }
        values.update(fields)
        self.rulings[target] = Ruling(Decision(True, **values), "test.policy:1")

    async def decide(self, source: str, trigger: Trigger, running: frozenset[str]) -> Ruling:
        self.asked.append((source, trigger.target, trigger.service))
        denied = Ruling(Decision(False), None, "NO-MATCH: no rule applies")
        return self.rulings.get(trigger.target, denied)


def domain(name: str, qid: int, kind: str, **fields: Any) -> DomainConfig:
    """A domain for tests."""
    uuid = f"00000000-0000-4000-8000-{qid:012d}"
    return DomainConfig(name=name, qid=qid, uuid=uuid, kind=kind, **fields)


@contextlib.asynccontextmanager
async def adminvm(
    directory: Path, domains: list[DomainConfig], sandbox: Any, judge: Any, **options: Any
) -> AsyncIterator[AdminVM]:
    """An AdminVM below ``directory``, started, and stopped at the end."""
    system = AdminVM(
        Registry(domains), {sandbox.kind: sandbox}, judge, Paths.find(str(directory)), **options
    )
    (directory / "config" / "rpc").mkdir(parents=True, exist_ok=True)
    await system.start()
    try:
        yield system
    finally:
        await system.stop()


def open_descriptors() -> set[int]:
    """The descriptors of this process."""
    found = {int(name) for name in os.listdir("/proc/self/fd")}
    return {fd for fd in found if os.path.exists(f"/proc/self/fd/{fd}")}


def client_environment(**more: str) -> dict[str, str]:
    """The environment in which the programs under test run."""
    return {"PATH": os.environ["PATH"], **more}


PYTHON = sys.executable
