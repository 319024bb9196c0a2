"""qrexec-client-vm: asks for a call from inside a domain and carries its streams.

Every call of a domain starts this program, so it loads next to nothing: what only some calls need
(the vchan server of `socketdir`, a local program) is imported where it is needed.
docs/spec/wire-protocol.md 11.
"""

from __future__ import annotations

import os
import sys

from sluice.agent.caller import AGENT_SOCKET, CallRequest
from sluice.agent.options import (
    Exit,
    UsageError,
    die_of_interrupt,
    explain_silence,
    has_standard_descriptors,
    parse_number,
    parse_options,
    write_error,
)
from sluice.errors import LocalError
from sluice.flow.channel import DataChannel
from sluice.flow.reactor import Reactor
from sluice.wire.messages import (
    EXIT_FAILURE,
    EXIT_LOCAL_FAILURE,
    EXIT_REFUSED,
    EXIT_USAGE,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.agent.local_program import LocalProgram

USAGE = """\
usage: qrexec-client-vm [options] TARGET SERVICE[+ARGUMENT] [PROGRAM [ARGUMENT...]]

Calls SERVICE in the domain TARGET and joins it to stdin and stdout, or to PROGRAM.

  -h, --help                           show this and exit
      --buffer-size=N                  least size of the channel's buffers, in bytes
  -t, --filter-escape-chars-stdout     replace unsafe bytes in what is received
                                       (the default where stdout is a terminal)
  -T, --filter-escape-chars-stderr     the same for stderr
      --no-filter-escape-chars-stdout  do not filter
      --no-filter-escape-chars-stderr  do not filter stderr
  -a, --agent-socket=PATH              where the agent listens
                                       (default: /var/run/qubes/qrexec-agent)
  -p, --prefix-data=DATA               send DATA before stdin
  -s, --source-qube=NAME               ask as if from the domain NAME
      --use-stdin-socket               use stdin, a socket, in both directions
"""

SHORT = {
    "h": ("help", False),
    "t": ("t", False),
    "T": ("T", False),
    "a": ("agent", True),
    "p": ("prefix", True),
    "s": ("source", True),
}
LONG = {
    "help": ("help", False),
    "buffer-size": ("buffer", True),
    "filter-escape-chars-stdout": ("t", False),
    "filter-escape-chars-stderr": ("T", False),
    "no-filter-escape-chars-stdout": ("no-t", False),
    "no-filter-escape-chars-stderr": ("no-T", False),
    "agent-socket": ("agent", True),
    "prefix-data": ("prefix", True),
    "source-qube": ("source", True),
    "use-stdin-socket": ("stdin-socket", False),
}


class Settings:
    """What the command line asks for."""

    def __init__(self) -> None:
        """Begin with the defaults."""
        self.target = b""
        self.service = b""
        self.program: list[bytes] = []
        self.agent_socket = AGENT_SOCKET
        self.source = b""
        self.prefix = b""
        self.stdin_socket = False
        self.filter_stdout: bool | None = None
        self.filter_stderr: bool | None = None


def parse_arguments(arguments: list[str]) -> Settings:
    """Read the command line (11.1). Raises Exit."""
    settings = Settings()
    try:
        options, positionals = parse_options(arguments, SHORT, LONG, stop_early=True)
        _apply(settings, options)
    except UsageError as error:
        raise Exit(EXIT_USAGE, f"{error}\n{USAGE.rstrip()}") from error
    if len(positionals) < 2 or (settings.stdin_socket and len(positionals) > 2):
        raise Exit(EXIT_USAGE, USAGE.rstrip())
    if settings.stdin_socket and not is_stream_socket(0):
        raise Exit(EXIT_USAGE, "--use-stdin-socket: stdin is not a stream socket")
    words = [os.fsencode(word) for word in positionals]
    settings.target, settings.service, settings.program = words[0], words[1], words[2:]
    return settings


def _apply(settings: Settings, options: list[tuple[str, str]]) -> None:
    seen = set()
    for key, value in options:
        if key in seen and key in ("prefix", "source"):
            raise UsageError("an option that may be given once was repeated")
        if key in seen and key == "stdin-socket":
            raise Exit(EXIT_USAGE, "--use-stdin-socket may be given once")
        seen.add(key)
        if key == "help":
            sys.stdout.write(USAGE)
            sys.stdout.flush()
            raise Exit(0)
        if key == "buffer":
            parse_number(value, f"invalid buffer size: {value}")
        elif key in ("t", "no-t"):
            settings.filter_stdout = key == "t"
        elif key in ("T", "no-T"):
            settings.filter_stderr = key == "T"
        elif key == "agent":
            settings.agent_socket = value
        elif key == "prefix":
            settings.prefix = os.fsencode(value)
        elif key == "source":
            settings.source = os.fsencode(value)
        else:
            settings.stdin_socket = True


def is_stream_socket(fd: int) -> bool:
    """Tell whether ``fd`` is a stream socket."""
    import _socket

    try:
        sock = _socket.socket(fileno=fd)
    except OSError:
        return False
    kind = sock.type
    sock.detach()
    return kind == _socket.SOCK_STREAM


class Client:
    """One run of the program."""

    def __init__(self, loop: Reactor, settings: Settings) -> None:
        """Ask for the call."""
        self.status = EXIT_LOCAL_FAILURE
        self._loop = loop
        self._settings = settings
        self._program: LocalProgram | None = None
        self._channel: DataChannel | None = None
        self._request = CallRequest(
            loop,
            settings.target,
            settings.service,
            source=settings.source,
            agent_socket=settings.agent_socket,
            on_open=self._opened,
            on_refused=self._refused,
            on_error=self._failed,
            on_allowed=self._allowed if settings.program else None,
        )

    def _allowed(self) -> None:
        """Start the local program, now that the call was allowed (11.3)."""
        from sluice.agent.local_program import LocalProgram

        self._program = LocalProgram(self._loop, self._settings.program)

    def _opened(self, read_fd: int, write_fd: int) -> None:
        settings, program = self._settings, self._program
        in_fd, out_fd = (0, 0) if settings.stdin_socket else (1, 0)
        if program is not None:
            in_fd, out_fd = program.in_fd, program.out_fd
        filter_stdout, filter_stderr = settings.filter_stdout, settings.filter_stderr
        if filter_stdout is None:
            filter_stdout = program is None and os.isatty(1)
        if filter_stderr is None:
            filter_stderr = os.isatty(2)
        self._channel = DataChannel(
            self._loop,
            read_fd,
            write_fd,
            caller=True,
            in_fd=in_fd,
            out_fd=out_fd,
            on_done=self._done,
            on_fatal=self._failed,
            has_process=program is not None,
            prefix=settings.prefix,
            filter_stdout=filter_stdout,
            filter_stderr=filter_stderr,
            on_open=self._joined if program is not None else None,
            on_out_end=program.hear_signals if program is not None else None,
        )
        self._channel.start()

    def _joined(self) -> None:
        """Let the channel know what became of the program meanwhile."""
        assert self._program is not None
        assert self._channel is not None
        self._program.follow(self._channel)

    def _refused(self) -> None:
        write_error("Request refused\n")
        self._finish(EXIT_REFUSED)

    def _failed(self, reason: str) -> None:
        write_error(f"qrexec-client-vm: {reason}\n")
        self._finish(EXIT_LOCAL_FAILURE)

    def _done(self, status: int) -> None:
        assert self._channel is not None
        if why := explain_silence(self._channel, self._settings.service, "the target"):
            write_error(f"qrexec-client-vm: {why}\n")
        self._finish(status & 0xFF)

    def _finish(self, status: int) -> None:
        self.status = status
        self._loop.stop()


def main(arguments: list[str]) -> int:
    """Run the program; returns its exit status (11.5)."""
    die_of_interrupt()
    if not has_standard_descriptors("qrexec-client-vm"):
        return EXIT_FAILURE
    try:
        settings = parse_arguments(arguments)
    except Exit as ending:
        if str(ending):
            write_error(f"qrexec-client-vm: {ending}\n")
        return ending.status
    loop = Reactor()
    try:
        client = Client(loop, settings)
    except LocalError as error:
        write_error(f"qrexec-client-vm: {error}\n")
        return EXIT_LOCAL_FAILURE
    loop.run()
    return client.status
