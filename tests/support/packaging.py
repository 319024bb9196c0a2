"""A bare Debian around a package: a root of its own with dpkg, a shell and Python, and no network.

On other systems, as Fedora, it is without dpkg: a place for what needs no package.

Nothing of the machine's libraries for Python is in it, so that what runs there runs with what the
package carries. It is made of read-only mounts by bubblewrap and needs no right of root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = (
    "bash", "cat", "chmod", "cp", "dash", "date", "diff", "dirname", "dpkg", "dpkg-deb",
    "dpkg-divert", "dpkg-query", "dpkg-split", "env", "false", "find", "grep", "head", "id",
    "install", "ln", "ls", "mkdir", "mktemp", "mv", "readlink", "rm", "rmdir", "sed", "seq",
    "sh", "sha256sum", "sleep", "sort", "systemctl", "tar", "tee", "touch", "tr", "true", "uname",
    "wc", "xz",
)  # fmt: skip
# The interpreter that domains see, whatever its version.
PYTHON = os.path.basename(os.path.realpath("/usr/bin/python3"))
SYSTEM_PROGRAMS = ("ldconfig", "start-stop-daemon")
# What the package may depend on; these are taken to be installed as they are on this machine.
PRESENT = ("base-files", "python3", "libc6", "libgcc-s1", "libstdc++6", "libseccomp2")

# The other end of a call in a Qubes VM: notes how it was called and runs /srv/SERVICE.
CLIENT = """#!/bin/sh
printf '%s\\n' "$*" >> /srv/calls
[ "$1" = "--" ] && shift
[ -x "/srv/${2%%+*}" ] || exit 127
exec "/srv/${2%%+*}"
"""


# The resident form: a server, a call by the launcher, the server's end.
RESIDENT = """
sluice proxy serve & server=$!
for try in $(seq 1200); do [ -S /run/sluice-proxy/launcher.sock ] && break; sleep 0.05; done
export QREXEC_REMOTE_DOMAIN=work
printf 'one way' | LAUNCHER one-way+vault+inbox.Put
echo $?
kill $server
wait $server
"""


# Imports every module below a directory or in an archive, and prints those that cannot be.
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
from sluice.runtime import add_site_packages
add_site_packages()
try:
    import sluice_libraries
    sluice_libraries.install()
except ImportError:
    pass
import sluice
count = 0
for module in pkgutil.walk_packages(sluice.__path__, "sluice."):
    if module.name == "sluice.__main__":
        continue
    try:
        importlib.import_module(module.name)
        count += 1
    except ImportError as error:
        print(module.name, error.name)
print(count > 50)
"""


def reason_against(*, dpkg: bool = True) -> str | None:
    """Return why a bare Debian, with or without ``dpkg``, cannot be made here, or None."""
    if dpkg and not (shutil.which("dpkg-deb") and shutil.which("dpkg")):
        return "dpkg is not installed: this machine cannot build or install Debian packages"
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    return None


def _libraries() -> Path:
    return Path("/usr/lib") / (sysconfig.get_config_var("MULTIARCH") or "none")


class BareDebian:
    """A root directory; ``run`` runs something in it as its root."""

    def __init__(self) -> None:
        """Lay it out."""
        self.root = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
        for name in ("dpkg/info", "dpkg/updates", "dpkg/triggers"):
            (self.root / "var/lib" / name).mkdir(parents=True)
        (self.root / "var/lib/dpkg/status").write_text(_status())
        # What belongs to every Debian is nobody else's to remove.
        (self.root / "var/lib/dpkg/info/base-files.list").write_text(
            "/.\n/bin\n/etc\n/lib\n/lib64\n/run\n/sbin\n/tmp\n/usr\n/usr/bin\n/usr/lib\n/var\n"
            "/var/log\n"
        )
        for name in ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "etc", "srv", "tmp", "root",
                     "run", "var/log"):  # fmt: skip
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.root / name).symlink_to(f"usr/{name}")
        (self.root / "usr/bin/python3").symlink_to(PYTHON)
        (self.root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        self.script("usr/bin/qrexec-client-vm", CLIENT)
        self.run("true")

    def script(self, name: str, text: str) -> None:
        """Write an executable file."""
        path = self.root / name
        path.write_text(text)
        path.chmod(0o755)

    def run(
        self,
        *command: str,
        data: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = "/root",
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command and return what came of it."""
        environment = {
            "PATH": "/usr/local/bin:/usr/sbin:/usr/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
        }
        environment.update(env or {})
        options = ["--bind", str(self.root), "/"]
        for name in (*PROGRAMS, PYTHON):
            if os.path.exists(f"/usr/bin/{name}"):
                options += ["--ro-bind", os.path.realpath(f"/usr/bin/{name}"), f"/usr/bin/{name}"]
        for name in SYSTEM_PROGRAMS:
            if found := shutil.which(name, path="/usr/sbin:/sbin"):
                options += ["--ro-bind", os.path.realpath(found), f"/usr/sbin/{name}"]
        for directory in (f"/usr/lib/{PYTHON}", str(_libraries()), "/usr/lib64"):
            if os.path.isdir(directory):
                options += ["--ro-bind", directory, directory]
        # Libraries of C are looked for by name there.
        options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
        options += ["--dev", "/dev", "--proc", "/proc", "--chdir", cwd, "--clearenv"]
        for key, value in environment.items():
            options += ["--setenv", key, value]
        return subprocess.run(
            ["bwrap", "--unshare-all", "--uid", "0", "--gid", "0", "--die-with-parent",
             "--new-session", *options, "--", *command],
            input=data, capture_output=True, timeout=200, check=False,
        )  # fmt: skip

    def check(self, *command: str, data: bytes = b"") -> bytes:
        """Run a command that must succeed, and return what it printed."""
        done = self.run(*command, data=data)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def resident(self, launcher: str) -> str:
        """Serve, make a call through the launcher, and return its exit code as it is printed."""
        return self.check("sh", "-c", RESIDENT.replace("LAUNCHER", launcher)).decode().strip()

    def contents(self) -> set[str]:
        """Return every path, without dpkg's own records and what the stand-ins wrote."""
        found = set()
        for directory, below, names in os.walk(self.root):
            for name in (*below, *names):
                found.add(str(Path(directory, name).relative_to(self.root)))
        ours = ("var/lib/dpkg", "srv/", "tmp/", "dev", "proc")
        return {name for name in found if not name.startswith(ours)}

    def remove(self) -> None:
        """Take it away."""
        shutil.rmtree(self.root, ignore_errors=True)


def _status() -> str:
    text = ""
    for name in PRESENT if shutil.which("dpkg-query") else ():
        done = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Version} ${Architecture}", name],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            version, architecture = done.stdout.split()[:2]
            text += (
                f"Package: {name}\nStatus: install ok installed\nMaintainer: x <x@x.x>\n"
                f"Architecture: {architecture}\nVersion: {version}\nDescription: x\n\n"
            )
    return text
