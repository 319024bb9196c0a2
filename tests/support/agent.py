"""Playing the daemon, the peer of a call and the local client against the real programs.

Everything speaks raw bytes over plain sockets in temporary directories. As root the programs are
started as an ordinary user (``nobody``), because that is the situation the checklist describes;
otherwise as whoever runs the tests.
"""

from __future__ import annotations

import array
import contextlib
import os
import pwd
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.support.listening import listens

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = ROOT / "src" / "sluice" / "bin"
DEADLINE = 20.0

HELLO = 0x300
STDIN, STDOUT, STDERR, EXIT = 0x190, 0x191, 0x192, 0x193
EXEC, JUST, CONNECT, REFUSED = 0x200, 0x201, 0x202, 0x203
TRIGGER2, TERMINATED, TRIGGER3, TRIGGER4 = 0x210, 0x211, 0x212, 0x213

SELF = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name


def as_user(words: Sequence[str]) -> list[str]:
    """Put in front of a command what makes it run as SELF."""
    if os.geteuid() != 0:
        return list(words)
    entry = pwd.getpwnam(SELF)
    ids = [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups", "--"]
    return ["setpriv", *ids, *words]


def give(path: Path | str) -> None:
    """Make a file or directory SELF's."""
    if os.geteuid() == 0:
        entry = pwd.getpwnam(SELF)
        os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)


