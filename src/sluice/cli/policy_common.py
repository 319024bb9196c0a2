"""What the policy tools share: where rules and domains come from, and how errors are shown."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sluice.errors import LocalError, PolicyError
from sluice.policy.evaluation import Policy
from sluice.policy.files import DiskFiles
from sluice.policy.loader import DIRECTORIES, LEGACY_DIRECTORY, Loader
from sluice.policy.problems import PolicyProblem, visible
from sluice.policy.system_info import GET_SYSTEM_INFO, SystemInfo
from sluice.wire.names import escape

if TYPE_CHECKING:
    from sluice.domains.paths import Paths

QUBESD = "/var/run/qubesd.internal.sock"
NO_LEGACY = "-"

Command = TypeVar("Command", bound=Callable[..., Any])


class ToolFiles(DiskFiles):
    """The disk; the legacy directory ``-`` is an empty one."""

    def entries(self, directory: str) -> list[str]:
        """Return the names in a directory."""
        return [] if directory == NO_LEGACY else super().entries(directory)


@dataclass(frozen=True)
class Place:
    """Where a tool reads its rules and domains from."""

    directories: tuple[str, ...]
    legacy: str
    system_info: str | None
    root: str | None

    def load(
        self,
        report: Callable[[PolicyError], None] | None = None,
        directories: tuple[str, ...] | None = None,
    ) -> Policy:
        """Read the policy. Raises the first PolicyError, unless each is to be reported."""
        files = ToolFiles()
        chosen = self.directories if directories is None else directories
        loader = Loader(files, chosen, legacy_directory=self.legacy, report=report)
        loaded = loader.load()
        return Policy(loaded.rules, loaded.warnings)

    def info(self) -> SystemInfo:
        """Return the domains. Raises LocalError where there is nothing to learn them from."""
        found = self.info_if_known()
        if found is None:
            raise LocalError(
                "no domains are known here: no system of Sluice, no qubesd "
                "(give --system-info FILE or --root DIR)"
            )
        return found

    def info_if_known(self) -> SystemInfo | None:
        """Return the domains: of the file given, of the system, of qubesd; else None."""
        if self.system_info is not None:
            return read_system_info(self.system_info)
        from sluice.cli.common import places

        paths = places(self.root)
        if paths.system_file.exists():
            return _of_system(paths)
        if os.path.exists(QUBESD):
            return _of_qubesd()
        return None


def say(text: str, *, err: bool = False) -> None:
    """Print lines of text; what a terminal must not see is escaped."""
    click.echo(visible(text), err=err)


def read_system_info(path: str) -> SystemInfo:
    """Read the JSON of ``internal.GetSystemInfo`` from a file; ``-`` is standard input."""
    import json

    try:
        with click.open_file(path, "rb") as stream:
            return SystemInfo.from_json(json.load(stream))
    except ValueError as error:
        raise LocalError(f"{path}: not JSON: {error}") from None


def _of_system(paths: Paths) -> SystemInfo:
    from sluice.cli.ls import describe
    from sluice.domains.store import Store
    from sluice.domains.system_file import load

    # A question must not leave anything behind: identities that were never made stay unmade.
    with Store(paths.store if paths.store.exists() else ":memory:") as store:
        registry = load(paths.system_file).registry(store)
    try:
        running = {str(d["name"]) for d in describe(paths) if d.get("state") == "Running"}
    except LocalError:
        running = set()
    return registry.system_info(running)


def _of_qubesd() -> SystemInfo:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)
        sock.connect(QUBESD)
        sock.sendall(GET_SYSTEM_INFO)
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as stream:
            return SystemInfo.from_reply(stream.read())


def place_options(command: Command) -> Command:
    """Add the options that say where rules and domains come from; the command gets a ``Place``."""
    options = (
        click.option(
            "--policy-dir",
            "policy_dirs",
            multiple=True,
            metavar="DIR",
            help="Read rules from DIR (repeatable; the first one wins for equal names).",
        ),
        click.option("--legacy-dir", metavar="DIR", help="What !compat-4.0 reads; - for nothing."),
        click.option(
            "--system-info",
            metavar="FILE",
            help="Take the domains from FILE (JSON of internal.GetSystemInfo).",
        ),
        click.option("--root", metavar="DIR", envvar="SLUICE_ROOT", help="The system below DIR."),
    )

    @functools.wraps(command)
    def wrapper(
        *args: Any,
        policy_dirs: tuple[str, ...],
        legacy_dir: str | None,
        system_info: str | None,
        root: str | None,
        **kwargs: Any,
    ) -> Any:
        directories, legacy = _default_place(root)
        if policy_dirs:
            directories = policy_dirs
            legacy = LEGACY_DIRECTORY if os.path.isdir(LEGACY_DIRECTORY) else NO_LEGACY
        place = Place(directories, legacy_dir or legacy, system_info, root)
        return command(*args, place=place, **kwargs)

    result: Any = wrapper
    for option in reversed(options):
        result = option(result)
    return result  # type: ignore[no-any-return]


def _default_place(root: str | None) -> tuple[tuple[str, ...], str]:
    """Return the policy directories and the legacy one: of the system, else those of Qubes."""
    from sluice.cli.common import places

    paths = places(root)
    if root is not None or paths.system_file.exists() or os.path.isdir(paths.config / "policy.d"):
        directories = [os.fspath(directory) for directory in paths.policy_directories]
        # Made at start: a system that is not running has no runtime directory.
        found = tuple(d for d in directories if os.path.isdir(d)) or (directories[-1],)
        return found, os.fspath(paths.config / "policy.legacy")
    return tuple(d for d in DIRECTORIES if os.path.isdir(d)) or DIRECTORIES, LEGACY_DIRECTORY


def show_error(error: PolicyError) -> None:
    """Print an error with the line, the mark below it and advice, on standard error."""
    from sluice.policy.hints import hint

    marked = error.marked() if isinstance(error, PolicyProblem) else ""
    say(f"sluice: {error}", err=True)
    for line in (*marked.splitlines(), hint(error)):
        if line:
            say(f"    {line}", err=True)


def tell_policy_errors(command: Command) -> Command:
    """End with the error's status; of a syntax error show the place as well."""
    from sluice.cli.common import tell_errors

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except PolicyError as error:
            show_error(error)
            sys.exit(error.exit_code)

    return tell_errors(wrapper)  # type: ignore[return-value]


def check_domain(info: SystemInfo, name: str) -> None:
    """Raise LocalError, with names that are alike, for a domain that does not exist."""
    from sluice.policy.hints import did_you_mean

    if name in info or name == "@adminvm" or (name[:8] == "@dispvm:" and name[8:] in info):
        return
    if name[:1] in ("@", "*"):
        raise LocalError(f"{escape(name)} is no single domain: give NAME, @adminvm or @dispvm:NAME")
    raise LocalError(f"there is no domain {escape(name)}{did_you_mean(name, info)}")
