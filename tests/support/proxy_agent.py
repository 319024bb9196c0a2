"""A stand-in for a domain's agent: answers one trigger over transport `passed`."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from typing import Any

from sluice.flow.channel import DataChannel
from sluice.proxy.far import ProgramEnd
from sluice.vchan.passed import make_pair
from sluice.wire.messages import EXEC_PARAMS


class StandInAgent:
    """Listens on ``path``; runs a shell command as the far service, or refuses (command None)."""

    def __init__(self, loop: Any, command: str | None) -> None:
        """Begin to listen on the loop."""
        self._loop = loop
        self._command = command
        self._directory = tempfile.mkdtemp(prefix="s-", dir="/tmp")
        self.path = f"{self._directory}/agent"
        self.asked: list[tuple[bytes, bytes]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._keep: list[Any] = []
        loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._keep.append(connection)
        self._loop.add_reader(connection.fileno(), self._ask, connection)

    def _ask(self, connection: socket.socket) -> None:
        message = connection.recv(65536)
        if not message:
            self._loop.remove_reader(connection.fileno())
            connection.close()
            return
        body = message[8:]
        self.asked.append((body[64:128].split(b"\0")[0], body[160:].split(b"\0")[0]))
        if self._command is None:
            self._loop.remove_reader(connection.fileno())
            connection.close()
            return
        (a_read, a_write), (b_read, b_write) = make_pair()
        socket.send_fds(connection, [EXEC_PARAMS.pack(1, 512)], [a_read, a_write])
        os.close(a_read)
        os.close(a_write)
        errors_read, errors_write = os.pipe2(os.O_CLOEXEC)
        program = ProgramEnd(
            self._loop, ["/bin/sh", "-c", self._command], log=print, stderr_fd=errors_write
        )
        program.start(lambda code: channel.process_exited(code))
        os.close(errors_write)
        channel = DataChannel(
            self._loop,
            b_read,
            b_write,
            caller=False,
            in_fd=program.in_fd,
            out_fd=program.out_fd,
            err_fd=errors_read,
            has_process=True,
            on_done=lambda status: None,
            on_fatal=print,
        )
        self._keep.append(channel)
        channel.start()

    def close(self) -> None:
        """Stop listening and remove the directory."""
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        shutil.rmtree(self._directory)
