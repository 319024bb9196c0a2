"""The local program of qrexec-client-vm: the other end of a call instead of stdin and stdout.

docs/spec/wire-protocol.md 11.3.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # it has no stub
import _socket
import os

from sluice.agent.log import write_line
from sluice.agent.processes import ProcessTable
from sluice.service.command import ServiceError
from sluice.service.start import spawn
from sluice.wire.messages import EXIT_LOST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.flow.channel import DataChannel
    from sluice.flow.reactor import Loop


class LocalProgram:
    """PROGRAM with its arguments, started; ``in_fd`` and ``out_fd`` are our ends of its streams."""

    def __init__(self, loop: Loop, words: list[bytes]) -> None:
        """Start ``words[0]``. One that cannot be executed counts as exited with 255."""
        self._status: int | None = None
        self._switched = False
        self._channel: DataChannel | None = None
        environment = dict(os.environb)
        environment[b"QREXEC_AGENT_PID"] = b"%d" % os.getpid()
        # First of all, to get low numbers: many a shell can redirect to one digit only.
        saved = []
        for fd in (0, 1, 2) if b"PASS_LOCAL_STDERR" in environment else (0, 1):
            copy = os.dup(fd)
            os.set_inheritable(copy, True)
            saved.append(copy)
            environment[b"SAVED_FD_%d" % fd] = b"%d" % copy
        processes = ProcessTable(loop)
        self.hear_signals = processes.hear_signals
        # It may switch to a single socket as soon as it runs; whoever sends the signal means us.
        processes.on_signal(_signal.SIGUSR1, self._switch)
        mine_in, theirs_in = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        mine_out, theirs_out = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self.in_fd = mine_in.detach()
        self.out_fd = mine_out.detach()
        try:
            argv = [os.path.basename(words[0]), *words[1:]]
            pid = spawn(
                argv,
                environment,
                theirs_in.fileno(),
                theirs_out.fileno(),
                2,
                path=words[0],
                session=False,
            )
            processes.watch(pid, self._exited)
        except ServiceError as error:
            write_line(f"qrexec-client-vm: {error}")
            self._status = EXIT_LOST
        finally:
            theirs_in.close()
            theirs_out.close()
            for copy in saved:
                os.close(copy)

    def _exited(self, status: int) -> None:
        self._status = status
        if self._channel is not None:
            self._channel.process_exited(status)

    def _switch(self) -> None:
        self._switched = True
        if self._channel is not None:
            self._channel.use_single_socket()

    def follow(self, channel: DataChannel) -> None:
        """Tell ``channel`` of the program's end and of its signal, also of what was before."""
        self._channel = channel
        if self._switched:
            channel.use_single_socket()
        if self._status is not None:
            channel.process_exited(self._status)
