"""A stand-in for a Qubes VM around the proxy: a ``qrexec-client-vm`` that is a shell script."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "src/sluice/bin/qrexec-proxy"

# It notes how it was called and runs what the test put below services/. Exits as the real one does.
CLIENT = """#!/bin/sh
here=$(dirname "$0")
printf '%s\\n' "$*" >> "$here/calls"
echo "$$" >> "$here/pids"
[ "$1" = "--" ] && shift
target=$1 service=$2
name=${service%%+*}
QREXEC_SERVICE_ARGUMENT=
case $service in *+*) QREXEC_SERVICE_ARGUMENT=${service#*+};; esac
export QREXEC_SERVICE_ARGUMENT target
[ -e "$here/refuse" ] && { echo 'Request refused' >&2; exit 126; }
[ -x "$here/services/$name" ] || exit 127
exec "$here/services/$name"
"""


def chain_text(name: str, *filters: str, rules: str = "") -> str:
    """Return a chain that any call may use, of filters as they stand in TOML."""
    rules = rules or 'services = "any"\ntargets = "any"\n'
    return f"\n[chains.{name}]\n{rules}\nfilters = [{', '.join(filters)}]\n"


def start_piped(command: list[str], environment: dict[str, str], options: dict[str, Any]) -> Any:
    """Start a program with pipes and an environment, unless ``options`` of Popen say otherwise."""
    piped = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, **{**piped, "env": environment, **options})


def communicate(process: Any, data: bytes, timeout: float) -> subprocess.CompletedProcess[bytes]:
    """Give a process its input and return what came of it; it has ended afterwards."""
    try:
        out, err = process.communicate(data, timeout=timeout)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class Vm:
    """A directory with a configuration, a stand-in client and services."""

    def __init__(self, directory: Path) -> None:
        """Lay it out in an empty directory."""
        self.directory = directory
        (directory / "services").mkdir()
        (directory / "bin").mkdir()
        (directory / "run").mkdir(mode=0o700)
        self.client = self.script("qrexec-client-vm", CLIENT, directory)
        self.audit = directory / "audit.jsonl"
        self.logfile = directory / "proxy.log"
        self.config = directory / "proxy.toml"
        self.configure("")

    def script(self, name: str, text: str, where: Path | None = None) -> Path:
        """Write an executable file."""
        path = (where or self.directory / "bin") / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def service(self, name: str, text: str) -> None:
        """Install a service of the far end."""
        self.script(name, text, self.directory / "services")

    def configure(self, chains: str, proxy: str = "") -> None:
        """Write the configuration: the text of chains, and more settings."""
        self._replace(
            f'[proxy]\nclient = "{self.client}"\naudit = "{self.audit}"\n'
            f'log = "{self.logfile}"\nstate = "{self.directory}/state"\n{proxy}\n{chains}'
        )

    def chain(self, name: str, *filters: str, rules: str = "") -> None:
        """Add a chain that any call may use, of filters as they stand in TOML."""
        self._replace(self.config.read_text() + chain_text(name, *filters, rules=rules))

    def _replace(self, text: str) -> None:
        """Write the configuration at one stroke: a server that watches it sees no half of it."""
        fresh = self.directory / "fresh"
        fresh.write_text(text)
        fresh.replace(self.config)

    def environment(self, source: str | None = "work", **more: str) -> dict[str, str]:
        """Return the environment that an agent gives to the program."""
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.directory),
            "XDG_STATE_HOME": f"{self.directory}/xdg",
            "XDG_RUNTIME_DIR": f"{self.directory}/run",
            "SLUICE_PROXY_CONFIG": str(self.config),
            **more,
        }
        if source is not None:
            environment["QREXEC_REMOTE_DOMAIN"] = source
        return environment

    def start(self, name: str, source: str | None = "work", **options: Any) -> Any:
        """Start the program form for a call; pipes unless told otherwise."""
        return start_piped([str(PROGRAM), name], self.environment(source), options)

    def call(
        self, name: str, data: bytes = b"", source: str | None = "work", timeout: float = 60
    ) -> subprocess.CompletedProcess[bytes]:
        """Make a call with ``data`` as its input and return what came of it."""
        process = self.start(name, source)
        return communicate(process, data, timeout)

    def calls(self) -> list[str]:
        """Return the command lines that the client got."""
        return self._lines("calls")

    def pids(self) -> list[int]:
        """Return the process ids of the clients that were started."""
        return [int(line) for line in self._lines("pids")]

    def _lines(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []

    def records(self) -> list[dict[str, Any]]:
        """Return the audit records."""
        if not self.audit.exists():
            return []
        # A line that is being written has no end yet.
        lines = self.audit.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self) -> str:
        """Return the log."""
        return self.logfile.read_text() if self.logfile.exists() else ""


@contextlib.contextmanager
def vm() -> Iterator[Vm]:
    """Give a Vm in a short directory; what it started is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    made = Vm(directory)
    try:
        yield made
    finally:
        for pid in made.pids():
            with contextlib.suppress(ProcessLookupError):
                if f"{directory}" in _command_line(pid):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def eventually(condition: Any, timeout: float = 30.0, what: str = "") -> Any:
    """Wait until ``condition()`` is true, and return it; fail at the deadline."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"did not happen in {timeout} s: {what}"
        time.sleep(0.01)
