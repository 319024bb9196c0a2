"""Systems in each of the three privilege models, and programs that run inside their domains.

``ranges`` needs root. ``subordinate`` and ``single`` run as ordinary users: as root we make such a
user for the test and remove it afterwards; otherwise we are one ourselves. What cannot be had on
this machine is skipped with the reason.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from sluice import runtime
from sluice.domains.sandbox import ids
from sluice.domains.sandbox.limits import label_of

MODES = ("ranges", "subordinate", "single")
REPOSITORY = Path(__file__).resolve().parent.parent.parent

# Put before every attempt: what comes of a system call or a function, as one word.
PRELUDE = """\
import ctypes, errno, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    ctypes.set_errno(0)
    if libc.syscall(ctypes.c_long(number), *words) == -1:
        return errno.errorcode[ctypes.get_errno()]
    return 'THROUGH'
def attempt(function, *arguments, **more):
    try:
        function(*arguments, **more)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return 'THROUGH'
"""


_made = itertools.count()


class Machine:
    """One system that runs in one mode; ``python`` and ``shell`` run inside a domain."""

    def __init__(self, mode: str, root: Path, user: str | None, settings: str) -> None:
        """Take the mode, a folder, the user to be (None: ourselves) and domains in TOML."""
        self.mode = mode
        self.root = root
        self.user = user
        self.uid = os.geteuid() if user is None else pwd.getpwnam(user).pw_uid
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = {
            "HOME": str(root / "user"),
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "LANG": "C.UTF-8",
        }

    # --- life ---------------------------------------------------------------------------------

    def prepare(self, policy: str, files: Mapping[str, str]) -> None:
        """Lay the configuration."""
        config = self.root / "config"
        (config / "policy.d").mkdir(parents=True)
        (config / "rpc").mkdir()
        (self.root / "user").mkdir()
        single = 'ids = "single"\n' if self.mode == "single" else ""
        (config / "system.toml").write_text(f"[system]\n{single}{self.settings}")
        (config / "policy.d" / "30-test.policy").write_text(policy)
        for name, text in files.items():
            (config / name).parent.mkdir(parents=True, exist_ok=True)
            (config / name).write_text(text)
            (config / name).chmod(0o755)
        if self.user is not None:
            entry = pwd.getpwnam(self.user)
            for where, _, names in os.walk(self.root):
                for name in (".", *names):
                    os.chown(Path(where) / name, entry.pw_uid, entry.pw_gid)

    def as_user(self, argv: list[str]) -> list[str]:
        """Return the command line that runs ``argv`` as the system's user."""
        if self.user is None:
            return argv
        become = ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--init-groups"]
        return [*become, "--inh-caps=-all", "--", *argv]

    def sluice(self, *words: str) -> list[str]:
        """Return the command line of ``sluice`` for this system."""
        return self.as_user([sys.executable, "-m", "sluice", "--root", str(self.root), *words])

    def up(self) -> None:
        """Start the system and wait until its domains run."""
        self.log = open(self.root / "log", "wb+")  # noqa: SIM115
        self.process = subprocess.Popen(
            self.sluice("up"),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=self.environment,
            cwd="/",
        )
        wait_for(lambda: "ready:" in self.said() or self.process.poll() is not None, 80)
        assert self.process.poll() is None, self.said()

    def said(self) -> str:
        """Return everything that the AdminVM has said."""
        return (self.root / "log").read_text("utf-8", "replace")

    def down(self) -> None:
        """End the system; its domains must go with it."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            finally:
                if self.process.poll() is None:
                    self.process.kill()
                    self.process.wait()
        self.log.close()

    # --- inside -------------------------------------------------------------------------------

    def command(self, text: str, domain: str = "work", user: str = "DEFAULT") -> list[str]:
        """Return the command line that runs a shell command in a domain."""
        client = [runtime.launcher("qrexec-client"), f"--socket-dir={self.root}/run/daemon"]
        return self.as_user([*client, "-d", domain, f"{user}:{text}"])

    def shell(
        self,
        text: str,
        domain: str = "work",
        user: str = "DEFAULT",
        *,
        input: bytes = b"",
        seconds: float = 60,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a shell command in a domain to its end."""
        return subprocess.run(
            self.command(text, domain, user),
            input=input,
            capture_output=True,
            timeout=seconds,
            env=self.environment,
            cwd="/",
            check=False,
        )

    def python(self, code: str, domain: str = "work", user: str = "DEFAULT") -> str:
        """Run Python in a domain, PRELUDE before it, and return what it printed."""
        text = f"/usr/bin/python3 -c {shlex.quote(PRELUDE + code)}"
        done = self.shell(text, domain, user)
        assert not done.stderr, done.stderr.decode()
        return done.stdout.decode().strip()

    def value(self, expression: str, domain: str = "work", user: str = "DEFAULT") -> str:
        """Evaluate one expression in a domain and return it as text."""
        return self.python(f"print({expression})", domain, user)

    def agent_pid(self, domain: str = "work") -> int:
        """Return the host's process id of a domain's agent."""
        from sluice.adminvm.api import request

        described = request(self.root / "run/control.sock", "list")
        return next(int(d["pid"]) for d in described if d["name"] == domain)