def until(condition: Callable[[], object], what: str = "condition") -> None:
    """Wait for something that nobody announces, within the deadline."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true in {DEADLINE} s")
        select.select([], [], [], 0.005)


class Wire:
    """A stream of messages over a socket or a pair of pipes, read and written raw."""

    def __init__(self, reader: socket.socket | int, writer: socket.socket | int | None = None):
        self.reader = reader
        self.writer = reader if writer is None else writer
        self._fds: list[int] = []

    def send(self, data: bytes) -> None:
        """Write everything."""
        if isinstance(self.writer, socket.socket):
            self.writer.sendall(data)
        else:
            while data:
                data = data[os.write(self.writer, data) :]

    def message(self, kind: int, body: bytes = b"") -> None:
        """Send one message."""
        self.send(struct.pack("<II", kind, len(body)) + body)

    def hello(self, version: int = 4) -> None:
        """Send HELLO."""
        self.message(HELLO, struct.pack("<I", version))

    def _wait(self, timeout: float) -> None:
        if not select.select([self.reader], [], [], timeout)[0]:
            raise AssertionError("nothing came in time")

    def exactly(self, size: int, timeout: float = DEADLINE) -> bytes:
        """Read ``size`` bytes; fewer only at the end of the stream."""
        data = b""
        while len(data) < size:
            self._wait(timeout)
            try:
                if isinstance(self.reader, socket.socket):
                    piece = self.reader.recv(size - len(data))
                else:
                    piece = os.read(self.reader, size - len(data))
            except ConnectionResetError:
                piece = b""
            if not piece:
                break
            data += piece
        return data

    def next(self, timeout: float = DEADLINE) -> tuple[int, bytes] | None:
        """Read one message; None at the end of the stream."""
        head = self.exactly(8, timeout)
        if not head:
            return None
        kind, size = struct.unpack("<II", head)
        return kind, self.exactly(size, timeout)

    def rest(self) -> list[tuple[int, bytes]]:
        """Read all messages up to the end, joining neighbours of one data stream."""
        messages: list[tuple[int, bytes]] = []
        while (message := self.next()) is not None:
            kind, body = message
            if body and messages and messages[-1][0] == kind and messages[-1][1] and kind != EXIT:
                messages[-1] = (kind, messages[-1][1] + body)
            else:
                messages.append(message)
        return messages

    def expect_hello(self, version: int = 4) -> None:
        """Read HELLO and check its version."""
        assert self.next() == (HELLO, struct.pack("<I", version))

    def shake(self) -> None:
        """Do the whole data handshake."""
        self.hello()
        self.expect_hello()

    def ended(self) -> bool:
        """Tell whether the stream is at its end (waits)."""
        return self.exactly(1) == b""

    def silent(self, seconds: float = 0.1) -> bool:
        """Tell that nothing comes for a while."""
        return not select.select([self.reader], [], [], seconds)[0]

    def close(self) -> None:
        """Close both directions."""
        for end in {self.reader, self.writer}:
            if isinstance(end, socket.socket):
                end.close()
            else:
                with contextlib.suppress(OSError):
                    os.close(end)


def streams(messages: list[tuple[int, bytes]], kind: int) -> bytes:
    """Return what a stream carried; it must have ended exactly once, at its end."""
    bodies = [body for k, body in messages if k == kind]
    assert bodies.count(b"") == 1 and bodies[-1] == b"", bodies
    return b"".join(bodies)


def code(messages: list[tuple[int, bytes]]) -> int:
    """Return the exit code, which must be the last message and the only one of its kind."""
    assert [k for k, _ in messages].count(EXIT) == 1 and messages[-1][0] == EXIT, messages
    assert len(messages[-1][1]) == 4
    status: int = struct.unpack("<i", messages[-1][1])[0]
    return status


class Place:
    """A temporary directory with what an agent needs, and the processes started in it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
        self.path.chmod(0o755)
        give(self.path)
        for name in ("vchan", "rpc", "rpc2", "conf", "run"):
            (self.path / name).mkdir()
            give(self.path / name)
        self.agent_socket = self.path / "run" / "agent"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closers: list[Callable[[], None]] = []

    def environment(self, **extra: str) -> dict[str, str]:
        """Return the environment of the programs."""
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(self.path),
            "VCHAN_DOMAIN": "42",
            "VCHAN_SOCKET_DIR": str(self.path / "vchan"),
            "QREXEC_SERVICE_PATH": f"{self.path / 'rpc'}:{self.path / 'rpc2'}",
            "QUBES_RPC_CONFIG_PATH": str(self.path / "conf"),
            **extra,
        }

    def start(
        self,
        program: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        extra: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        **options: object,
    ) -> subprocess.Popen[bytes]:
        """Start one of the project's programs as SELF."""
        env = dict(environment or self.environment(**(extra or {})))
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("stderr", subprocess.PIPE)
        process = subprocess.Popen(  # type: ignore[call-overload]
            as_user([*prefix, str(BIN / program), *arguments]), env=env, **options
        )
        self._processes.append(process)
        return process  # type: ignore[no-any-return]

    def service(self, name: str, text: str, directory: str = "rpc", mode: int = 0o755) -> Path:
        """Write a service script."""
        path = self.path / directory / name
        path.write_text(text)
        path.chmod(mode)
        return path

    def listen(self, name: str) -> socket.socket:
        """Listen on a Unix socket below the place."""
        listener = socket.socket(socket.AF_UNIX)
        path = self.path / name
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen(16)
        listener.settimeout(DEADLINE)
        self._closers.append(listener.close)
        return listener

    def vchan_server(self, server: int, client: int, port: int) -> socket.socket:
        """Be a vchan server."""
        return self.listen(f"vchan/vchan.{server}.{client}.{port}.sock")

    def vchan_client(self, server: int, client: int, port: int) -> Wire:
        """Be a vchan client: retry until the server is there."""
        path = str(self.path / "vchan" / f"vchan.{server}.{client}.{port}.sock")
        return Wire(self.connect(path))

    def connect(self, path: str | Path) -> socket.socket:
        """Connect to a Unix socket that is about to exist."""
        end = time.monotonic() + DEADLINE
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                if time.monotonic() > end:
                    raise
                select.select([], [], [], 0.005)
                continue
            connection.settimeout(DEADLINE)
            self._closers.append(connection.close)
            return connection

    def close(self) -> None:
        """End everything that was started here."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait(DEADLINE)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        for closer in self._closers:
            closer()
        shutil.rmtree(self.path, ignore_errors=True)


class AgentUnderTest:
    """A real agent, with the tester as its daemon."""

    def __init__(
        self,
        place: Place,
        *options: str,
        version: int = 4,
        handshake: bool = True,
        extra: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.place = place
        self.process = place.start(
            "qrexec-agent",
            "-a",
            str(place.agent_socket),
            "-s",
            str(place.path / "run" / "fork.%s"),
            *options,
            extra=extra,
            prefix=prefix,
        )
        self.control = place.vchan_client(42, 0, 512)
        if handshake:
            self.control.expect_hello()
            self.control.hello(version)
            until(lambda: listens(place.agent_socket), "the trigger socket")

    def request(
        self, kind: int, domain: int, port: int, text: bytes, *, server: bool = True
    ) -> socket.socket | None:
        """Send EXEC_CMDLINE and its like; return the listening data channel."""
        listener = self.place.vchan_server(domain, 42, port) if server else None
        body = struct.pack("<II", domain, port) + text + b"\0"
        self.control.message(kind, body)
        return listener

    def call(self, text: bytes, kind: int = EXEC, domain: int = 43, port: int = 1024) -> Wire:
        """Start a command and do the data handshake."""
        listener = self.request(kind, domain, port, text)
        assert listener is not None
        connection = listener.accept()[0]
        connection.settimeout(DEADLINE)
        self.place._closers.append(connection.close)
        wire = Wire(connection)
        wire.shake()
        return wire

    def run(self, text: bytes, kind: int = EXEC, port: int = 1024) -> list[tuple[int, bytes]]:
        """Run a command without input to its end; CONNECTION_TERMINATED must follow."""
        wire = self.call(text, kind, 43, port)
        messages = wire.rest()
        self.terminated(43, port)
        return messages

    def terminated(self, domain: int, port: int) -> None:
        """Check that the next control message reports the end of this channel."""
        assert self.control.next() == (TERMINATED, struct.pack("<II", domain, port))

    def trigger(
        self, service: bytes, target: bytes = b"vault", ident: bytes = b"SOCKET"
    ) -> tuple[Wire, bytes]:
        """Ask for a call as a local client; return its connection and the forwarded ident."""
        client = Wire(self.place.connect(self.place.agent_socket))
        client.message(TRIGGER4, trigger_body(service, target, ident=ident))
        message = self.control.next()
        assert message is not None and message[0] == TRIGGER4
        return client, message[1][128:160]


class System:
    """One domain, domX, with real programs: agent and daemon, joined by sockets in a directory."""

    UUID = "3a9f0f3c-0000-4000-8000-00000000002a"

    def __init__(self, place: Place, *, start: bool = True) -> None:
        self.place = place
        self.sockets = place.path / "daemon"
        self.sockets.mkdir()
        give(self.sockets)
        self.environment = {**place.environment(), "VCHAN_DOMAIN": "0"}
        if start:
            self.start_agent()
            self.start_daemon()
            self.ready()

    def start_agent(self) -> subprocess.Popen[bytes]:
        """Start the agent, which waits for a daemon."""
        return self.place.start("qrexec-agent", "-a", str(self.place.agent_socket), "-S")

    def start_daemon(self) -> subprocess.Popen[bytes]:
        """Start the daemon, which waits for an agent."""
        return self.place.start(
            "qrexec-daemon",
            *("--direct", f"--uuid={self.UUID}", f"--socket-dir={self.sockets}", "42", "domX"),
            SELF,
            environment=self.environment,
            stderr=subprocess.DEVNULL,
        )

    def ready(self) -> None:
        """Wait until calls can be made."""
        until(lambda: listens(self.sockets / "qrexec.domX"), "the daemon's socket")

    def client(self, text: str, data: bytes = b"") -> tuple[int, bytes, bytes]:
        """Call a service as dom0 does."""
        client = [str(BIN / "qrexec-client"), f"--socket-dir={self.sockets}", "-d", "domX"]
        done = subprocess.run(
            as_user([*client, f"DEFAULT:QUBESRPC {text} dom0"]),
            input=data,
            capture_output=True,
            env=self.environment,
            timeout=DEADLINE,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr


def trigger_body(
    service: bytes, target: bytes = b"vault", source: bytes = b"", ident: bytes = b"SOCKET"
) -> bytes:
    """Return the body of TRIGGER_SERVICE4."""
    return source.ljust(64, b"\0") + target.ljust(64, b"\0") + ident.ljust(32, b"\0") + service


def send_fds(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Send bytes with descriptors on their first."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    assert sock.sendmsg([data], rights) == len(data)


@contextlib.contextmanager
def a_place() -> Iterator[Place]:
    """Make a place and clean it up."""
    place = Place()
    try:
        yield place
    finally:
        place.close()
