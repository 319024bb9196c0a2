"""Systems of real sandboxes for tests, started and spoken to as a person would."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

READY_WITHIN = 60.0


class System:
    """The configuration of one system below a short temporary folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLUICE", "QREXEC", "XDG_"))
        }

    def command(self, *words: str) -> list[str]:
        """Return the command line of ``sluice WORDS``."""
        return [sys.executable, "-m", "sluice", words[0], "--root", str(self.root), *words[1:]]

    def sluice(self, *words: str, input: str = "") -> subprocess.CompletedProcess[str]:
        """Run ``sluice`` to its end."""
        return subprocess.run(
            self.command(*words),
            input=input,
            capture_output=True,
            text=True,
            timeout=100,
            env=self.environment,
            check=False,
        )

    @contextlib.contextmanager
    def up(self) -> Iterator[Running]:
        """Have the system running, in the foreground of a process of the test's own."""
        process = subprocess.Popen(
            self.command("up"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=self.environment,
        )
        running = Running(self, process)
        try:
            running.wait_until_ready()
            yield running
        finally:
            running.end()


class Running:
    """A system that runs."""

    def __init__(self, system: System, process: subprocess.Popen[bytes]) -> None:
        self.system = system
        self.pid = process.pid
        self.process = process
        self.said = b""
        self._started: list[subprocess.Popen[bytes]] = []

    def wait_until_ready(self) -> None:
        """Wait for the line that says so. Raises AssertionError with what was said instead."""
        assert self.process.stderr is not None
        end = time.monotonic() + READY_WITHIN
        while b"ready:" not in self.said:
            readable, _, _ = select.select([self.process.stderr], [], [], end - time.monotonic())
            data = os.read(self.process.stderr.fileno(), 65536) if readable else b""
            assert data, f"not ready: {self.said.decode()}"
            self.said += data

    def run(self, domain: str, command: str) -> tuple[int, str]:
        """Run a shell command in a domain; return its status and all that it wrote."""
        done = self.system.sluice("run", domain, "--", "bash", "-c", command)
        return done.returncode, done.stdout + done.stderr

    def start(self, domain: str, command: str) -> subprocess.Popen[bytes]:
        """Start a shell command in a domain, its output in a pipe, its input open."""
        process = subprocess.Popen(
            self.system.command("run", domain, "--", "bash", "-c", command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.system.environment,
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        """End the system and whatever was started, by their ids."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            for process in self._started:
                if process.poll() is None:
                    process.kill()
                process.wait()
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        with contextlib.suppress(OSError):
                            stream.close()
            if self.process.stderr is not None:
                self.process.stderr.close()


@contextlib.contextmanager
def make_system(toml: str, policy: str, files: Mapping[str, str]) -> Iterator[System]:
    """Lay a system's configuration; ``files`` are scripts beside it, by name."""
    root = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    root.chmod(0o755)
    config = root / "config"
    (config / "policy.d").mkdir(parents=True)
    (config / "system.toml").write_text(toml)
    (config / "policy.d" / "30-test.policy").write_text(policy)
    for name, text in files.items():
        (config / name).write_text(text)
        (config / name).chmod(0o755)
    try:
        yield System(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def unsaid(result: tuple[int, str]) -> tuple[int, str]:
    """Leave away what the client itself says of a call that fails without a word."""
    code, text = result
    return code, re.sub(r"\Aqrexec-client-vm: status \d+: .*\n\Z", "", text)


def descendants(pid: int) -> list[int]:
    """Return all processes below ``pid``, without itself."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    queue = list(children.get(pid, []))
    while queue:
        found.append(queue.pop())
        queue += children.get(found[-1], [])
    return found
