"""The real qrexec-daemon as a process, with everybody around it played by the test."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.adminvm import (
    BIN,
    DEADLINE,
    EXEC_CMDLINE,
    HELLO,
    Closed,
    Wire,
    exec_body,
    hello,
    message,
    short_directory,
    wait_until,
)

UUID = "3a9f0f3c-0000-4000-8000-00000000002a"


def listener(path: Path | str) -> socket.socket:
    """A listening Unix socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock.bind(str(path))
    sock.listen(300)
    sock.settimeout(DEADLINE)
    return sock


def accept(sock: socket.socket) -> Wire:
    """Take the next connection."""
    return Wire(sock.accept()[0])


def connect(path: Path | str) -> Wire:
    """Connect to a Unix socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(DEADLINE)
    sock.connect(str(path))
    return Wire(sock)


def serve_local(conn: Wire) -> tuple[int, int, int, bytes]:
    """Be a daemon to one local client: shake hands, read its request."""
    conn.send(hello(3))
    assert struct.unpack("<I", conn.expect(HELLO)) == (3,)
    kind, body = conn.receive()
    domain, port = struct.unpack_from("<II", body)
    return kind, domain, port, body[8:]


class DaemonHarness:
    """One qrexec-daemon for domain 42, ``src``, and its surroundings."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sockets = directory / "s"
        self.vchan = directory / "v"
        self.program_log = directory / "program.log"
        for path in (self.sockets, self.vchan, directory / "rpc", directory / "conf"):
            path.mkdir()
        self.process: subprocess.Popen[bytes] | None = None
        self.control: socket.socket | None = None
        self._open: list[Wire | socket.socket] = []
        self.program("exit 1")

    # --- the daemon -------------------------------------------------------------------------

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of the daemon."""
        return {
            "PATH": os.environ["PATH"],
            "VCHAN_SOCKET_DIR": str(self.vchan),
            "VCHAN_DOMAIN": "0",
            "SLUICE_POLICY_SOCKET": str(self.directory / "policy.sock"),
            "SLUICE_QUBESD_SOCKET": str(self.directory / "qubesd.sock"),
            "SLUICE_QREXEC_LOG_DIR": str(self.directory),
            "QREXEC_SERVICE_PATH": str(self.directory / "rpc"),
            "QUBES_RPC_CONFIG_PATH": str(self.directory / "conf"),
            **more,
        }

    def arguments(self, *more: str, direct: bool = True) -> list[str]:
        """The command line, with what the harness needs."""
        return [
            str(BIN / "qrexec-daemon"),
            *(["--direct"] if direct else []),
            f"--uuid={UUID}",
            f"--socket-dir={self.sockets}",
            f"--policy-program={self.directory / 'program'}",
            *more,
        ]

    def spawn(self, *more: str, direct: bool = True, **environment: str) -> subprocess.Popen[bytes]:
        """Start it; ``more`` are the positional arguments (42 src if none)."""
        with open("/dev/zero", "rb") as zero:  # which is not to be its stdin, nor its children's
            self.process = subprocess.Popen(
                self.arguments(*(more or ("42", "src")), direct=direct),
                env=self.environment(**environment),
                stdin=zero,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        return self.process

    def start(self, version: int = 4, *more: str, **environment: str) -> Wire:
        """Start it, shake hands as its agent, wait for its sockets; returns the control channel."""
        self.listen()
        self.spawn(*more, **environment)
        return self.greet(version)

    def listen(self) -> None:
        """Be the vchan server that the daemon looks for."""
        if self.control is not None:
            self.control.close()
        self.control = listener(self.vchan / "vchan.42.0.512.sock")

    def greet(self, version: int = 4) -> Wire:
        """Accept the daemon and shake hands; the sockets are there afterwards."""
        assert self.control is not None
        agent = self.keep(accept(self.control))
        assert agent.greet(version) == version
        self.wait_for_sockets()
        return agent

    def wait_for_sockets(self) -> None:
        """Wait until local clients can connect."""
        wait_until(self.is_listening, "the daemon's socket")

    def is_listening(self) -> bool:
        """Tell whether the local socket takes connections."""
        try:
            connect(self.sockets / "qrexec.42").close()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def ended(self) -> int:
        """Wait for its end; returns the exit status."""
        assert self.process is not None
        return self.process.wait(DEADLINE)

    def alive(self) -> bool:
        """Tell whether it still serves."""
        assert self.process is not None
        return self.process.poll() is None and self.is_listening()

    def names(self) -> set[str]:
        """The files in the socket directory."""
        return set(os.listdir(self.sockets))

    def keep(self, wire: Wire) -> Wire:
        """Close a connection at the end of the test."""
        self._open.append(wire)
        return wire

    # --- around it --------------------------------------------------------------------------

    def local(self, *, version: int | None = 3, name: str = "qrexec.42") -> Wire:
        """A local client, shaken hands unless ``version`` is None."""
        client = self.keep(connect(self.sockets / name))
        assert client.expect(HELLO) == struct.pack("<I", 3)
        if version is not None:
            client.send(hello(version))
        return client

    def request(
        self, text: bytes, domain: int = 0, port: int = 0, kind: int = EXEC_CMDLINE
    ) -> Wire:
        """A local client that has made a request."""
        client = self.local()
        client.send(message(kind, exec_body(domain, port, text)))
        return client

    def allocated(self, domain: int = 0) -> tuple[Wire, int]:
        """A local client that was given a port."""
        client = self.request(b"user:x\0", domain)
        vm, port = struct.unpack("<II", client.expect(EXEC_CMDLINE))
        assert vm == 42
        return client, port

    def program(self, script: str) -> None:
        """Write the policy program; its arguments are logged."""
        path = self.directory / "program"
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>{self.program_log}\n{script}\n')
        path.chmod(0o755)

    def program_calls(self) -> list[str]:
        """How the policy program was called."""
        return self.program_log.read_text().splitlines() if self.program_log.exists() else []

    def policy(self) -> socket.socket:
        """The policy daemon's socket; the test answers on it."""
        sock = listener(self.directory / "policy.sock")
        self._open.append(sock)
        return sock

    def qubesd(self) -> socket.socket:
        """qubesd's socket; the test answers on it."""
        sock = listener(self.directory / "qubesd.sock")
        self._open.append(sock)
        return sock

    def daemon_of(self, name: str) -> socket.socket:
        """The socket of another domain's daemon."""
        sock = listener(self.sockets / f"qrexec.{name}")
        self._open.append(sock)
        return sock

    def service(self, name: str, script: str) -> None:
        """Write a service of dom0."""
        path = self.directory / "rpc" / name
        path.write_text(script)
        path.chmod(0o755)

    def close(self) -> None:
        """End everything."""
        for wire in self._open:
            wire.close()
        if self.control is not None:
            self.control.close()
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
            if self.process.stderr:
                self.process.stderr.close()


