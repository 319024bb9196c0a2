"""The places of one system: configuration, state, sockets.

An ordinary user has them where the XDG base directories say, the system service below ``/etc``,
``/var/lib`` and ``/run``; ``--root DIR`` puts all three below one directory, so that several
systems live side by side.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sluice.errors import LocalError

# sun_path has 108 bytes with the final NUL; the longest name in a directory of ours is
# "qrexec." and a domain's name of 31.
_LONGEST_SOCKET = 107
_LONGEST_NAME = len("daemon/qrexec.") + 31

# In the runtime and in the state directory: locked by the one AdminVM that uses them.
LOCK = "lock"


@dataclass(frozen=True)
class Paths:
    """Every place a system uses. Names of domains are valid before they come here."""

    config: Path
    state: Path
    runtime: Path

    @classmethod
    def find(cls, root: str | None = None, environ: Mapping[str, str] | None = None) -> Paths:
        """Work out the places for ``--root DIR``, for root, or for an ordinary user."""
        env = os.environ if environ is None else environ
        if root is not None:
            base = Path(os.path.abspath(root))
            return cls(base / "config", base / "state", base / "run")
        if os.geteuid() == 0:
            return cls(Path("/etc/sluice"), Path("/var/lib/sluice"), Path("/run/sluice"))
        home = Path(env.get("HOME") or os.path.expanduser("~"))
        config = _xdg(env, "XDG_CONFIG_HOME", home / ".config") / "sluice"
        state = _xdg(env, "XDG_STATE_HOME", home / ".local/state") / "sluice"
        runtime = env.get("XDG_RUNTIME_DIR", "")
        # Without a runtime directory (a service account, a session of su) the state directory is
        # as private; sockets left behind there are removed at the next start.
        return cls(config, state, Path(runtime) / "sluice" if runtime[:1] == "/" else state / "run")

    # --- configuration, written by people, read by us
    @property
    def system_file(self) -> Path:
        """The file that describes the system's domains."""
        return self.config / "system.toml"

    @property
    def policy_directories(self) -> tuple[Path, ...]:
        """Where policy files are read from, first one wins for equal names."""
        return (self.runtime / "policy.d", self.config / "policy.d")

    @property
    def rpc(self) -> tuple[Path, ...]:
        """The AdminVM's own services; never the host's /etc/qubes-rpc (12.4.1)."""
        return (self.runtime / "rpc", self.config / "rpc")

    @property
    def rpc_config(self) -> tuple[Path, ...]:
        """The configuration of the AdminVM's own services."""
        return (self.runtime / "rpc-config", self.config / "rpc-config")

    def template(self, name: str) -> Path:
        """What the system adds to a template: ``etc/qubes-rpc`` and the like below it."""
        return self.config / "template" / name

    # --- state, kept
    @property
    def store(self) -> Path:
        """The database that keeps identities (uuid, qid)."""
        return self.state / "store.sqlite"

    @property
    def appvms(self) -> Path:
        """Where each domain's private tree lies (core-stack.md 12.3)."""
        return self.state / "appvms"

    @property
    def log(self) -> Path:
        """The directory of the logs."""
        return self.state / "log"

    @property
    def audit_file(self) -> Path:
        """The audit log: one JSON line a call."""
        return self.log / "audit.jsonl"

    @property
    def domain_log_file(self) -> Path:
        """What the domains themselves log: one JSON line a line of theirs, escaped."""
        return self.log / "domains.jsonl"

    # --- run time, gone after the end
    @property
    def control_socket(self) -> Path:
        """The AdminVM's socket for the ``sluice`` command."""
        return self.runtime / "control.sock"

    @property
    def lock_file(self) -> Path:
        """Locked by the one AdminVM of this system as long as it lives."""
        return self.runtime / LOCK

    @property
    def daemon_dir(self) -> Path:
        """Where the sockets ``qrexec.NAME`` for dom0's ``qrexec-client`` are."""
        return self.runtime / "daemon"

    @property
    def domains(self) -> Path:
        """The run directories of the domains."""
        return self.runtime / "domains"

    def create(self) -> None:
        """Make the directories, mode 0700 from the beginning, and refuse those of somebody else.

        Raises LocalError where a directory belongs to another user or is a link, or where the
        paths of the sockets would be too long for the kernel.
        """
        if len(os.fsencode(self.runtime)) + 1 + _LONGEST_NAME > _LONGEST_SOCKET:
            raise LocalError(
                f"{self.runtime}: too long for the sockets below it; use a shorter directory"
            )
        for top in (self.config, self.state, self.runtime):
            top.parent.mkdir(parents=True, exist_ok=True)
        for directory in (
            self.state,
            self.runtime,
            self.appvms,
            self.log,
            self.daemon_dir,
            self.domains,
            self.policy_directories[0],
            self.rpc[0],
            self.rpc_config[0],
        ):
            make_private(directory)


def _xdg(env: Mapping[str, str], name: str, default: Path) -> Path:
    # The base directory specification: a relative path is to be ignored.
    value = env.get(name, "")
    return Path(value) if value.startswith("/") else default


def make_private(directory: Path) -> None:
    """Make one directory with mode 0700, or check that it is ours and nobody else may write."""
    try:
        os.mkdir(directory, 0o700)
        return
    except FileExistsError:
        pass
    found = os.lstat(directory)
    if not stat.S_ISDIR(found.st_mode):
        raise LocalError(f"{directory}: is not a directory")
    if found.st_uid != os.geteuid():
        raise LocalError(f"{directory}: belongs to uid {found.st_uid}, not to us")
    if found.st_mode & 0o077:
        os.chmod(directory, 0o700)
