"""The descriptor of a control channel on an asyncio loop: reading, and sending with back-pressure.

What comes up is read with plain ``recv``: there is no control buffer, so that a descriptor which a
domain sends along is dropped by the kernel and never exists here (docs/spec/wire-protocol.md 20).
What goes down may carry descriptors; they travel with the first byte of their message and our
copies are closed at that moment, or when the channel ends.

Bounds: what an agent does not read is queued up to ``FULL`` bytes, above which we stop listening to
it and give it no new calls; what it sends is paced by a bucket of bytes, so that an agent that
writes without end costs a small part of one processor.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

from sluice.adminvm.bucket import TokenBucket

READ_SIZE = 16384
BUSY = 65536  # queued bytes above which no new local request is read
FULL = 1 << 20  # queued bytes above which the agent is not listened to and gets no calls
PACE = 1 << 20  # bytes a second from the agent, in the long run
PACE_BURST = 16 << 20
LAST_READS = 64
CROWD = 128  # queued descriptors above which further calls wait, so that few of ours are held
SEND_BUFFER = 32768  # small, so that few descriptors can be in flight to one domain

_AGAIN = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR)


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that are ours."""
    for fd in fds:
        os.close(fd)


class ControlChannel:
    """One control channel's socket. It owns the socket and all descriptors given to ``send``."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        *,
        on_bytes: Callable[[bytes], None],
        on_end: Callable[[], None],
        on_writable: Callable[[], None],
        bounded_flight: bool = False,
    ) -> None:
        """Take a connected stream socket.

        ``on_bytes`` gets what the agent sent, ``on_end`` is called once when the channel is gone,
        ``on_writable`` when the queue fell below ``BUSY`` again. ``bounded_flight`` keeps the
        kernel's buffer small (transport ``passed``).
        """
        self._loop = loop
        self._sock = sock
        self._on_bytes = on_bytes
        self._on_end = on_end
        self._on_writable = on_writable
        self._queue: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._bucket = TokenBucket(PACE, PACE_BURST, loop.time)
        self._pause: asyncio.TimerHandle | None = None
        self._reading = False
        self._writing = False
        self._waiting: list[asyncio.Future[None]] = []
        self._pressed = False
        self.queued = 0
        self.carried = 0
        self.closed = False
        sock.setblocking(False)
        if bounded_flight:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def start(self) -> None:
        """Begin to read."""
        self._listen()

    @property
    def busy(self) -> bool:
        """Whether local requests should wait (section 6.3)."""
        return self.queued > BUSY or self.carried > CROWD

    @property
    def full(self) -> bool:
        """Whether the agent must not be given more."""
        return self.queued > FULL

    # --- down -----------------------------------------------------------------------------

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Queue one message and the descriptors that travel with its first byte."""
        if self.closed or not data:
            close_all(fds)
            return
        self._queue.append((memoryview(data), tuple(fds)))
        self.queued += len(data)
        self.carried += len(fds)
        if not self._writing:
            self._flush()
        self._pressed = self._pressed or self.busy
        if self.full:
            self._deafen()

    async def room(self, seconds: float) -> bool:
        """Wait until the channel is not busy, at most ``seconds``; tell whether it is so now."""
        end = self._loop.time() + seconds
        while self.busy and not self.closed:
            turn: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append(turn)
            await asyncio.wait({turn}, timeout=end - self._loop.time())
            if not turn.done():
                self._waiting.remove(turn)
                return False
        return not self.closed

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)

    def _flush(self) -> None:
        """Send what the socket takes, then go on with what waited for that."""
        while self._queue:
            data, fds = self._queue[0]
            sent = self._send_some(data, fds)
            if sent < 0:
                return
            if sent == 0:
                break
            self.queued -= sent
            if sent == len(data):
                self._queue.popleft()
            else:
                self._queue[0] = (data[sent:], ())
        self._watch_writable(bool(self._queue))
        if not self._pause:
            self._listen()
        if self._pressed and not self.busy:
            self._pressed = False
            self._wake()
            self._on_writable()

    def _watch_writable(self, wanted: bool) -> None:
        if wanted and not self._writing:
            self._loop.add_writer(self._sock.fileno(), self._flush)
        elif self._writing and not wanted:
            self._loop.remove_writer(self._sock.fileno())
        self._writing = wanted

    def _send_some(self, data: memoryview, fds: tuple[int, ...]) -> int:
        """Send what fits: bytes sent, 0 where nothing fits now, -1 where the channel is gone."""
        try:
            if not fds:
                return self._sock.send(data)
            sent = socket.send_fds(self._sock, [data], list(fds))
        except OSError as error:
            if error.errno in _AGAIN:
                return 0
            if error.errno == errno.ETOOMANYREFS and fds:
                # The kernel has too many descriptors in flight for this user. The message goes
                # without: the agent then ends that call with a failed start, nobody waits.
                self._queue[0] = (data, ())
                self._release(fds)
                return self._send_some(data, ())
            self._fail()
            return -1
        self._release(fds)
        return sent

    def _release(self, fds: tuple[int, ...]) -> None:
        self.carried -= len(fds)
        close_all(fds)

    # --- up -------------------------------------------------------------------------------

    def _listen(self) -> None:
        if not self._reading and not self.closed and not self.full:
            self._reading = True
            self._loop.add_reader(self._sock.fileno(), self._readable)

    def _deafen(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock.fileno())

    def _readable(self) -> None:
        try:
            untrusted_data = self._sock.recv(READ_SIZE)
        except OSError as error:
            if error.errno in _AGAIN:
                return
            untrusted_data = b""
        if not untrusted_data:
            self._fail()
            return
        debt = self._bucket.spend(len(untrusted_data))
        if debt:
            self._deafen()
            self._pause = self._loop.call_later(debt, self._resume)
        self._on_bytes(untrusted_data)

    def _resume(self) -> None:
        self._pause = None
        self._listen()

    # --- the end --------------------------------------------------------------------------

    def _fail(self) -> None:
        """End the channel because the other side is gone.

        After a failed write the agent's last bytes are still read: they may report ends of calls.
        An agent that shut down one direction and writes into the other without end is cut off.
        """
        for _ in range(LAST_READS):
            try:
                untrusted_data = self._sock.recv(READ_SIZE)
            except OSError:
                break
            if not untrusted_data or self.closed:
                break
            self._on_bytes(untrusted_data)
        if not self.closed:
            self.close()
            self._on_end()

    def close(self) -> None:
        """Close at once; what is queued is lost, its descriptors are closed. Calls nobody."""
        if self.closed:
            return
        self.closed = True
        self._deafen()
        if self._writing:
            self._loop.remove_writer(self._sock.fileno())
        if self._pause:
            self._pause.cancel()
        for _, fds in self._queue:
            self._release(fds)
        self._queue.clear()
        self.queued = 0
        self._wake()
        self._sock.close()
