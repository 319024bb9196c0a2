"""qrexec-pam-session: runs one thing as a user, in a session that PAM opens and closes around it.

Started by an agent that is root outside a sandbox, as ``qrexec-pam-session USER program ARGV...``
or ``qrexec-pam-session USER shell TEXT``. It is not for people: what it trusts is whoever can be
root anyway.

Theory. PAM belongs to one process from the start of a transaction to its end, and its modules may
do anything to that process; so each call has a helper of its own, which waits for the service and
then closes the session, as login programs do. The service is a child that has dropped to the user;
here a fork is right, since the helper is small and alone. While it waits the helper keeps none of
the service's streams open, or nobody would see them end. The service's session is not the helper's:
what the agent signals the helper with is handed on. docs/spec/wire-protocol.md 9.1.1, 9.3.1.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import pwd
import signal
import sys
import time

from sluice.agent.processes import exit_status
from sluice.agent.sessions import members, signal_all
from sluice.errors import LocalError
from sluice.service.start import RESET_SIGNALS
from sluice.wire.messages import EXIT_FAILURE, EXIT_NOT_FOUND
from sluice.wire.names import escape

SERVICE = b"qrexec"
PAM_SUCCESS = 0
PAM_CONV_ERR = 19
PAM_SILENT = 0x8000
PAM_ESTABLISH_CRED = 0x2
PAM_DELETE_CRED = 0x4
PAM_TTY = 3
# Seconds after the first signal in which all must have ended: the agent kills us a little later.
LAST = 8

_CONVERSE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
)


class _Conversation(ctypes.Structure):
    _fields_ = (("converse", _CONVERSE), ("data", ctypes.c_void_p))


def _no_answer(_count: int, _messages: int, _replies: int, _data: int) -> int:
    """Answer no question: there is nobody to ask."""
    return PAM_CONV_ERR


class PamError(LocalError):
    """A step of PAM failed."""


class Pam:
    """One transaction with PAM."""

    def __init__(self, user: bytes, *, directory: bytes | None = None) -> None:
        """Begin for ``user``; ``directory`` replaces /etc/pam.d. Raises PamError."""
        name = ctypes.util.find_library("pam") or "libpam.so.0"
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise PamError(f"PAM cannot be loaded: {error}") from error
        self._library.pam_strerror.restype = ctypes.c_char_p
        self._library.pam_getenvlist.restype = ctypes.POINTER(ctypes.c_char_p)
        # Kept as long as the transaction: PAM holds their addresses.
        self._converse = _CONVERSE(_no_answer)
        self._conversation = _Conversation(self._converse, None)
        self._handle = ctypes.c_void_p()
        conversation, handle = ctypes.byref(self._conversation), ctypes.byref(self._handle)
        if directory is None:
            status = self._library.pam_start(SERVICE, user, conversation, handle)
        else:
            status = self._library.pam_start_confdir(SERVICE, user, conversation, directory, handle)
        if status != PAM_SUCCESS:
            raise PamError(f"PAM cannot be started: {status}")
        self._last = PAM_SUCCESS
        self._library.pam_set_item(self._handle, PAM_TTY, SERVICE)

    def step(self, name: str, flags: int = PAM_SILENT) -> None:
        """Call ``pam_NAME(handle, flags)``. Raises PamError."""
        self._last = getattr(self._library, "pam_" + name)(self._handle, flags)
        if self._last != PAM_SUCCESS:
            reason = self._library.pam_strerror(self._handle, self._last)
            raise PamError(f"pam_{name}: {escape(reason or b'?')}")

    def attempt(self, name: str, flags: int = PAM_SILENT) -> None:
        """Do a step of the end: its failure changes nothing of what the service did."""
        try:  # noqa: SIM105
            self.step(name, flags)
        except PamError:
            pass  # PAM has written to the system log, and our stderr is closed by now

    def environment(self) -> dict[bytes, bytes]:
        """Return the variables that the modules set."""
        result: dict[bytes, bytes] = {}
        pointer = self._library.pam_getenvlist(self._handle)
        index = 0
        while pointer and pointer[index]:
            name, _, value = bytes(pointer[index]).partition(b"=")
            result[name] = value
            index += 1
        return result

    def end(self) -> None:
        """End the transaction."""
        self._library.pam_end(self._handle, self._last)


def run(user: bytes, kind: bytes, words: list[bytes], *, directory: bytes | None = None) -> int:
    """Open a session, run the thing, close the session; returns the exit status.

    Raises PamError where the session cannot be opened.
    """
    try:
        account = pwd.getpwnam(os.fsdecode(user))
    except (KeyError, ValueError):
        raise PamError(f"there is no user '{escape(user)}'") from None
    pam = Pam(user, directory=directory)
    try:
        pam.step("authenticate")
        pam.step("acct_mgmt")
        os.initgroups(account.pw_name, account.pw_gid)
        pam.step("setcred", PAM_ESTABLISH_CRED | PAM_SILENT)
        try:
            pam.step("open_session")
            try:
                return _run_inside(pam, account, user, kind, words)
            finally:
                pam.attempt("close_session")
        finally:
            pam.attempt("setcred", PAM_DELETE_CRED | PAM_SILENT)
    finally:
        pam.end()


def _run_inside(
    pam: Pam, account: pwd.struct_passwd, user: bytes, kind: bytes, words: list[bytes]
) -> int:
    """Start the child and wait for it."""
    shell = os.fsencode(account.pw_shell or "/bin/sh")
    home = os.fsencode(account.pw_dir or "/")
    environment = pam.environment()
    environment.setdefault(b"PATH", os.environb.get(b"PATH", b"/usr/local/bin:/usr/bin:/bin"))
    environment.update(
        {b"HOME": home, b"SHELL": shell, b"USER": user, b"LOGNAME": user}
        | {
            name: os.environb[name]
            for name in (b"QREXEC_AGENT_PID", b"QREXEC_SERVICE_PATH")
            if name in os.environb
        }
    )
    if kind == b"shell":
        program, argv = shell, [b"-" + os.path.basename(shell), b"-c", words[0]]
    else:
        program, argv = words[0], words
    child = os.fork()
    if child == 0:
        _become(account, home, program, argv, environment)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    return _wait(child)


def _wait(child: int) -> int:
    """Return the status of the child; when we are told to end, end all of its session first."""
    told: list[int] = []

    def hand_on(number: int, _frame: object) -> None:
        if not told:
            signal.alarm(LAST)
        told.append(number)
        signal_all(child, signal.SIGKILL if number == signal.SIGALRM else number)

    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, hand_on)
    status = exit_status(os.waitpid(child, 0)[1])
    while told and members(child):
        time.sleep(0.05)  # what has not heeded the first signal hears the next
    return status


def _become(
    account: pwd.struct_passwd,
    home: bytes,
    program: bytes,
    argv: list[bytes],
    environment: dict[bytes, bytes],
) -> None:
    """Drop to the user and become the program; in the child, returns never."""
    status = EXIT_FAILURE
    try:
        # The groups were set before: credentials of PAM may have added to them.
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
        os.setsid()
        try:  # noqa: SIM105
            os.chdir(home)
        except OSError:
            pass
        for number in RESET_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.execve(program, argv, environment)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            status = EXIT_NOT_FOUND
        os.write(2, f"cannot run as {account.pw_name}: {error.strerror}\n".encode())
    finally:
        os._exit(status)


def main(arguments: list[str]) -> int:
    """Run the program; returns its exit status."""
    words = [os.fsencode(word) for word in arguments]
    if len(words) < 3 or words[1] not in (b"program", b"shell"):
        sys.stderr.write("usage: qrexec-pam-session USER program ARGV... | shell TEXT\n")
        return EXIT_FAILURE
    try:
        return run(words[0], words[1], words[2:])
    except PamError as error:
        sys.stderr.write(f"qrexec-agent: {error}\n")
        return EXIT_FAILURE
