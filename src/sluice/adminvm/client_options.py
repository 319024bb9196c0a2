"""The command line of qrexec-client (docs/spec/wire-protocol.md 12.1)."""

from __future__ import annotations

import os
import stat
import sys

from sluice.agent.options import Exit, UsageError, parse_number, parse_options
from sluice.service.command import with_hangup
from sluice.wire.messages import EXIT_LOCAL_FAILURE, EXIT_USAGE, MAX_IDENT
from sluice.wire.names import DOM0_NAMES

SOCKET_DIR = "/var/run/qubes"

USAGE = """\
usage: qrexec-client [options] -d TARGET [-l LOCAL | -e | -c ID,NAME,NUMBER] COMMAND

Runs COMMAND (USER:COMMAND or DEFAULT:COMMAND) in the domain TARGET.

  -h, --help              show this and exit
  -d TARGET               name, number or uuid:UUID of the domain, or dom0
  -l LOCAL                join the command to the local command LOCAL
  -e                      start the command and do not wait for it
  -E, --no-exit-code      exit with 0 once the command has ended
  -c ID,NAME,NUMBER       complete the call ID of the domain NAME, whose number is NUMBER
  -p, --prefix-data=DATA  send DATA before anything else
  -t, -T                  replace unsafe bytes in what comes back on stdout, on stderr
  -w SECONDS              wait so long for the domain to connect (default 10; 0: for ever)
  -W                      with -c: wait for the end of the call
  -k                      kill the domain at the end
      --hangup            end the command when we are ended, and us when nobody takes its output
      --socket-dir=PATH   where the daemons' sockets are (default: /var/run/qubes)
      --use-stdin-socket  use stdin, a socket, in both directions

Environment: VCHAN_DOMAIN, VCHAN_SOCKET_DIR, QREXEC_SERVICE_PATH, QUBES_RPC_CONFIG_PATH,
SLUICE_QUBESD_SOCKET.
"""

SHORT = {
    "h": ("help", False),
    "d": ("target", True),
    "l": ("local", True),
    "e": ("execute", False),
    "E": ("no-code", False),
    "c": ("complete", True),
    "p": ("prefix", True),
    "t": ("filter-stdout", False),
    "T": ("filter-stderr", False),
    "w": ("timeout", True),
    "W": ("wait", False),
    "k": ("kill", False),
}
LONG = {
    "help": ("help", False),
    "no-exit-code": ("no-code", False),
    "prefix-data": ("prefix", True),
    "socket-dir": ("socket-dir", True),
    "use-stdin-socket": ("stdin-socket", False),
    "hangup": ("hangup", False),
}


class Settings:
    """What the command line asks for."""

    def __init__(self) -> None:
        """Begin with the defaults."""
        self.target = ""
        self.command = b""
        self.local: bytes | None = None
        self.just_execute = False
        self.no_exit_code = False
        self.completes = False
        self.request_id = b""
        self.source_name = b""
        self.source_number = 0
        self.prefix = b""
        self.filter_stdout = False
        self.filter_stderr = False
        self.timeout = 10
        self.wait = False
        self.kill = False
        self.hangup = False
        self.socket_dir = SOCKET_DIR
        self.stdin_socket = False

    @property
    def is_dom0(self) -> bool:
        """Whether the target is the AdminVM."""
        return self.target in DOM0_NAMES


def parse_arguments(arguments: list[str]) -> Settings:
    """Read the command line. Raises Exit: 1 or 2 for wrong ones, 0 for ``--help``."""
    settings = Settings()
    try:
        options, positionals = parse_options(arguments, SHORT, LONG)
        _apply(settings, options)
        _check(settings, [key for key, _ in options], positionals)
    except UsageError as error:
        raise Exit(EXIT_LOCAL_FAILURE, f"qrexec-client: {error}\n{USAGE.rstrip()}") from error
    settings.command = os.fsencode(positionals[0])
    user, colon, text = settings.command.partition(b":")
    if settings.hangup and colon:
        settings.command = user + colon + with_hangup(text)
    return settings


def _apply(settings: Settings, options: list[tuple[str, str]]) -> None:
    seen: set[str] = set()
    for key, value in options:
        if key == "help":
            sys.stdout.write(USAGE)
            raise Exit(0)
        if key in seen and key == "prefix":
            raise Exit(EXIT_USAGE, USAGE.rstrip())
        if key in seen and key == "complete":
            raise UsageError("-c may be given once")
        if key == "stdin-socket":
            if key in seen or not is_stream_socket(0):
                raise Exit(EXIT_USAGE, "qrexec-client: --use-stdin-socket: once, with a socket")
            settings.stdin_socket = True
        seen.add(key)
        if key in _FLAGS:
            setattr(settings, _FLAGS[key], True)
        elif key == "target":
            settings.target = value
        elif key == "socket-dir":
            settings.socket_dir = value
        elif key == "local":
            settings.local = os.fsencode(value)
        elif key == "prefix":
            settings.prefix = os.fsencode(value)
        elif key == "timeout":
            settings.timeout = parse_number(value, "qrexec-client: invalid timeout")
        elif key == "complete":
            _parse_completion(settings, value)


_FLAGS = {
    "execute": "just_execute",
    "no-code": "no_exit_code",
    "filter-stdout": "filter_stdout",
    "filter-stderr": "filter_stderr",
    "wait": "wait",
    "kill": "kill",
    "hangup": "hangup",
}


def _parse_completion(settings: Settings, value: str) -> None:
    request_id, first, rest = value.partition(",")
    name, second, number = rest.partition(",")
    if not first or not second or len(os.fsencode(request_id)) > MAX_IDENT:
        raise Exit(EXIT_LOCAL_FAILURE, "qrexec-client: -c takes ID,NAME,NUMBER")
    settings.completes = True
    settings.request_id = os.fsencode(request_id)
    settings.source_name = os.fsencode(name)
    settings.source_number = parse_number(number, "qrexec-client: invalid domain number")


def _check(settings: Settings, keys: list[str], positionals: list[str]) -> None:
    """Refuse what does not go together. Raises UsageError."""
    if not settings.target:
        raise UsageError("-d is missing")
    if not positionals:
        raise UsageError("the command is missing")
    if len({"execute", "local", "complete"} & set(keys)) > 1:
        raise UsageError("-e, -l and -c exclude each other")
    if settings.local is not None and settings.stdin_socket:
        raise UsageError("-l and --use-stdin-socket exclude each other")
    if settings.completes:
        name = os.fsdecode(settings.source_name)
        if name in DOM0_NAMES or settings.source_number == 0:
            raise UsageError("-c completes calls of domains, not of dom0")
        if settings.is_dom0 and not settings.request_id:
            raise UsageError("-c needs the identifier of a call")


def is_stream_socket(fd: int) -> bool:
    """Tell whether a descriptor is a stream socket."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    import _socket

    sock = _socket.socket(fileno=fd)
    try:
        return sock.type & 0xF == _socket.SOCK_STREAM
    finally:
        sock.detach()
