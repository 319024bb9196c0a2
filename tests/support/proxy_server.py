"""The resident proxy under test: a server process, launchers, raw and control connections."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sluice.proxy.control import ControlClient
from tests.support.processes import alive
from tests.support.proxy import ROOT, Vm, communicate, start_piped, vm

LAUNCHER = ROOT / "src/sluice/bin/qrexec-proxy-launcher"
# A chain that the raw socket may use for anything.
RAW = 'services = "any"\ntargets = "any"\nrequire_exit_code = false\n'
COMMAND = [sys.executable, "-c", "from sluice.cli.main import main; main()"]


class Resident:
    """A server with the configuration of a Vm; its sockets lie in the Vm's directory."""

    def __init__(self, qube: Vm) -> None:
        """Nothing runs before ``start``."""
        self.qube = qube
        self.directory = qube.directory
        self.notify = self.directory / "notify"
        self.process: subprocess.Popen[bytes] | None = None
        self.notices: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.notify))

    def environment(self, source: str | None = "work", **more: str) -> dict[str, str]:
        """Return the environment of launcher and server."""
        return self.qube.environment(source, SLUICE_PROXY_SOCKETS=str(self.directory), **more)

    def start(self, *, wait: bool = True, command: list[str] | None = None, **options: Any) -> None:
        """Start the server, and wait until it says that it serves."""
        self.notices.clear()
        self.process = subprocess.Popen(
            command or self.command(),
            env=self.environment(None, NOTIFY_SOCKET=str(self.notify), **options.pop("more", {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )
        if wait:
            self.wait_for("READY=1")

    def command(self) -> list[str]:
        """Return the server's command line."""
        return [*COMMAND, "proxy", "serve", "--config", str(self.qube.config)]

    def wait_for(self, text: str, timeout: float = 30) -> None:
        """Wait until the server has told systemd something."""
        deadline = time.monotonic() + timeout
        while not any(text in notice for notice in self.notices):
            self._socket.settimeout(0.2)
            try:
                self.notices.append(self._socket.recv(4096).decode())
            except TimeoutError:
                assert self.process is not None
                if self.process.poll() is not None:
                    raise AssertionError(self.process.stderr.read().decode()) from None
                assert time.monotonic() < deadline, f"never said {text}: {self.notices}"

    def stop(self) -> int:
        """Tell the server to end and return its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    def launch(self, name: str, source: str | None = "work", **options: Any) -> Any:
        """Start a launcher for a call; pipes unless told otherwise."""
        return start_piped([str(LAUNCHER), name], self.environment(source), options)

    def call(
        self, name: str, data: bytes = b"", source: str | None = "work", timeout: float = 60
    ) -> subprocess.CompletedProcess[bytes]:
        """Make a call with ``data`` as its input and return what came of it."""
        process = self.launch(name, source)
        return communicate(process, data, timeout)

    def raw(self, text: bytes) -> socket.socket:
        """Connect to the raw socket as the agent does, and write ``text``."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Blocking, as the agent does it: where the queue is full that waits.
        sock.connect(f"{self.directory}/raw.sock")
        sock.settimeout(30)
        sock.sendall(text)
        return sock

    def control(self) -> ControlClient:
        """Connect to the control socket."""
        return ControlClient(f"{self.directory}/control.sock")

    def calls(self) -> list[dict[str, Any]]:
        """Return the calls under way."""
        with self.control() as client:
            return client.calls()

    def descriptors(self) -> int:
        """Return how many descriptors the server has open."""
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def close(self) -> None:
        """End what runs."""
        self._socket.close()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()


def refused(server: Resident, text: bytes) -> bool:
    """Tell whether the raw socket closes the connection without a byte."""
    try:
        with server.raw(text) as sock:
            return sock.recv(100) == b""
    except (BrokenPipeError, ConnectionResetError):
        return True


def read_all(sock: socket.socket) -> bytes:
    """Read a socket to its end."""
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


@contextlib.contextmanager
def resident(*, start: bool = True) -> Iterator[Resident]:
    """Give a server with a chain ``pass`` and some services; what it started is gone afterwards."""
    with vm() as qube:
        qube.service("mirror", "#!/bin/sh\nexec cat\n")
        qube.service("code", '#!/bin/sh\necho before\nexit "$QREXEC_SERVICE_ARGUMENT"\n')
        qube.chain("pass", '"pass"')
        made = Resident(qube)
        try:
            if start:
                made.start()
            yield made
        finally:
            made.close()


def left_over(qube: Vm) -> list[int]:
    """Return the far ends that still run. A number may have come to mean another process."""
    return [pid for pid in qube.pids() if alive(pid) and _belongs(pid, qube)]


def _belongs(pid: int, qube: Vm) -> bool:
    """Tell whether a process has the environment of this Vm."""
    try:
        return os.fsencode(qube.directory) in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


__all__ = ["LAUNCHER", "Path", "Resident", "left_over", "read_all", "resident"]
