"""The configuration as the program form reads it: validated once, kept until something changes.

Reading TOML and validating it costs a program that starts for each call 25 ms; reading what was
kept of it costs less than one. It is kept below the user's runtime directory, is written by us and
readable by nobody else, and holds marshalled plain values: it is used only if it is a regular file
of our own user that nobody else can write, and if every file that went into it is still the same.
What is found in it cannot be trusted more than that directory, which is ours alone.
"""

from __future__ import annotations

import marshal
import os
import sys

from sluice.proxy.model import ChainConfig, Configuration, ProxySettings
from sluice.proxy.options import with_values
from sluice.proxy.paths import configuration_files
from sluice.proxy.stage import FilterUse
from sluice.runtime import add_site_packages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# Raised whenever what is kept means something else than before.
FORMAT = 1
_MAX = 4 << 20
_MOST_KEPT = 32
_CHAIN_FIELDS = (
    "description",
    "services",
    "targets",
    "sources",
    "require_exit_code",
    "on_closed_reader",
    "file",
    "line",
    "imported",
)


def load_fast(
    path: str | None = None,
    *,
    cache: str | None = None,
    on_compile: Callable[[str], None] | None = None,
) -> Configuration:
    """Return the configuration as ``configuration.load`` does, from what was kept if it can be.

    ``cache`` is the directory where it is kept; ``on_compile`` is told when it had to be read.
    Raises ConfigError.
    """
    files = configuration_files(path)
    directory = cache or cache_directory()
    kept_in = f"{directory}/{_name(files)}" if directory else None
    stamps = _stamps(files)
    if kept_in is not None and stamps is not None:
        kept = _read(kept_in)
        if kept is not None and _still(kept, files, stamps):
            try:
                return _restore(kept, files)
            except (KeyError, TypeError, ValueError, AttributeError, ImportError):
                # Kept by another version of us.
                pass
    if on_compile is not None:
        on_compile(kept_in or "")
    add_site_packages()
    from sluice.proxy.configuration import load

    configuration = load(path)
    if kept_in is not None and stamps is not None:
        _keep(kept_in, configuration, files, stamps)
    return configuration


def cache_directory() -> str | None:
    """Return a directory that only this user can write; None where there is none."""
    uid = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR") or ("/run" if uid == 0 else f"/run/user/{uid}")
    for base in (runtime, "/tmp"):  # noqa: S108
        path = f"{base}/sluice-proxy" if base != "/tmp" else f"/tmp/sluice-proxy-{uid}"  # noqa: S108
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        except OSError:
            continue
        status = os.lstat(path)
        if status.st_uid == uid and status.st_mode & 0o170077 == 0o040000:
            return path
    return None


def _name(files: list[str]) -> str:
    """Return a file name for a set of files: what identifies it is checked again inside."""
    text = "\0".join(files).encode("utf-8", "surrogateescape")
    value = 0xCBF29CE484222325
    for byte in text:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}.config"


def _stamps(files: list[str]) -> list[tuple[int, ...]] | None:
    stamps: list[tuple[int, ...]] = []
    for file in (*files, __file__):
        try:
            status = _stat(file)
        except OSError:
            return None
        stamps.append(
            (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        )
    return stamps


def _stat(file: str) -> os.stat_result:
    """Return the status of a file, or of the archive that it is in: the proxy as a single file."""
    while True:
        try:
            return os.stat(file)
        except NotADirectoryError:
            file = os.path.dirname(file)


def _read(path: str) -> dict[str, Any] | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        ours = status.st_uid == os.geteuid() and status.st_mode & 0o170022 == 0o100000
        if not ours or status.st_size > _MAX:
            return None
        kept = marshal.loads(os.read(fd, _MAX))  # noqa: S302
    except (OSError, EOFError, ValueError, TypeError):
        return None
    finally:
        os.close(fd)
    return kept if isinstance(kept, dict) else None


def _still(kept: dict[str, Any], files: list[str], stamps: list[tuple[int, ...]]) -> bool:
    """Tell whether what is kept was made of these files as they are now, by this interpreter."""
    if kept.get("format") != FORMAT or kept.get("python") != sys.hexversion:
        return False
    if kept.get("files") != files or kept.get("stamps") != stamps:
        return False
    return kept.get("modules") == _stamps(kept.get("module_files", []))


def _keep(
    path: str, configuration: Configuration, files: list[str], stamps: list[tuple[int, ...]]
) -> None:
    chains = []
    modules: set[str] = set()
    for chain in configuration.chains.values():
        if chain.legacy is not None:
            return
        uses = []
        for use in chain.uses:
            module = sys.modules[use.cls.__module__]
            if not module.__name__.startswith("sluice.proxy.filters."):
                # It must be checked when it is loaded, which takes the large machinery.
                return
            modules.add(module.__file__ or "")
            uses.append((module.__name__, use.cls.__name__, use.name, use.values))
        chains.append((chain.name, uses, {field: getattr(chain, field) for field in _CHAIN_FIELDS}))
    kept = {
        "format": FORMAT,
        "python": sys.hexversion,
        "files": files,
        "stamps": stamps,
        "module_files": sorted(modules),
        "modules": _stamps(sorted(modules)),
        "settings": vars(configuration.settings),
        "chains": chains,
    }
    temporary = f"{path}.{os.getpid()}"
    try:
        raw = marshal.dumps(kept)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, raw)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        _prune(os.path.dirname(path), path)
    except (OSError, ValueError):
        # It will be tried again by the next call; this one has what it needs.
        pass


def _prune(directory: str, but: str) -> None:
    """Begin anew where many configurations were kept: nobody has so many at a time."""
    names = os.listdir(directory)
    if len(names) > _MOST_KEPT:
        for name in names:
            path = f"{directory}/{name}"
            if name.endswith(".config") and path != but:
                os.unlink(path)


class _Uses:
    """The filters of a chain, whose modules are loaded only if the chain is used."""

    def __init__(self, kept: list[tuple[str, str, str, dict[str, Any]]]) -> None:
        self._kept = kept
        self._made: list[FilterUse] | None = None

    def __iter__(self) -> Any:
        return iter(self._uses())

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, place: int) -> FilterUse:
        return self._uses()[place]

    def _uses(self) -> list[FilterUse]:
        if self._made is None:
            # Some filters use libraries; who starts us as a small program has none on the path.
            add_site_packages()
            self._made = [self._use(*kept) for kept in self._kept]
        return self._made

    @staticmethod
    def _use(module: str, cls: str, name: str, values: dict[str, Any]) -> FilterUse:
        found = getattr(__import__(module, fromlist=[cls]), cls)
        use = FilterUse(found, with_values(found.Options, values), name)
        use.values = values
        return use


def _restore(kept: dict[str, Any], files: list[str]) -> Configuration:
    settings = with_values(ProxySettings, kept["settings"])
    chains = {}
    for name, uses, fields in kept["chains"]:
        lazily: Any = _Uses(uses)
        chains[name] = ChainConfig(name, lazily, **fields)
    return Configuration(settings, chains, files)
