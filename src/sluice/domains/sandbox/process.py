"""Domains as plain processes: no isolation whatsoever. For tests, and where namespaces are
forbidden.

The agent and what it starts run as our own user, see our files and each other, and can do what we
can. Every start says so. A directory takes the place of the domain's file system: its files lie
below it under the paths they have in a real domain, and services are looked for there.
docs/spec/core-stack.md 12.1 (level 0).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import sys
from pathlib import Path

from sluice import runtime
from sluice.agent.inside import furnish
from sluice.agent.procfs import stat_fields
from sluice.domains.model import DomainConfig
from sluice.domains.paths import Paths
from sluice.domains.sandbox import etc, mounts, stage
from sluice.domains.sandbox.base import CONTROL_ENVIRONMENT, Limit
from sluice.domains.sandbox.private import DISPOSABLE, remove, sweep_trees
from sluice.domains.sandbox.supplies import supplies
from sluice.errors import LocalError

MARK = "SLUICE_PROCESS_DOMAIN"
"""Names the run in the environment of everything it starts, so that all of it can be found."""

WARNING = (
    "NO ISOLATION: domains of kind `process` run as your own user, with your files, your network"
    " and your processes in reach. For tests only."
)
_KERNEL_THREAD = 0x200000  # PF_KTHREAD among the flags of /proc/PID/stat
# How often what a killed agent left is looked for, and the seconds between: what forks or executes
# at the moment of one look is found by the next.
_LOOKS, _PAUSE = 20, 0.005
_DIRECTORIES = ("run", "home/user", "rw", "usr/local/bin", "etc/qubes-rpc", "etc/qubes/rpc-config")
_SERVICES = ("run/qubes-rpc", "usr/local/etc/qubes-rpc", "etc/qubes-rpc")
_CONFIGURATION = ("run/qubes/rpc-config", "usr/local/etc/qubes/rpc-config", "etc/qubes/rpc-config")
# A wrapper, so that clients find the agent of this domain and not one of the host.
_CLIENT = '#!/bin/sh\nexec {launcher} --agent-socket={socket} "$@"\n'


def own_user() -> str:
    """Return the name of the user we are: the only one that such a domain has."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _may_be_starting(pid: str) -> bool:
    """Return whether a process without environment may be in the middle of an ``execve``.

    For that moment its new environment is not in place yet, so that it seems to have none. Kernel
    threads and zombies never have one. Raises OSError when it is gone.
    """
    fields = stat_fields(pid)
    if fields[0] in (b"Z", b"X") or int(fields[6]) & _KERNEL_THREAD:
        return False
    start, end = fields[47:49]  # where the environment lies: nowhere, or a place without length?
    return start == b"0" or start != end


class RunningProcess:
    """One run of a domain as plain processes."""

    kind = "process"

    def __init__(
        self, staged: stage.Staged, mark: str, directory: Path, forgotten: Path | None = None
    ) -> None:
        """Take the agent's process, the mark of the run and its run directory.

        ``forgotten`` is a tree that is removed at the end of the run.
        """
        self._staged = staged
        self._mark = f"{MARK}={mark}".encode()
        self._directory = directory
        self._forgotten = forgotten
        self.pid = staged.process.pid
        self.pidfd = staged.pidfd
        self.stderr_fd = os.dup(staged.console)

    def kill(self) -> None:
        """End the agent and everything that carries the run's mark."""
        self._staged.kill()
        self._kill_marked()

    def _kill_marked(self) -> bool:
        """End what carries the mark; return whether to look again."""
        unsure = False
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                with open(f"/proc/{entry}/environ", "rb") as file:
                    variables = file.read(1 << 20).split(b"\0")
                if self._mark in variables:
                    os.kill(int(entry), signal.SIGKILL)
                    unsure = True  # what it forks at this moment was not in the listing
                elif variables == [b""]:
                    unsure = unsure or _may_be_starting(entry)
        return unsure

    async def wait(self) -> int:
        """Wait for the agent; what it left is ended."""
        status = await self._staged.wait()
        for _ in range(_LOOKS):
            if not self._kill_marked():
                break
            await asyncio.sleep(_PAUSE)
        return status

    async def clean(self) -> None:
        """Remove the run directory, and what a disposable has written."""
        self._staged.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._forgotten is not None:
            with contextlib.suppress(LocalError):  # the next start removes it
                await remove(self._forgotten.parent, self._forgotten.name, None)

    def limits(self) -> list[Limit]:
        """Return that nothing is limited."""
        names = ("memory", "processes", "cpus", "descriptors")
        return [Limit(name, "unlimited", "none") for name in names]

    def change_limits(
        self, *, memory: int | None = None, processes: int | None = None, cpus: int | None = None
    ) -> None:
        """Refuse: nothing holds a limit here."""
        raise LocalError("domains of kind `process` have no limits")


