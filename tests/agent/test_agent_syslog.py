"""The system log that an agent serves in a sandbox."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sluice.agent.log import LineSink
from sluice.agent.syslog import SyslogSocket, text_of
from sluice.flow.reactor import Reactor


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"<30>qrexec-proxy[3]: a line", b"qrexec-proxy[3]: a line"),
        (b"<13>Nov 21 08:42:45 user: said\n\0", b"user: said"),
        (b"plain", b"plain"),
        (b"<>", b""),
        (b"<no number far away>", b"<no number far away>"),
        (b"Jan", b"Jan"),
    ],
)
def test_priority_and_time_are_stripped(message: bytes, text: bytes) -> None:
    assert text_of(message) == text


def test_messages_become_escaped_lines(tmp_path: Path) -> None:
    loop = Reactor()
    lines: list[str] = []

    def write(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            loop.stop()

    path = str(tmp_path / "log")
    log = SyslogSocket(loop, path, LineSink(loop, b"log", write))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"<30>first \x1b[31m\nsecond", path)
        sender.sendto(b"<30>third", path)
    guard = loop.call_later(30, loop.stop)
    loop.run()
    guard.cancel()
    log.close()
    assert lines == ["log: first \\x1b[31m second", "log: third"]
