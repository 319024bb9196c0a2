"""qvm-connect-tcp: makes a TCP port of another domain appear on our own loopback.

Each connection to the local port becomes a call of ``qubes.ConnectTCP+PORT``, which policy decides
about. One process carries all connections. docs/spec/core-stack.md, appendix on networking.
"""

from __future__ import annotations

import _socket
import os
import sys

from sluice.agent.caller import CallRequest
from sluice.agent.options import UsageError, die_of_interrupt, parse_options
from sluice.errors import LocalError
from sluice.flow.channel import DataChannel
from sluice.flow.reactor import Reactor
from sluice.service.address import parse_port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.flow.reactor import Loop

USAGE = """\
usage: qvm-connect-tcp [options] [LOCALPORT]:[VM]:PORT
       qvm-connect-tcp [options] [VM]:PORT

Listens on 127.0.0.1:LOCALPORT (PORT where it is left out) and joins each connection
to PORT of the domain VM (@default where it is left out) by the service
qubes.ConnectTCP+PORT. Goes into the background when it listens.

  -h, --help               show this and exit
  -f, --foreground         stay in the foreground
  -a, --agent-socket PATH  where the agent listens
"""

MAX_CONNECTIONS = 256
BACKLOG = 64


def parse_binding(text: str) -> tuple[int, str, int]:
    """Read ``[LOCALPORT:][VM]:PORT`` into (local port, target, remote port). Raises UsageError."""
    parts = text.split(":")
    if len(parts) == 2:
        parts.insert(0, "")
    if len(parts) != 3:
        raise UsageError(f"not of the form [LOCALPORT]:[VM]:PORT: {text}")
    local, target, remote = parts
    try:
        remote_port = parse_port(remote.encode("ascii", "replace"))
        local_port = parse_port(local.encode("ascii", "replace")) if local else remote_port
    except LocalError as error:
        raise UsageError(str(error)) from error
    return local_port, target or "@default", remote_port


class Forwarder:
    """The listening socket and its connections."""

    def __init__(
        self, loop: Loop, listener: _socket.socket, target: bytes, port: int, agent: str | None
    ) -> None:
        """Serve ``listener``, which must not block."""
        self._loop = loop
        self._listener = listener
        self._target = target
        self._service = b"qubes.ConnectTCP+%d" % port
        self._agent = agent
        self._connections = 0
        self._listening = False
        self._listen()

    def _listen(self) -> None:
        if not self._listening:
            self._listening = True
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            fd = self._listener._accept()[0]  # type: ignore[attr-defined]
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            self._pause()
            self._loop.call_later(0.1, self._listen)
            return
        self._connections += 1
        if self._connections >= MAX_CONNECTIONS:
            self._pause()
        Connection(self._loop, fd, self._target, self._service, self._agent, self._ended)

    def _pause(self) -> None:
        if self._listening:
            self._listening = False
            self._loop.remove_reader(self._listener.fileno())

    def _ended(self) -> None:
        self._connections -= 1
        self._listen()


class Connection:
    """One connection on its way to the other domain."""

    def __init__(
        self,
        loop: Loop,
        fd: int,
        target: bytes,
        service: bytes,
        agent: str | None,
        on_end: object,
    ) -> None:
        """Ask for the call that carries ``fd``."""
        self._loop = loop
        self._fd = fd
        self._on_end = on_end
        self._request = CallRequest(
            loop,
            target,
            service,
            agent_socket=agent,
            on_open=self._opened,
            on_refused=lambda: self._failed("refused"),
            on_error=self._failed,
        )

    def _opened(self, read_fd: int, write_fd: int) -> None:
        fd, self._fd = self._fd, -1
        channel = DataChannel(
            self._loop,
            read_fd,
            write_fd,
            caller=True,
            in_fd=fd,
            out_fd=fd,
            on_done=lambda _status: self._end(),
            on_fatal=self._failed,
        )
        channel.start()

    def _failed(self, reason: str) -> None:
        text = f"qvm-connect-tcp: {reason}\n".encode("ascii", "backslashreplace")
        try:  # noqa: SIM105
            os.write(2, text)
        except OSError:
            pass
        self._end()

    def _end(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._request.close()
        assert callable(self._on_end)
        self._on_end()


def go_into_background() -> bool:
    """Fork; True in the child, which has a session of its own and no terminal."""
    if os.fork():
        return False
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    return True


def main(arguments: list[str]) -> int:
    """Run the program; returns its exit status."""
    die_of_interrupt()
    try:
        options, positionals = parse_options(
            arguments,
            {"h": ("help", False), "f": ("foreground", False), "a": ("agent", True)},
            {
                "help": ("help", False),
                "foreground": ("foreground", False),
                "agent-socket": ("agent", True),
            },
        )
        chosen = dict(options)
        if "help" in chosen:
            sys.stdout.write(USAGE)
            return 0
        if len(positionals) != 1:
            raise UsageError("exactly one [LOCALPORT]:[VM]:PORT is needed")
        local, target, remote = parse_binding(positionals[0])
    except UsageError as error:
        sys.stderr.write(f"qvm-connect-tcp: {error}\n{USAGE}")
        return 2
    flags = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
    listener = _socket.socket(_socket.AF_INET, flags)
    listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", local))
        listener.listen(BACKLOG)
    except OSError as error:
        sys.stderr.write(f"qvm-connect-tcp: cannot listen on port {local}: {error.strerror}\n")
        return 1
    if "foreground" not in chosen and not go_into_background():
        return 0
    loop = Reactor()
    Forwarder(loop, listener, os.fsencode(target), remote, chosen.get("agent"))
    loop.run()
    return 0
