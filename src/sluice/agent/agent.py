"""qrexec-agent: the domain's end of the control channel.

Theory. The agent is in one of two situations. Stand-alone it is a vchan server on a socket in a
directory, survives its daemon, and serves the next one with the calls of the last still running.
In a sandbox it is process 1 and inherits its control channel (SLUICE_CONTROL_FD): the end of that
channel is the end of the domain. Either way one process serves all calls on one loop.

What reaches it: messages of the AdminVM (``Control``), requests of local programs
(``TriggerSocket``), and the ends of calls (``ServiceCall``, a fork server's or a client's
connection), each of which is reported to the AdminVM exactly once.
docs/spec/wire-protocol.md 7 and 20.
"""

from __future__ import annotations

import os
import sys

from sluice.agent.calls import ServiceCall, Surroundings
from sluice.agent.control import Control
from sluice.agent.forwarding import ForkServerCall, fork_server_path
from sluice.agent.link import Connect, Execute, Opened, Refuse
from sluice.agent.local import LocalClient, TriggerSocket
from sluice.agent.log import Log, has_system_log
from sluice.agent.options import UsageError, die_of_interrupt, parse_options
from sluice.agent.planning import plan
from sluice.agent.processes import ProcessTable
from sluice.agent.startup import (
    end_session,
    keep_descriptors_private,
    notify_ready,
    poke_meminfo,
    spare_stderr,
)
from sluice.agent.syslog import SyslogSocket
from sluice.agent.users import choose_users
from sluice.agent.waiting import SessionWaiter
from sluice.errors import LocalError
from sluice.flow.reactor import Reactor
from sluice.service.descriptors import own_limit
from sluice.vchan import socketdir
from sluice.vchan.passed import close_all
from sluice.wire.messages import CONTROL_PORT
from sluice.wire.names import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from sluice.agent.planning import Plan
    from sluice.flow.reactor import Loop

AGENT_SOCKET = "/var/run/qubes/qrexec-agent"
FORK_SERVER_SOCKET = "/var/run/qubes/qrexec-server.%s.sock"
CONTROL_VARIABLE = "SLUICE_CONTROL_FD"

USAGE = """\
usage: qrexec-agent [options]
  -h, --help                          show this and exit
  -a, --agent-socket PATH             socket for requests of local programs
                                      (default: /var/run/qubes/qrexec-agent)
  -s, --fork-server-socket PATTERN    sockets of fork servers, %s is the user's name
                                      (default: /var/run/qubes/qrexec-server.%s.sock)
  -S, --no-fork-server                never use a fork server
"""


