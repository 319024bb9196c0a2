"""Running things as the user that a call names.

Theory. There are three situations. An agent that is an ordinary user, or the only user of its
domain, can run things as itself and nobody else: another user is refused and the log says why. An
agent that is root in its domain starts a launcher in front of the service (``setpriv`` changes the
user in a millisecond; changing it in a child of ours would need a fork, which is dear). On a whole
machine a login shell stands behind it, which reads the profile, sets the scene and then executes
the program; in a sandbox that would be most of the cost of a call, so we set the scene ourselves.
An agent that is root on a machine with PAM starts our PAM helper instead, which opens a session
around the service.

Whatever a request carries is handed over as positional arguments, never as text that a shell
reads as script. docs/spec/wire-protocol.md 9.3.1.
"""

from __future__ import annotations

import os
import pwd

from sluice.service.command import ServiceError
from sluice.service.executable import Identity, check_program
from sluice.wire.names import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.service.start import Start

PAM_SERVICE = "/etc/pam.d/qrexec"
SETPRIV = (b"/usr/bin/setpriv", b"/bin/setpriv")
DEFAULT_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Run by a login shell, after the profile scripts: drop what they may have set of our variables,
# set exactly those of the call, go home, become the service.
# Arguments: the number of variables, NAME=VALUE each, then the program and its arguments.
LOGIN_SCRIPT = (
    b"unset QREXEC_REMOTE_DOMAIN QREXEC_SERVICE_FULL_NAME QREXEC_SERVICE_ARGUMENT"
    b" QREXEC_REQUESTED_TARGET_TYPE QREXEC_REQUESTED_TARGET QREXEC_REQUESTED_TARGET_KEYWORD"
    b' QREXEC_AGENT_PID; n=$1; shift; while [ "$n" -gt 0 ]; do export "$1"; shift; n=$((n-1));'
    b' done; unset n; cd "$HOME" 2>/dev/null; exec "$@"'
)


class Account:
    """One line of the passwd file: ids, groups, home and shell."""

    __slots__ = ("gid", "groups", "home", "name", "shell", "uid")

    def __init__(self, user: bytes) -> None:
        """Look ``user`` up. Raises ServiceError where there is no such account."""
        try:
            entry = pwd.getpwnam(os.fsdecode(user))
        except (KeyError, ValueError):
            raise ServiceError(f"there is no user '{escape(user)}' here") from None
        self.name = user
        self.uid = entry.pw_uid
        self.gid = entry.pw_gid
        self.home = os.fsencode(entry.pw_dir or "/")
        self.shell = os.fsencode(entry.pw_shell or "/bin/sh")
        self.groups = sorted(set(os.getgrouplist(entry.pw_name, entry.pw_gid)))

    def variables(self) -> dict[bytes, bytes]:
        """Return what a login sets: HOME, SHELL, USER, LOGNAME."""
        return {
            b"HOME": self.home,
            b"SHELL": self.shell,
            b"USER": self.name,
            b"LOGNAME": self.name,
        }


# How many descriptors a service may have where its user is ours too; 0: as many as we.
service_descriptors = 0

# Run by a shell in front of a service: $0 is the number.
LIMIT_SCRIPT = b'ulimit -n "$0"; exec "$@"'


class OwnUser:
    """Everything runs as we do; a call for anybody else is refused.

    The kernel counts descriptors in flight for a user id and compares with the *sender's* limit.
    Where all domains share one id, a service must therefore have a lower limit than any agent has,
    or one domain could keep the agents of all from handing calls over (core-stack.md 12.4.1). A
    limit can only be lowered in the process itself, so a shell in front of it does.
    """

    def __init__(self, name: bytes, home: bytes | None = None) -> None:
        """Take our own login name, and where things run if not where we are."""
        self.name = name
        self._home = home

    def _check(self, user: bytes) -> None:
        if user != self.name:
            raise ServiceError(
                f"refused to run as '{escape(user)}': this agent can run things as"
                f" '{escape(self.name)}' only"
            )

    def program(self, user: bytes, argv: list[bytes], environment: dict[bytes, bytes]) -> Start:
        """Return (argv, environment) that run a service directly. Raises ServiceError."""
        self._check(user)
        if service_descriptors:
            check_program(argv[0])
        return _limited(argv), environment, self._home

    def shell(self, user: bytes, text: bytes, environment: dict[bytes, bytes]) -> Start:
        """Return (argv, environment) that run a shell command. Raises ServiceError."""
        self._check(user)
        return _limited([b"/bin/sh", b"-c", text]), environment, self._home


def _limited(argv: list[bytes]) -> list[bytes]:
    if not service_descriptors:
        return argv
    return [b"/bin/sh", b"-c", LIMIT_SCRIPT, b"%d" % service_descriptors, *argv]