class Process:
    """Starts domains as plain processes, for one system."""

    kind = "process"

    def __init__(self, paths: Paths) -> None:
        """Take the places of the system."""
        self._paths = paths

    def close(self) -> None:
        """Nothing is kept between starts."""

    async def sweep(self) -> list[str]:
        """Remove what disposables of a killed AdminVM have left; see ``Sandbox.sweep``."""
        return await sweep_trees(self._paths.appvms, as_all_ids=False)

    def privilege(self) -> str:
        """Say loudly that there is no isolation."""
        return WARNING

    async def start(self, domain: DomainConfig, control: socket.socket) -> RunningProcess:
        """Start the domain's agent; see ``Sandbox.start``."""
        print(f"{domain.name}: {WARNING}", file=sys.stderr, flush=True)
        place = self._paths.appvms / domain.name
        root = place / (DISPOSABLE if domain.klass == "DispVM" else "process")
        directory = self._paths.domains / domain.name
        try:
            if domain.klass == "DispVM":
                await remove(place, DISPOSABLE, None)
            self._furnish(domain, root)
            shutil.rmtree(directory, ignore_errors=True)
            (directory / "bin").mkdir(mode=0o700, parents=True)
            agent_socket = directory / "agent.sock"
            for name in ("qrexec-client-vm", "qvm-connect-tcp"):
                client = directory / "bin" / name
                client.write_text(
                    _CLIENT.format(launcher=runtime.launcher(name), socket=agent_socket)
                )
                client.chmod(0o700)
        except OSError as error:
            raise LocalError(f"{domain.name}: cannot be furnished: {error}") from error
        mark = secrets.token_hex(16)
        environment = self._environment(domain, root, directory)
        environment |= {MARK: mark, CONTROL_ENVIRONMENT: str(control.fileno())}
        staged = stage.spawn(
            [runtime.launcher("qrexec-agent"), "-a", str(agent_socket), "-S"],
            descriptors=(control.fileno(),),
            directory=str(root),
            environment=environment,
        )
        forgotten = root if domain.klass == "DispVM" else None
        return RunningProcess(staged, mark, directory, forgotten)

    def _furnish(self, domain: DomainConfig, root: Path) -> None:
        """Lay the files below ``root`` as they would lie in a real domain."""
        for name in _DIRECTORIES:
            (root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        failures = furnish(supplies(domain, self._paths), -1, str(root))
        if failures:
            raise LocalError(f"{domain.name}: could not lay {failures[0]}")
        template = self._paths.template(domain.template or domain.name)
        for name in ("qubes-rpc", "qubes/rpc-config"):
            shutil.rmtree(root / "etc" / name)
            (root / "etc" / name).mkdir()
            for source in mounts.sources(name, template):
                for entry in source.iterdir():
                    place = root / "etc" / name / entry.name
                    if not os.path.lexists(place):
                        # A link that a service is stays one; all else is used where it lies.
                        place.symlink_to(entry.readlink() if entry.is_symlink() else entry)

    def _environment(self, domain: DomainConfig, root: Path, directory: Path) -> dict[str, str]:
        def below(names: tuple[str, ...]) -> str:
            return ":".join(str(root / name) for name in names)

        base = etc.environment(domain, as_root=False)
        del base["XDG_RUNTIME_DIR"]  # nothing of the host's
        path = f"{directory / 'bin'}:{root / 'usr/local/bin'}:{runtime.bin_directory()}"
        return base | {
            "PATH": f"{path}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "PYTHONPATH": str(Path(runtime.package_directory()).parent),
            "HOME": str(root / "home/user"),  # whoever we are, as in every other kind
            "XDG_STATE_HOME": str(root / "home/user/.local/state"),
            "QREXEC_SERVICE_PATH": below(_SERVICES),
            "QUBES_RPC_CONFIG_PATH": below(_CONFIGURATION),
            "SLUICE_PROCESS_ROOT": str(root),
        }
