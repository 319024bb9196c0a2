"""The far end inside a Sluice domain: asked of the agent, with no process in between.

The call's data channel runs on the proxy's own loop; two pipes join it to the flow. What the far
service writes to stderr goes to the log.
"""

from __future__ import annotations

import os

from sluice.agent.caller import CallRequest
from sluice.errors import LocalError
from sluice.flow.channel import DataChannel
from sluice.proxy.lines import LineSplitter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.flow.reactor import Loop
    from sluice.proxy.link import Call

REFUSED, TROUBLE = 126, 125


class AgentEnd:
    """A far end (``far.FarEnd``) that the agent's trigger socket was asked for."""

    def __init__(
        self,
        loop: Loop,
        call: Call,
        *,
        log: Callable[[str], None],
        timeout: float,
        agent_socket: str | None = None,
    ) -> None:
        """Take the call and the time, in seconds, in which the far end must answer."""
        self.in_fd = self.out_fd = -1
        self._loop = loop
        self._call = call
        self._log = log
        self._timeout = timeout
        self._agent_socket = agent_socket
        self._inner = (-1, -1)
        self._request: CallRequest | None = None
        self._channel: DataChannel | None = None
        self._lines = LineSplitter(lambda line: log(f"far end: {line}"))
        self._on_exit: Callable[[int], None] | None = None

    def start(self, on_exit: Callable[[int], None]) -> None:
        """Ask the agent for the call. Raises LocalError where it cannot be asked."""
        self._on_exit = on_exit
        read_in, self.in_fd = os.pipe2(os.O_CLOEXEC)
        self.out_fd, write_out = os.pipe2(os.O_CLOEXEC)
        self._inner = (read_in, write_out)
        try:
            self._request = CallRequest(
                self._loop,
                self._call.target.encode(),
                self._call.descriptor.encode(),
                agent_socket=self._agent_socket,
                on_open=self._opened,
                on_refused=self._refused,
                on_error=self._failed,
                timeout=self._timeout,
            )
        except LocalError:
            self._close_inner()
            os.close(self.in_fd)
            os.close(self.out_fd)
            raise

    def terminate(self) -> None:
        """End the call at once: there is no process that could take its time."""
        if self._channel is not None:
            self._channel.close()
        self._over(TROUBLE)

    kill = terminate

    def _opened(self, read_fd: int, write_fd: int) -> None:
        out_fd, in_fd = self._inner
        self._inner = (-1, -1)
        self._channel = DataChannel(
            self._loop,
            read_fd,
            write_fd,
            caller=True,
            in_fd=in_fd,
            out_fd=out_fd,
            on_stderr=self._lines.feed,
            on_done=self._done,
            on_fatal=self._failed,
        )
        self._channel.start()

    def _done(self, status: int) -> None:
        lost = self._channel is not None and self._channel.lost
        if lost:
            self._log("far end: the channel was lost")
        self._over(TROUBLE if lost else status)

    def _refused(self) -> None:
        self._log("far end: refused")
        self._over(REFUSED)

    def _failed(self, reason: str) -> None:
        self._log(f"far end: {reason}")
        self._over(TROUBLE)

    def _over(self, code: int) -> None:
        self._close_inner()
        self._lines.end()
        if self._request is not None:
            self._request.close()
            self._request = None
        on_exit, self._on_exit = self._on_exit, None
        if on_exit is not None:
            on_exit(code)

    def _close_inner(self) -> None:
        for fd in self._inner:
            if fd >= 0:
                os.close(fd)
        self._inner = (-1, -1)