class Agent:
    """One agent; ``run`` by the loop it was given."""

    def __init__(
        self,
        loop: Loop,
        *,
        agent_socket: str = AGENT_SOCKET,
        fork_server: str = FORK_SERVER_SOCKET,
        control_fd: int = -1,
        environment: Mapping[bytes, bytes],
        on_exit: object = None,
    ) -> None:
        """Take the trigger socket's path, the fork servers' pattern (empty: none are used),
        the inherited control descriptor or -1, and the base environment of services.

        ``on_exit(status)`` is called when the agent has ended; the loop is the caller's to stop.
        """
        self.sandbox = control_fd >= 0
        self._loop = loop
        self._agent_socket = agent_socket
        self._fork_server = fork_server
        self._control_fd = control_fd
        self._on_exit = on_exit
        self._log = Log("qrexec-agent")
        # Process 1 of a sandbox ends with its channel. Its services can signal it, and what such a
        # process does not handle the kernel keeps from it.
        ends = None if self.sandbox and os.getpid() == 1 else lambda: self._exit(0)
        self._processes = ProcessTable(loop, on_terminate=ends)
        environment = dict(environment)
        if agent_socket != AGENT_SOCKET:
            # For the library (sluice.call), which has no option to be told by.
            environment[b"SLUICE_AGENT_SOCKET"] = os.fsencode(os.path.abspath(agent_socket))
        helper = os.fsencode(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        self._around = Surroundings(
            loop,
            self._processes,
            choose_users(sandbox=self.sandbox, helper=helper + b"/bin/qrexec-pam-session"),
            self._log,
            # In a sandbox the system log is the agent itself, which needs no detour.
            system_log=not self.sandbox and has_system_log(),
            environment=environment,
        )
        self._waiter = SessionWaiter(self._processes, self._around.environment, self._log)
        self._server: socketdir.Server | None = None
        self._control: Control | None = None
        self._trigger: TriggerSocket | None = None
        self._calls: set[ServiceCall | ForkServerCall] = set()
        self._syslog: SyslogSocket | None = None
        self._unreported: list[tuple[int, int]] = []
        self._announced = False
        self._poked = False

    # --- the control channel -------------------------------------------------------------------

    def start(self) -> None:
        """Wait for a daemon, or take up the inherited channel. Raises LocalError."""
        if self.sandbox:
            self._serve_syslog()
            self._connected(self._control_fd)
        else:
            self._server = socketdir.Server(
                self._loop, 0, CONTROL_PORT, self._connected, None, None
            )

    def _serve_syslog(self) -> None:
        """Be the system log of a sandbox; of a sandbox only, for a machine has its own."""
        if os.getpid() != 1:
            return
        try:
            self._syslog = SyslogSocket(self._loop)
        except OSError as error:
            self._log(f"no system log in this domain: {error.strerror}")

    def _connected(self, fd: int) -> None:
        self._server = None
        self._control = Control(
            self._loop,
            fd,
            passed=self.sandbox,
            on_event=self._event,
            on_end=self._disconnected,
            on_pressure=self._pressure,
        )

    def _disconnected(self, reason: str | None) -> None:
        """Deal with the end of the control channel (7.7)."""
        control, self._control = self._control, None
        if reason is not None:
            self._log(f"control channel: {reason}")
            self._exit(1)
            return
        assert control is not None
        if self.sandbox:
            self._exit(0)
            return
        if not control.link.version:
            # The handshake failed: whoever connected never spoke (7.2).
            self._log("the daemon left within the handshake")
            self._exit(1)
            return
        self._log("the daemon is gone, waiting for the next one")
        for client in control.link.abandon():
            client.close()
        if self._trigger is not None:
            self._trigger.close()
            self._trigger = None
        try:
            self.start()
        except (LocalError, OSError) as error:
            self._log(str(error))
            self._exit(1)

    def _pressure(self, pressed: bool) -> None:
        if self._trigger is not None:
            if pressed:
                self._trigger.pause()
            else:
                self._trigger.resume()

    def _event(self, event: Opened | Execute | Connect | Refuse, fds: list[int]) -> None:
        if isinstance(event, Execute):
            self._poke_meminfo()
            self._execute(event, fds)
        elif isinstance(event, Connect):
            self._poke_meminfo()
            self._connect(event, fds)
        elif isinstance(event, Refuse):
            if event.client is not None:
                event.client.close()
            else:
                self._log("refusal of a request that nobody made")
        else:
            self._opened()

    def _opened(self) -> None:
        """Become available to the domain's programs (7.2 steps 3 and 4)."""
        try:
            self._trigger = TriggerSocket(
                self._loop, self._agent_socket, self._requested, self._log
            )
        except LocalError as error:
            self._log(str(error))
            self._exit(1)
            return
        unreported, self._unreported = self._unreported, []
        for domain, port in unreported:
            self._report(domain, port)
        if not self._announced:
            self._announced = True
            notify_ready()

    def _report(self, domain: int, port: int) -> None:
        """Send CONNECTION_TERMINATED, or keep it for the next daemon (7.6)."""
        if self._control is not None and self._control.open:
            self._control.send(self._control.link.terminated(domain, port))
        else:
            self._unreported.append((domain, port))

    def _poke_meminfo(self) -> None:
        if not self._poked and not self.sandbox:
            self._poked = True
            poke_meminfo()

    # --- requests of local programs ------------------------------------------------------------

    def _requested(self, client: LocalClient, untrusted_body: bytes) -> None:
        control = self._control
        if control is None or not control.open:
            client.close()
            return
        message = control.link.trigger(client, untrusted_body)
        if message is None:
            self._log("the daemon is too old for a request of a local client")
            client.close()
            return
        control.send(message)

    def _connect(self, event: Connect, fds: list[int]) -> None:
        """Tell a local client where its data channel is (7.4.2)."""
        client: LocalClient | None = event.client
        domain, port = event.domain, event.port
        if client is None:
            close_all(fds)
            self._log("a connection for a request that nobody made")
            if self.sandbox:
                self._report(domain, port)
            return
        if self.sandbox and not fds:
            self._log("a connection came without its descriptors")
            client.close()
            self._report(domain, port)
            return
        client.answer(domain, port, fds, lambda: self._report(domain, port))

    # --- commands for this domain --------------------------------------------------------------

    def _execute(self, event: Execute, fds: list[int]) -> None:
        """Serve EXEC_CMDLINE or JUST_EXEC (7.4.1)."""
        if self.sandbox and not fds:
            self._log("a call came without its descriptors")
            self._report(event.domain, event.port)
            return
        planned = plan(event.text, self._log, with_user=True, configured=True)
        command = planned.command
        if (
            command is not None
            and planned.error is None
            and planned.configuration.wait_for_session
            and not command.nogui
        ):
            self._waiter.wait(
                planned.user, command.source, lambda: self._proceed(event, planned, fds)
            )
        else:
            self._proceed(event, planned, fds)

    def _proceed(self, event: Execute, planned: Plan, fds: list[int]) -> None:
        pair = (fds[0], fds[1]) if fds else None
        path = fork_server_path(planned, self._fork_server)
        if path is not None and planned.command is not None:
            forwarded = ForkServerCall(
                self._loop, path, event, planned.command.text, pair, self._ended, self._log
            )
            if forwarded.begin():
                self._calls.add(forwarded)
                return
        call = ServiceCall(
            self._around, event.kind, event.domain, event.port, planned, pair, self._ended
        )
        self._calls.add(call)
        call.begin()

    def _ended(self, call: ServiceCall | ForkServerCall) -> None:
        self._calls.discard(call)
        self._report(call.domain, call.port)

    # --- the end -------------------------------------------------------------------------------

    def _exit(self, status: int) -> None:
        """Leave nothing behind: the trigger socket, the channel, our part of the calls."""
        if self._trigger is not None:
            self._trigger.close()
            self._trigger = None
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._syslog is not None:
            self._syslog.close()
            self._syslog = None
        if self.sandbox:
            for pid in self._processes.live:
                end_session(pid)
        if callable(self._on_exit):
            self._on_exit(status)


def main(arguments: list[str]) -> int:
    """Run the program; returns its exit status (7.8)."""
    die_of_interrupt()
    try:
        options, _ = parse_options(
            arguments,
            {
                "h": ("help", False),
                "a": ("agent", True),
                "s": ("fork", True),
                "S": ("nofork", False),
            },
            {
                "help": ("help", False),
                "agent-socket": ("agent", True),
                "fork-server-socket": ("fork", True),
                "no-fork-server": ("nofork", False),
            },
        )
    except UsageError as error:
        sys.stderr.write(f"qrexec-agent: {error}\n{USAGE}")
        return 2
    chosen = dict(options)
    if "help" in chosen:
        sys.stderr.write(USAGE)
        return 2
    keep_descriptors_private()
    return _serve(chosen)


def _serve(chosen: dict[str, str]) -> int:
    own_limit.raise_it()
    loop = Reactor()
    result = [1]

    def ended(status: int) -> None:
        result[0] = status
        loop.stop()

    try:
        control_fd = int(os.environ.pop(CONTROL_VARIABLE, "-1"))
        environment = dict(os.environb)
        environment.pop(b"NOTIFY_SOCKET", None)
        path = chosen.get("agent", AGENT_SOCKET)
        if control_fd >= 0:
            spare_stderr()
            os.makedirs(os.path.dirname(path) or ".", 0o755, exist_ok=True)
        agent = Agent(
            loop,
            agent_socket=path,
            fork_server="" if "nofork" in chosen else chosen.get("fork", FORK_SERVER_SOCKET),
            control_fd=control_fd,
            environment=environment,
            on_exit=ended,
        )
        agent.start()
    except (LocalError, OSError, ValueError) as error:
        sys.stderr.write(f"qrexec-agent: {escape(str(error), 500)}\n")
        return 1
    loop.run()
    return result[0]
