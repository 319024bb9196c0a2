"""The command line and the environment of qrexec-daemon (docs/spec/wire-protocol.md 2.4, 6.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sluice.agent.options import UsageError, parse_options
from sluice.vchan.socketdir import atoi

SOCKET_DIR = "/var/run/qubes"
POLICY_PROGRAM = "/usr/bin/qrexec-policy-exec"
POLICY_SOCKET = "/run/qubes/policy.sock"
LOG_DIR = "/var/log/qubes"
STARTUP_TIMEOUT = 60.0

USAGE = """\
usage: qrexec-daemon [options] DOMID NAME [DEFAULT_USER]

  -h, --help                  show this and exit
  -q, --quiet                 do not show progress while starting
      --socket-dir=PATH       directory of the sockets (default: /var/run/qubes)
  -p, --policy-program=PATH   program that decides when the policy daemon cannot
                              (default: /usr/bin/qrexec-policy-exec)
  -D, --direct                stay in the foreground, log to stderr
  -u, --uuid=UUID             UUID of the domain, without "uuid:"; needed

Environment: QREXEC_STARTUP_TIMEOUT (seconds to wait for the agent), QREXEC_STARTUP_NOWAIT (return
at once), VCHAN_DOMAIN, VCHAN_SOCKET_DIR, QREXEC_SERVICE_PATH, QUBES_RPC_CONFIG_PATH, and other
places than the usual ones: SLUICE_POLICY_SOCKET, SLUICE_QUBESD_SOCKET, SLUICE_QREXEC_LOG_DIR.
"""

_SHORT = {
    "h": ("help", False),
    "q": ("quiet", False),
    "p": ("program", True),
    "D": ("direct", False),
    "u": ("uuid", True),
}
_LONG = {
    "help": ("help", False),
    "quiet": ("quiet", False),
    "socket-dir": ("socket-dir", True),
    "policy-program": ("program", True),
    "direct": ("direct", False),
    "uuid": ("uuid", True),
}


@dataclass(frozen=True)
class Options:
    """What the command line and the environment ask for. Times are seconds, None: no limit."""

    domid: int
    name: str
    uuid: str
    default_user: str = "user"
    socket_dir: str = SOCKET_DIR
    policy_program: str = POLICY_PROGRAM
    policy_socket: str = POLICY_SOCKET
    qubesd_socket: str = "/run/qubesd.sock"
    log_dir: str = LOG_DIR
    direct: bool = False
    quiet: bool = False
    nowait: bool = False
    startup_timeout: float | None = STARTUP_TIMEOUT


def parse_arguments(arguments: list[str], environ: Mapping[str, str]) -> Options:
    """Read the command line. Raises UsageError; the text may be empty (``--help``)."""
    given, positionals = parse_options(arguments, _SHORT, _LONG)
    values = dict(given)
    if "help" in values:
        raise UsageError("")
    if len(positionals) not in (2, 3):
        raise UsageError("DOMID and NAME are needed, DEFAULT_USER may follow")
    if not values.get("uuid"):
        raise UsageError("--uuid is needed")
    domid = atoi(positionals[0])
    name = positionals[1]
    if domid <= 0:
        raise UsageError(f"invalid domain number {positionals[0]!r}")
    if "/" in name or not name or "/" in values["uuid"]:
        raise UsageError("a name cannot contain a slash")
    nowait = "QREXEC_STARTUP_NOWAIT" in environ
    seconds = atoi(environ.get("QREXEC_STARTUP_TIMEOUT", ""))
    return Options(
        domid,
        name,
        values["uuid"],
        positionals[2] if len(positionals) == 3 else "user",
        socket_dir=values.get("socket-dir", SOCKET_DIR),
        policy_program=values.get("program", POLICY_PROGRAM),
        policy_socket=environ.get("SLUICE_POLICY_SOCKET", POLICY_SOCKET),
        qubesd_socket=environ.get("SLUICE_QUBESD_SOCKET", "/run/qubesd.sock"),
        log_dir=environ.get("SLUICE_QREXEC_LOG_DIR", LOG_DIR),
        direct="direct" in values,
        quiet="quiet" in values,
        nowait=nowait,
        startup_timeout=None if nowait else float(seconds if seconds > 0 else STARTUP_TIMEOUT),
    )
