"""``sluice up``: start the AdminVM of a system and its domains."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sluice.cli.common import chosen_root, places, root_option, tell_errors
from sluice.domains.paths import LOCK, Paths
from sluice.errors import LocalError
from sluice.flow.selector import run
from sluice.runtime import launcher

if TYPE_CHECKING:
    from sluice.adminvm.system import AdminVM
    from sluice.domains.registry import Registry
    from sluice.domains.sandbox.base import Sandbox
    from sluice.domains.system_file import SystemDefaults

READY = "ready:"
MAX_LOG = 1 << 20  # bytes of the log of earlier runs that are gone on with


@click.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--detach", "-d", is_flag=True, help="Return when ready; go on in the background.")
@root_option
@tell_errors
def command(file: str | None, detach: bool, root: str | None) -> None:
    """Start the system of FILE (default: system.toml of the configuration directory).

    The directory of FILE is the configuration directory: policy.d, rpc and template lie in it.
    Stays in the foreground until SIGINT, SIGTERM or `sluice down`.
    """
    paths = places(root)
    if file is not None:
        paths = dataclasses.replace(paths, config=Path(file).absolute().parent)
    system_file = Path(file) if file is not None else paths.system_file
    if not system_file.exists():
        raise LocalError(f"{system_file}: there is no system yet (make one with `sluice init`)")
    if detach:
        _detach(paths, file, chosen_root(root))
    else:
        sys.exit(run(serve(paths, system_file)))


async def serve(paths: Paths, system_file: Path) -> int:
    """Run one system until it is stopped; returns the exit status."""
    with prepared(paths, system_file) as adminvm:
        await adminvm.start()
        print(ready_line(adminvm.registry, adminvm.running()), file=sys.stderr, flush=True)
        await adminvm.run_until_stopped()
    return 0


def ready_line(registry: Registry, running: Collection[str]) -> str:
    """Say how many domains run, and what to do where some that should do not."""
    line = f"{READY} {len(running)} of {len(registry) - 1} domains run"
    failed = [domain.name for domain in registry if domain.autostart and domain.name not in running]
    if failed:
        line += f"; not started, see above: {' '.join(failed)}"
        line += " (`sluice doctor` says what this machine can do)"
    return line


@contextlib.contextmanager
def prepared(paths: Paths, system_file: Path) -> Iterator[AdminVM]:
    """Give the AdminVM of a system, not started yet, and hold the system's lock meanwhile.

    Raises ConfigError where the file is wrong, LocalError where the system runs already.
    """
    from sluice.adminvm.system import AdminVM
    from sluice.domains.store import Store
    from sluice.domains.system_file import load
    from sluice.policy.files import PolicyStore

    system = load(system_file)
    paths.create()
    with only_one(paths):
        _sweep(paths)
        with Store(paths.store) as store:
            registry = system.registry(store)
            policy = PolicyStore(
                paths.policy_directories, legacy_directory=paths.config / "policy.legacy"
            )
            sandboxes = make_sandboxes(paths, registry, system.defaults)
            try:
                yield AdminVM(registry, sandboxes, policy, paths)
            finally:
                for sandbox in sandboxes.values():
                    sandbox.close()


def make_sandboxes(
    paths: Paths, registry: Registry, defaults: SystemDefaults
) -> dict[str, Sandbox]:
    """Return the sandboxes of the kinds that the domains name, and say what each means."""
    from sluice.domains.sandbox.bubblewrap import Bubblewrap
    from sluice.domains.sandbox.process import Process

    kinds = {domain.kind for domain in registry}
    made: dict[str, Sandbox] = {}
    if "bubblewrap" in kinds:
        single = defaults.ids == "single"
        bubblewrap = Bubblewrap(paths, uid_base=defaults.uid_base, single=single)
        registry.publish(bubblewrap.findings())
        made["bubblewrap"] = bubblewrap
    if "process" in kinds:
        made["process"] = Process(paths)
    for kind, sandbox in made.items():
        print(f"{kind}: {sandbox.privilege()}", file=sys.stderr, flush=True)
    return made


@contextlib.contextmanager
def only_one(paths: Paths) -> Iterator[None]:
    """Be the only AdminVM of the system meanwhile; the locks end with the process.

    Both places are locked, for one may be shared without the other: a session without
    XDG_RUNTIME_DIR has other sockets, but the same trees, identities and control groups. Raises
    LocalError where another one is there.
    """
    with contextlib.ExitStack() as stack:
        for place in (paths.runtime, paths.state):
            lock = os.open(place / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise LocalError(
                    f"{place}: an AdminVM runs here already (`sluice down` ends it)"
                ) from None
        yield


def _sweep(paths: Paths) -> None:
    """Remove the sockets and run directories that an AdminVM left which was killed."""
    import shutil

    for directory in (paths.daemon_dir, paths.domains):
        for entry in directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
    paths.control_socket.unlink(missing_ok=True)


def _detach(paths: Paths, file: str | None, root: str | None) -> None:
    """Start ourselves in the background, show what it says until it is ready, and return."""
    paths.create()
    log_file = paths.log / "adminvm.log"
    if log_file.exists() and log_file.stat().st_size > MAX_LOG:
        log_file.replace(log_file.with_suffix(".log.1"))
    # An interpreter that was started without its libraries is told by the launcher where they are.
    program = ["-IS", launcher("sluice")] if sys.flags.no_site else ["-m", "sluice"]
    command = [sys.executable, *program, "up", *([file] if file else [])]
    command += ["--root", root] if root else []
    with open(log_file, "ab") as log:
        begin = log.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    pidfd = os.pidfd_open(process.pid)
    try:
        _follow_until_ready(log_file, begin, pidfd)
    finally:
        os.close(pidfd)
    if process.poll() is not None:
        sys.exit(process.returncode or 1)


def _follow_until_ready(log_file: Path, begin: int, pidfd: int) -> None:
    import select

    with open(log_file, errors="replace") as log:
        log.seek(begin)
        ended = False
        while True:
            for line in log:
                click.echo(line.rstrip("\n"), err=True)
                if line.startswith(READY):
                    return
            if ended:
                return
            ended = bool(select.select([pidfd], [], [], 0.05)[0])
