"""Where the proxy looks for its configuration and keeps its state (docs/spec/proxy.md 3)."""

from __future__ import annotations

import os

from sluice.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# In a Qubes VM and in a Sluice domain /rw survives a restart and /etc does not.
SYSTEM_DIRECTORIES = ("/rw/config/sluice", "/etc/sluice")


def configuration_files(path: str | None = None, env: Mapping[str, str] | None = None) -> list[str]:
    """Return the files to read, in order.

    ``path``, else SLUICE_PROXY_CONFIG, names a file or a directory; else the first of the user's
    and the system's directories that has a configuration. Raises ConfigError where there is none.
    """
    env = os.environ if env is None else env
    path = path or env.get("SLUICE_PROXY_CONFIG")
    if path:
        if os.path.isdir(path):
            found = _in_directory(path)
            if not found:
                raise ConfigError("has no proxy.toml, proxy.d/*.toml or config.json", file=path)
            return found
        return [path]
    for directory in _directories(env):
        found = _in_directory(directory)
        if found:
            return found
    raise ConfigError(
        "there is no configuration",
        suggestion="write /etc/sluice/proxy.toml or set SLUICE_PROXY_CONFIG",
    )


def old_installation(program: str) -> str | None:
    """Return the directory of an installation of the earlier proxy that ``program`` stands for.

    Its program was a link to a file beside a directory ``plugins`` with its ``config.json``. Where
    that file was replaced by a link to ours, the old configuration goes on to be used.
    """
    for _ in range(8):
        directory = os.path.dirname(os.path.abspath(program))
        for name in ("plugins/config.json", "config.json"):
            if os.path.isdir(f"{directory}/plugins") and os.path.isfile(f"{directory}/{name}"):
                return directory
        try:
            program = os.path.join(directory, os.readlink(program))
        except OSError:
            return None
    return None


def _directories(env: Mapping[str, str]) -> list[str]:
    home = env.get("XDG_CONFIG_HOME") or (env.get("HOME", "") + "/.config")
    user = [home + "/sluice"] if home.startswith("/") and len(home) > len("/.config") else []
    return [*user, *SYSTEM_DIRECTORIES]


def _in_directory(directory: str) -> list[str]:
    found = []
    if os.path.isfile(f"{directory}/proxy.toml"):
        found.append(f"{directory}/proxy.toml")
    try:
        entries = sorted(os.listdir(os.fsencode(f"{directory}/proxy.d")))
    except OSError:
        entries = []
    found += [
        f"{directory}/proxy.d/{os.fsdecode(entry)}" for entry in entries if entry.endswith(b".toml")
    ]
    if not found:
        # The earlier proxy kept it beside its plugins, or among them.
        for name in ("config.json", "plugins/config.json"):
            if os.path.isfile(f"{directory}/{name}"):
                return [f"{directory}/{name}"]
    return found


def state_directory(configured: str, env: Mapping[str, str] | None = None) -> str:
    """Return the directory for what must outlive a call (counts); it may not exist yet."""
    env = os.environ if env is None else env
    if configured:
        return configured
    if env.get("XDG_STATE_HOME"):
        return env["XDG_STATE_HOME"] + "/sluice/proxy"
    if os.path.isdir("/rw/config") and os.access("/rw/config", os.W_OK):
        return "/rw/config/sluice/state"
    if os.geteuid() == 0:
        return "/var/lib/sluice/proxy"
    return env.get("HOME", "/nonexistent") + "/.local/state/sluice/proxy"


def audit_file(configured: str, env: Mapping[str, str] | None = None) -> str | None:
    """Return where audit records go: as configured, the system's place, or the user's.

    Who names a place for state (XDG_STATE_HOME) means these records too.
    """
    env = os.environ if env is None else env
    if configured:
        return None if configured == "none" else configured
    if not env.get("XDG_STATE_HOME"):
        for directory in ("/rw/log/sluice", "/var/log/sluice"):
            if os.path.isdir(directory) and os.access(directory, os.W_OK):
                return directory + "/proxy.jsonl"
        if os.geteuid() == 0:
            return "/var/log/sluice/proxy.jsonl"
    return state_directory("", env) + "/proxy.jsonl"
