"""The system log of a domain that has none of its own, served by the agent.

In a sandbox ``/dev/log`` leads to the socket here, so that ``logger``, the proxy and whatever uses
``syslog`` find what they expect.
Each message becomes one line on the agent's stderr, which the AdminVM reads bounded and shows with
``sluice log``. What cannot be taken is dropped: a log holds up nobody.
"""

from __future__ import annotations

import _socket
import os

from sluice.agent.log import LineSink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.flow.reactor import Loop

PATH = "/run/qubes/log"
MAX_MESSAGE = 4096
AT_ONCE = 64  # messages read before other descriptors have their turn
_MONTHS = (b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun",
           b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec")  # fmt: skip
_STAMP = len(b"Jan  1 00:00:00 ")


def text_of(untrusted_message: bytes) -> bytes:
    """Strip priority and time stamp of a message; the log that takes it has its own of both."""
    text = untrusted_message.rstrip(b"\n\0")
    if text[:1] == b"<" and b">" in text[:6]:
        text = text[text.index(b">") + 1 :]
    if text[:3] in _MONTHS and text[_STAMP - 1 : _STAMP] == b" ":
        text = text[_STAMP:]
    return text


class SyslogSocket:
    """The datagram socket; messages of a flood are folded into a count."""

    def __init__(self, loop: Loop, path: str = PATH, sink: LineSink | None = None) -> None:
        """Listen on ``path``. Raises OSError where that cannot be."""
        self._loop = loop
        self._sink = sink if sink is not None else LineSink(loop, b"log")
        flags = _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        self._socket = _socket.socket(_socket.AF_UNIX, flags)
        try:
            self._socket.bind(path)
            os.chmod(path, 0o666)  # noqa: S103  every user of the domain may log
        except OSError:
            self._socket.close()
            raise
        loop.add_reader(self._socket.fileno(), self._readable)

    def _readable(self) -> None:
        for _ in range(AT_ONCE):
            try:
                untrusted_message = self._socket.recv(MAX_MESSAGE)
            except OSError:
                return
            self._sink.feed(text_of(untrusted_message).replace(b"\n", b" ") + b"\n")

    def close(self) -> None:
        """Listen no more."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._sink.close()