def wait_for(condition: object, seconds: float = 40.0) -> None:
    """Wait until ``condition()`` is true. Raises AssertionError when it does not become so."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def reachable_by_others() -> bool:
    """Tell whether an ordinary user can run this checkout."""
    path = Path(sys.executable)
    places = [*path.parents, *Path(runtime.package_directory()).parents]
    return all(place.stat().st_mode & 0o005 == 0o005 for place in places)


def of_the_user_database(*command: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command that changes it; others may hold its lock for a moment, again and again."""
    for _ in range(200):
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == 0:
            break
        time.sleep(0.1)
    return done


@contextlib.contextmanager
def some_user(mode: str) -> Iterator[str | None]:
    """Give a user for ``mode``: None for ourselves, or one made for the test. Skips."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    if os.geteuid() != 0:
        if mode == "ranges":
            pytest.skip("needs root")
        if mode == "subordinate" and ids.detect().mode != ids.SUBORDINATE:
            pytest.skip("we have no subordinate ids")
        yield None
        return
    if mode == "ranges":
        yield None
        return
    if mode == "subordinate" and shutil.which("newuidmap") is None:
        pytest.skip("newuidmap is not installed")
    if not reachable_by_others():
        pytest.skip("an ordinary user cannot reach this checkout")
    name = f"slt{mode[:2]}{os.getpid()}x{next(_made)}"  # a test may have a second system
    done = of_the_user_database("useradd", "-M", "-s", "/bin/sh", name)
    if done.returncode != 0:
        pytest.skip(f"no user can be made: {done.stderr.decode()}")
    try:
        if (
            mode == "subordinate"
            and ids.subordinate("/etc/subuid", pwd.getpwnam(name).pw_uid) is None
        ):
            pytest.skip("useradd gave no subordinate ids")
        yield name
    finally:
        of_the_user_database("userdel", name)


@contextlib.contextmanager
def machine(
    mode: str,
    settings: str,
    policy: str = "",
    files: Mapping[str, str] | None = None,
    kind: type[Machine] = Machine,
) -> Iterator[Machine]:
    """Have a system running in one mode; everything of it is gone afterwards."""
    with some_user(mode) as user:
        root = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
        root.chmod(0o755)
        made = kind(mode, root, user, settings)
        try:
            made.prepare(policy, files or {})
            made.up()
            try:
                yield made
            finally:
                made.down()
        finally:
            remove(root)


def remove(root: Path) -> None:
    """Remove a system's folder; an ordinary user cannot remove what is its domains'."""
    shutil.rmtree(root, ignore_errors=True)
    if root.exists() and os.geteuid() != 0:
        subprocess.run(
            ["unshare", "--user", "--map-root-user", "--map-auto", "rm", "-rf", str(root)],
            capture_output=True,
            check=False,
        )


# A system with the domains ``work``, which is hostile, and ``peer``, with three services to try.
HOSTILE_SETTINGS = """
[domains.work]
features = { "sandbox.pids-max" = "200" }
maxmem = 400
[domains.work.files]
"/rw/planted/laid" = "laid"
[domains.peer]
[domains.peer.files]
"/usr/local/etc/qubes-rpc/test.Who" = "who"
"/usr/local/etc/qubes-rpc/test.Descriptors" = "descriptors"
"/usr/local/etc/qubes-rpc/test.Environment" = "environment"
"""
HOSTILE_POLICY = """\
test.Who * work peer allow
test.Descriptors * work peer allow
test.Environment * work peer allow
"""
HOSTILE_FILES = {
    "laid": "laid\n",
    "who": '#!/bin/sh\necho "$QREXEC_REMOTE_DOMAIN"\n',
    # Waits for a byte, so that what was sent with it has arrived.
    "descriptors": "#!/bin/sh\nread -r _\nls /proc/self/fd | wc -l\n",
    "environment": "#!/bin/sh\nenv\n",
}


def hostile_machine(mode: str) -> contextlib.AbstractContextManager[Machine]:
    """Return that system, started in one of the privilege models."""
    return machine(mode, HOSTILE_SETTINGS, HOSTILE_POLICY, HOSTILE_FILES)


def groups(system: Machine, domain: str = "*") -> list[Path]:
    """Return the control groups of a system's domains, or of one of them."""
    label = label_of(system.root / "state")
    found = []
    # Not by a glob, which fails when somebody else's group goes while it is looked at.
    for place, below, _ in os.walk("/sys/fs/cgroup"):
        if os.path.basename(place) == label:
            found += [Path(place, name) for name in below if domain in ("*", name)]
    return found
