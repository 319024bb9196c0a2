"""The socket of a control channel and of local clients: pace, bounds, ends."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable

import pytest
from tests.support.adminvm import SERVICE_CONNECT, exec_body, hello, message, short_directory, until

from sluice.adminvm import control
from sluice.adminvm.control import ControlChannel
from sluice.adminvm.local import LocalServer


class Pair:
    """A channel, the agent's end of it, and what the channel told."""

    def __init__(self) -> None:
        ours, self.agent = socket.socketpair()
        self.agent.setblocking(False)
        self.heard = bytearray()
        self.ended = 0
        self.writable = 0
        self.channel = ControlChannel(
            asyncio.get_running_loop(),
            ours,
            on_bytes=self.heard.extend,
            on_end=self._end,
            on_writable=self._room,
        )

    def _end(self) -> None:
        self.ended += 1

    def _room(self) -> None:
        self.writable += 1

    def pour(self) -> int:
        """Send as the agent until nothing more is taken; returns how much."""
        sent = 0
        try:
            while True:
                sent += self.agent.send(bytes(16384))
        except BlockingIOError:
            return sent


def run(scene: Callable[[Pair], Awaitable[None]]) -> None:
    async def main() -> None:
        pair = Pair()
        with pair.agent:
            try:
                async with asyncio.timeout(20):
                    await scene(pair)
            finally:
                pair.channel.close()

    asyncio.run(main())


def test_an_agent_that_writes_without_end_is_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of it is the burst and then no more, though the loop has all the time."""
    monkeypatch.setattr(control, "PACE", 1)
    monkeypatch.setattr(control, "PACE_BURST", 100_000)

    async def scene(pair: Pair) -> None:
        pair.channel.start()
        for _ in range(100):
            pair.pour()
            await asyncio.sleep(0)
        # The read that goes into debt is the last.
        assert 100_000 <= len(pair.heard) < 100_000 + control.READ_SIZE
        assert pair.ended == 0

    run(scene)


def test_a_pace_that_was_paid_back_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "PACE", 1_000_000)
    monkeypatch.setattr(control, "PACE_BURST", 1000)

    async def scene(pair: Pair) -> None:
        pair.channel.start()
        sent = pair.pour()
        await until(lambda: len(pair.heard) == sent, "all of it")

    run(scene)


def test_what_the_agent_said_before_it_left_is_heard_after_a_failed_write() -> None:
    async def scene(pair: Pair) -> None:
        pair.agent.send(b"last words")
        pair.agent.close()
        pair.channel.send(b"x")
        assert (bytes(pair.heard), pair.ended, pair.channel.closed) == (b"last words", 1, True)
        pair.channel.send(b"y")
        assert pair.ended == 1

    run(scene)


def test_an_agent_that_hears_nothing_and_writes_without_end_is_cut_off() -> None:
    async def scene(pair: Pair) -> None:
        pair.agent.shutdown(socket.SHUT_RD)
        most = control.LAST_READS * control.READ_SIZE
        feeding = pair.heard

        def hear(data: bytes) -> None:
            feeding.extend(data)
            pair.pour()

        pair.channel._on_bytes = hear
        pair.pour()
        pair.channel.send(b"x")
        assert pair.ended == 1
        assert len(pair.heard) <= most

    run(scene)


def test_descriptors_that_were_not_sent_are_closed() -> None:
    async def scene(pair: Pair) -> None:
        pair.channel.send(bytes(2 << 20))
        read_fd, write_fd = os.pipe()
        pair.channel.send(b"x", (read_fd, write_fd))
        assert pair.channel.full
        pair.channel.close()
        for fd in (read_fd, write_fd):
            with pytest.raises(OSError, match="Bad file"):
                os.fstat(fd)
        assert not await pair.channel.room(1)

    run(scene)


# --- local clients ------------------------------------------------------------------------------


def test_more_local_clients_than_there_may_be_are_turned_away() -> None:
    async def main() -> None:
        said: list[str] = []
        loop = asyncio.get_running_loop()
        with short_directory() as directory:
            path = str(directory / "s")
            server = LocalServer(loop, path, lambda *_: None, said.append, max_sessions=2)
            clients = [await asyncio.open_unix_connection(path) for _ in range(3)]
            first = [await asyncio.wait_for(reader.read(12), 10) for reader, _ in clients]
            assert sorted(first) == [b"", hello(3), hello(3)]
            assert said == ["too many local clients"]
            clients[first.index(hello(3))][1].close()
            await until(lambda: len(server.sessions) == 1, "the end of a session")
            reader, writer = await asyncio.open_unix_connection(path)
            assert await asyncio.wait_for(reader.readexactly(12), 10) == hello(3)
            for _, one in [*clients, (reader, writer)]:
                one.close()
            server.close()

    asyncio.run(main())


def test_without_descriptors_local_clients_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the loop is not busy with them meanwhile."""

    class Exhausted:
        tries = 0

        def __init__(self, listener: socket.socket) -> None:
            self._listener = listener
            self.free = False

        def accept(self) -> tuple[socket.socket, object]:
            self.tries += 1
            if not self.free:
                raise OSError(errno.EMFILE, "Too many open files")
            return self._listener.accept()

        def __getattr__(self, name: str) -> object:
            return getattr(self._listener, name)

    async def main() -> None:
        said: list[str] = []
        requests: list[object] = []
        loop = asyncio.get_running_loop()
        with short_directory() as directory:
            path = str(directory / "s")
            server = LocalServer(loop, path, lambda *request: requests.append(request), said.append)
            gate = Exhausted(server._listener)
            server._listener = gate  # type: ignore[assignment]
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(hello(3) + message(SERVICE_CONNECT, exec_body(0, 0, b"I\0")))
            await until(lambda: gate.tries, "an attempt")
            for _ in range(50):
                await asyncio.sleep(0)
            assert gate.tries == 1
            gate.free = True
            assert await asyncio.wait_for(reader.readexactly(12), 10) == hello(3)
            await until(lambda: requests, "the request")
            assert said[0] == "no descriptor is left for another local client"
            writer.close()
            server.close()

    asyncio.run(main())