@contextlib.contextmanager
def harness() -> Iterator[DaemonHarness]:
    """A harness in a directory of its own."""
    with short_directory() as directory:
        daemon = DaemonHarness(directory)
        try:
            yield daemon
        finally:
            daemon.close()


def read_policy_request(conn: Wire) -> bytes:
    """Read what the daemon asks the policy daemon: up to the empty line."""
    data = b""
    while not data.endswith(b"\n\n"):
        data += conn.exactly(1)
    return data


def answer(policy: socket.socket, reply: bytes) -> bytes:
    """Answer one policy request; returns what was asked."""
    conn = accept(policy)
    asked = read_policy_request(conn)
    conn.send(reply)
    conn.close()
    return asked


def qubesd_call(conn: Wire) -> bytes:
    """Read one request to qubesd, to its end."""
    data = b""
    try:
        while True:
            data += conn.exactly(1)
    except Closed:
        return data


def allow(**fields: str | None) -> bytes:
    """A reply that allows; fields replace or add lines, None leaves one out."""
    values: dict[str, str | None] = {
        "user": "user",
        "result": "allow",
        "target": "dst",
        "autostart": "False",
        "requested_target": "dst",
        **fields,
    }
    return "\n".join(
        f"{key}={value}" for key, value in values.items() if value is not None
    ).encode()
