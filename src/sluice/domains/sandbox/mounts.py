"""What a domain sees of the file system, as arguments for bubblewrap.

Theory. The plan is carried out with our own eyes, before anything of the domain runs. Nothing is
ever mounted on, or opened through, a path that the domain could have written. The root, /usr, /etc
and /dev are put together from pieces and then made read-only.

/usr/lib is the special case: the host's is read-only and may lack ``sluice`` and ``qubes``, so the
host's directory appears as /usr/host-lib and /usr/lib holds a link for each of its entries. It has
the same depth, so that relative links inside it still lead where they did.
docs/spec/core-stack.md 12.4 step 5, 12.4.1.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from sluice import runtime
from sluice.domains.model import DomainConfig
from sluice.domains.sandbox import etc
from sluice.errors import LocalError

MIB = 1 << 20
RUN_SIZE = 16 * MIB
SHM_SIZE = 64 * MIB
VAR_SIZE = 64 * MIB
TMP_SIZE = 256 * MIB
# What the package itself brings for domains: directory below /etc -> directory of the package.
_BROUGHT = {"qubes-rpc": "rpc", "qubes/rpc-config": "rpc-config"}
MAX_ENTRIES = 4096  # of a directory that is put together entry by entry

MAX_CONTENT = 1 << 20  # bytes of one such entry


@dataclass
class Plan:
    """Arguments for bubblewrap, and the descriptors they name, to be kept until it has started."""

    arguments: list[str] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def add(self, *arguments: str) -> None:
        """Append arguments as they are."""
        self.arguments += arguments

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Make a directory."""
        self.add("--perms", f"{mode:04o}", "--dir", path)

    def tmpfs(self, path: str, size: int, mode: int = 0o755) -> None:
        """Put an empty file system in memory of at most ``size`` bytes on ``path``."""
        self.add("--size", str(size), "--perms", f"{mode:04o}", "--tmpfs", path)

    def memory(self, content: bytes) -> int:
        """Return a descriptor from which ``content`` can be read once."""
        descriptor = os.memfd_create("sluice", os.MFD_CLOEXEC)
        self.descriptors.append(descriptor)
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Make a small file that anybody may read."""
        self.add("--perms", f"{mode:04o}", "--file", str(self.memory(content)), path)

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()


def build(
    plan: Plan, domain: DomainConfig, *, has_root: bool, private: Path, template: Path, usr: Path
) -> None:
    """Add the whole file system of ``domain`` to ``plan``.

    ``private`` is the directory of the domain's own trees, ``template`` that of what the system
    adds to the template, ``usr`` the template's /usr. Raises LocalError or OSError.
    """
    _usr(plan, usr)
    _etc(plan, domain, has_root, template)
    # The agent serves the system log; /dev itself stays read-only.
    plan.add("--proc", "/proc", "--dev", "/dev")
    plan.add("--symlink", "/run/qubes/log", "/dev/log", "--remount-ro", "/dev")
    # Keys belong to user ids, not to namespaces: with one id these would list the user's own.
    for path in ("/proc/keys", "/proc/key-users"):
        if os.path.exists(path):
            plan.add("--perms", "0444", "--ro-bind-data", str(plan.memory(b"")), path)
    # These are not the domain's root's but ours, who set them up; so anybody may write in them.
    # Process 1 makes what must be root's in them before anything else runs.
    plan.tmpfs("/dev/shm", SHM_SIZE, 0o1777)  # noqa: S108
    plan.tmpfs("/tmp", TMP_SIZE, 0o1777)  # noqa: S108
    plan.tmpfs("/run", RUN_SIZE, 0o1777)
    _var(plan)
    plan.add("--symlink", "/rw/root", "/root")
    for name, path in (("rw", "/rw"), ("home", "/home"), ("usrlocal", "/usr/local")):
        plan.add("--bind", str(private / name), path)
    for path in ("/mnt", "/media", "/srv", "/opt"):
        plan.directory(path)
    plan.add("--remount-ro", "/")


def _usr(plan: Plan, usr: Path) -> None:
    plan.directory("/usr")
    for name in _entries(usr):
        if name == "lib":
            plan.add("--ro-bind", str(usr / "lib"), "/usr/host-lib")
        elif name not in ("local", "host-lib"):
            _show(plan, str(usr / name), f"/usr/{name}")
    plan.directory("/usr/lib")
    for name in _entries(usr / "lib"):
        if name not in ("sluice", "qubes"):
            plan.add("--symlink", f"../host-lib/{name}", f"/usr/lib/{name}")
    plan.directory("/usr/local")
    _sluice(plan)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        _show(plan, f"/{name}", f"/{name}")


def _show(plan: Plan, source: str, path: str) -> None:
    """Bind one entry of the template read-only; a link stays the link it is."""
    try:
        found = os.lstat(source)
    except FileNotFoundError:
        return
    if stat.S_ISLNK(found.st_mode):
        plan.add("--symlink", os.readlink(source), path)
    elif stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode):
        plan.add("--ro-bind-try", source, path)


def _sluice(plan: Plan) -> None:
    """Show ourselves: the package, its libraries, its programs under the names of old."""
    plan.directory("/usr/lib/qubes")
    plan.directory(runtime.INSIDE)
    plan.add("--ro-bind", runtime.package_directory(), runtime.INSIDE_PACKAGE)
    site = runtime.site_packages()
    if site is not None:
        plan.add("--ro-bind", site, runtime.INSIDE_SITE)
    plan.add("--symlink", "sluice/bin", runtime.INSIDE_BIN)
    for name in ("qrexec-client-vm", "qrexec_client_vm"):
        plan.add("--symlink", f"{runtime.INSIDE_BIN}/qrexec-client-vm", f"/usr/lib/qubes/{name}")
    plan.add("--symlink", f"{runtime.INSIDE_BIN}/qrexec-agent", "/usr/lib/qubes/qrexec-agent")


def closed_to_others() -> str | None:
    """Return that directory of ours, package or libraries, which others may not read, or None.

    To a domain with ids of its own they are somebody else's. What lies above them does not matter,
    for they are mounted.
    """
    package, site = runtime.package_directory(), runtime.site_packages()
    first = runtime.launcher("sluice-domain-init")
    for directory, path in ((package, package), (package, first), (site, site)):
        if path is not None and not os.stat(path).st_mode & stat.S_IROTH:
            return directory
    return None


def _var(plan: Plan) -> None:
    plan.tmpfs("/var", VAR_SIZE)
    for name in ("lib", "cache", "log", "spool"):
        plan.directory(f"/var/{name}", 0o1777)
    plan.directory("/var/tmp", 0o1777)  # noqa: S108
    plan.add("--symlink", "/run", "/var/run", "--symlink", "/run/lock", "/var/lock")


def _etc(plan: Plan, domain: DomainConfig, has_root: bool, template: Path) -> None:
    plan.directory("/etc")
    for name in etc.ALLOWED:
        added = template / "etc" / name
        source = str(added) if os.path.lexists(added) else f"/etc/{name}"
        if not os.path.exists(source):
            continue
        for parent in reversed(Path(name).parents[:-1]):
            plan.directory(f"/etc/{parent}")
        _show_etc(plan, source, name)
    plan.directory("/etc/qubes")
    for name in etc.MERGED:
        plan.directory(f"/etc/{name}")
        _merge(plan, name, [*sources(name, template), Path("/etc") / name])
    for name, content in etc.generated(domain, has_root=has_root).items():
        plan.file(f"/etc/{name}", content.encode())


def _show_etc(plan: Plan, source: str, name: str) -> None:
    try:
        found = os.stat(source)
    except OSError:
        return
    if not stat.S_ISLNK(os.lstat(source).st_mode):
        _show(plan, source, f"/etc/{name}")
    elif os.readlink(source).startswith("/usr/"):  # localtime
        plan.add("--symlink", os.readlink(source), f"/etc/{name}")
    elif stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode):
        plan.add("--ro-bind-try", os.path.realpath(source), f"/etc/{name}")


def sources(name: str, template: Path) -> list[Path]:
    """Return the directories that give entries to /etc/``name``, but for the template's own.

    These are what the system adds to the template, and what the package brings itself: its
    directories ``rpc`` and ``rpc-config``.
    """
    candidates = [template / "etc" / name]
    if name in _BROUGHT:
        candidates.append(Path(runtime.package_directory()) / _BROUGHT[name])
    return [candidate for candidate in candidates if candidate.is_dir()]


def _merge(plan: Plan, name: str, sources: list[Path]) -> None:
    """Put a directory together from the entries of several; the first that has a name wins."""
    seen = set()
    for source in sources:
        for entry in _entries(source):
            if entry in seen:
                continue
            seen.add(entry)
            path = str(source / entry)
            try:
                found = os.lstat(path)
            except OSError:
                continue
            if path.startswith(runtime.package_directory() + "/"):
                inside = f"{runtime.INSIDE_PACKAGE}/{_BROUGHT[name]}/{entry}"
                plan.add("--symlink", inside, f"/etc/{name}/{entry}")
            elif stat.S_ISLNK(found.st_mode):
                plan.add("--symlink", os.readlink(path), f"/etc/{name}/{entry}")
            elif stat.S_ISREG(found.st_mode):
                mode = 0o755 if found.st_mode & 0o111 else 0o644
                plan.file(f"/etc/{name}/{entry}", _content(path), mode)


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_CONTENT + 1)
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from error
    if len(content) > MAX_CONTENT:
        raise LocalError(f"{path}: is over {MAX_CONTENT >> 20} MiB")
    return content


def _entries(directory: Path) -> list[str]:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    if len(names) > MAX_ENTRIES:
        raise LocalError(f"{directory}: has more than {MAX_ENTRIES} entries")
    return names
