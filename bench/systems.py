"""Systems of sandboxed domains for benchmarks: laid in a temporary folder, started, taken away."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sluice.adminvm.system import AdminVM
from sluice.cli.up import prepared
from sluice.domains.paths import Paths


def lay(
    root: Path,
    toml: str,
    policy: str,
    files: Mapping[str, str],
    services: Mapping[str, str] | None = None,
) -> None:
    """Write the configuration of a system below ``root``.

    ``files`` lie beside the system file, by name; those that begin with ``#!`` may be executed, and
    ``true`` is always there, a copy of /bin/true. ``services`` are links in /etc/qubes-rpc of each
    domain, name to target.
    """
    config = root / "config"
    (config / "policy.d").mkdir(parents=True)
    (config / "system.toml").write_text(toml)
    (config / "policy.d" / "30-bench.policy").write_text(policy)
    for name, text in files.items():
        (config / name).write_text(text)
        (config / name).chmod(0o755 if text.startswith("#!") else 0o644)
    shutil.copy("/bin/true", config / "true")
    (config / "true").chmod(0o755)
    links = config / "template" / "host" / "etc" / "qubes-rpc"
    links.mkdir(parents=True)
    for name, target in (services or {}).items():
        (links / name).symlink_to(target)


@contextlib.asynccontextmanager
async def running(
    toml: str,
    policy: str,
    files: Mapping[str, str],
    services: Mapping[str, str] | None = None,
) -> AsyncIterator[AdminVM]:
    """Have a system running in this process; the arguments are those of ``lay``."""
    root = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    root.chmod(0o755)
    try:
        lay(root, toml, policy, files, services)
        paths = Paths.find(str(root))
        with prepared(paths, paths.system_file) as adminvm:
            await adminvm.start()
            try:
                yield adminvm
            finally:
                await adminvm.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)