class SwitchUser:
    """We are root and run each thing as the user it names, by ``setpriv``."""

    def __init__(self, launcher: bytes, *, login: bool) -> None:
        """Take the path of setpriv, and whether services get a login shell around them."""
        self._launcher = launcher
        self._login = login

    def _become(self, account: Account) -> list[bytes]:
        groups = b",".join(b"%d" % group for group in account.groups)
        return [
            self._launcher,
            b"--reuid=%d" % account.uid,
            b"--regid=%d" % account.gid,
            b"--groups=" + groups if groups else b"--clear-groups",
            b"--",
        ]

    def program(self, user: bytes, argv: list[bytes], environment: dict[bytes, bytes]) -> Start:
        """Return (argv, environment) that run a service in a login shell of ``user``."""
        account = Account(user)
        ours = {name: value for name, value in environment.items() if name.startswith(b"QREXEC")}
        final = login_environment(environment, account)
        if not self._login:
            check_program(argv[0], Identity(account.uid, account.groups))
        words = login_wrapper(ours, argv) if self._login else argv
        return self._become(account) + words, final, account.home

    def shell(self, user: bytes, text: bytes, environment: dict[bytes, bytes]) -> Start:
        """Return (argv, environment) that run a command in the login shell of ``user``."""
        account = Account(user)
        words = [account.shell, b"-l", b"-c", text]
        final = login_environment(environment, account)
        return self._become(account) + words, final, account.home


class PamUser:
    """We are root on a machine with PAM: our helper opens a session around each thing."""

    def __init__(self, helper: bytes) -> None:
        """Take the path of the helper program."""
        self._helper = helper

    def program(self, user: bytes, argv: list[bytes], environment: dict[bytes, bytes]) -> Start:
        """Return (argv, environment) that run a service in a session of ``user``."""
        Account(user)
        ours = {name: value for name, value in environment.items() if name.startswith(b"QREXEC")}
        return [self._helper, user, b"program", *login_wrapper(ours, argv)], environment, None

    def shell(self, user: bytes, text: bytes, environment: dict[bytes, bytes]) -> Start:
        """Return (argv, environment) that run a command in the login shell of ``user``."""
        Account(user)
        return [self._helper, user, b"shell", text], environment, None


def login_wrapper(variables: dict[bytes, bytes], argv: list[bytes]) -> list[bytes]:
    """Return the login shell that sets ``variables`` after the profile and executes ``argv``."""
    count = b"%d" % len(variables)
    pairs = [name + b"=" + value for name, value in variables.items()]
    return [b"/bin/sh", b"-lc", LOGIN_SCRIPT, b"sh", count, *pairs, *argv]


def login_environment(base: dict[bytes, bytes], account: Account) -> dict[bytes, bytes]:
    """Return ``base`` with the variables of a login as ``account``."""
    final = dict(base)
    final.setdefault(b"PATH", DEFAULT_PATH)
    final.update(account.variables())
    session = b"/run/user/%d" % account.uid
    if os.path.isdir(session):
        final[b"XDG_RUNTIME_DIR"] = session
    else:
        final.pop(b"XDG_RUNTIME_DIR", None)
    return final


def own_name() -> bytes:
    """Return the login name of the effective user; its number where it has none."""
    try:
        return os.fsencode(pwd.getpwuid(os.geteuid()).pw_name)
    except KeyError:
        return b"%d" % os.geteuid()


def choose_users(*, sandbox: bool, helper: bytes) -> OwnUser | SwitchUser | PamUser:
    """Find out which of the three situations we are in.

    ``sandbox`` excludes PAM; ``helper`` is the path of the PAM helper.
    """
    home = os.environb.get(b"HOME") if sandbox else None
    # A domain without isolation has one user, ourselves, even where we are root.
    if os.geteuid() != 0 or b"SLUICE_PROCESS_DOMAIN" in os.environb:
        return OwnUser(own_name(), home)
    if not sandbox and os.path.exists(PAM_SERVICE):
        return PamUser(helper)
    if can_switch():
        for launcher in SETPRIV:
            if os.access(launcher, os.X_OK):
                return SwitchUser(launcher, login=not sandbox)
    return OwnUser(own_name(), home)


def can_switch() -> bool:
    """Tell whether root here may become somebody else: more than one id, and both capabilities."""
    try:
        with open("/proc/self/uid_map", "rb") as file:
            mapped = sum(int(line.split()[2]) for line in file.read(65536).splitlines())
        with open("/proc/self/status", "rb") as file:
            status = file.read(65536)
        at = status.index(b"\nCapEff:") + 8
        capabilities = int(status[at : status.index(b"\n", at)], 16)
    except (OSError, ValueError, IndexError):
        return False
    # CAP_SETGID is 6, CAP_SETUID is 7.
    return mapped > 1 and capabilities >> 6 & 3 == 3
