"""The library's calls when their two directions end apart, or while somebody still uses them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator

import pytest
from tests.agent.test_agent_api import Service, finish
from tests.support.agent import STDIN, STDOUT, Place, Wire, a_place

import sluice
from sluice.errors import LocalError

BIG = os.urandom(3 << 20)  # more than all buffers on the way hold


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


def soon(coroutine: Coroutine[object, object, None]) -> None:
    """Run a test that would hang where it fails."""

    async def bounded() -> None:
        async with asyncio.timeout(60):
            await coroutine

    asyncio.run(bounded())


class Reader:
    """A service that ends its output at once, and only then reads its input to the end."""

    def __init__(self) -> None:
        self.received = bytearray()

    def __call__(self, wire: Wire) -> None:
        wire.message(STDOUT)
        while (message := wire.next()) is not None and message[1]:
            assert message[0] == STDIN
            self.received += message[1]
        finish_quietly(wire)


def finish_quietly(wire: Wire) -> None:
    """End a call whose output has ended already."""
    wire.message(0x192)
    wire.message(0x193, bytes(4))


def test_input_is_sent_whole_though_the_output_has_ended(place: Place) -> None:
    reader = Reader()
    service = Service(place, reader)
    result = asyncio.run(
        sluice.call("vault", "s", input=BIG, timeout=60, agent_socket=str(place.agent_socket))
    )
    service.check()
    assert result.status == 0 and bytes(reader.received) == BIG


def test_waiting_does_not_cut_off_what_another_task_sends(place: Place) -> None:
    reader = Reader()
    service = Service(place, reader)

    async def main() -> None:
        async with sluice.open_call("vault", "s", agent_socket=str(place.agent_socket)) as call:
            sending = asyncio.ensure_future(call.send(BIG))
            assert await call.receive() == b""
            assert await call.wait() == 0
            await sending

    soon(main())
    service.check()
    assert bytes(reader.received) == BIG


def test_two_tasks_send_and_two_receive(place: Place) -> None:
    reader = Reader()
    service = Service(place, reader)

    async def main() -> None:
        async with sluice.open_call("vault", "s", agent_socket=str(place.agent_socket)) as call:
            sending = asyncio.gather(call.send(BIG), call.send(BIG))
            assert await asyncio.gather(call.receive(), call.receive()) == [b"", b""]
            await sending
            assert await call.wait() == 0

    soon(main())
    service.check()
    assert len(reader.received) == 2 * len(BIG)


class Idle:
    """A service that neither reads nor writes until its caller has gone."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.over = threading.Event()

    def __call__(self, _wire: Wire) -> None:
        self.begun.set()
        assert self.over.wait(60)

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, 60)


@pytest.mark.parametrize("direction", ["send", "receive"])
def test_leaving_the_block_wakes_whoever_waits_in_it(place: Place, direction: str) -> None:
    idle = Idle()
    service = Service(place, idle)

    async def main() -> None:
        async with sluice.open_call("vault", "s", agent_socket=str(place.agent_socket)) as call:
            await idle.has_begun()
            other = call.send(BIG) if direction == "send" else call.receive()
            waiting = asyncio.ensure_future(other)
            while not call._waiting:
                await asyncio.sleep(0)
        with pytest.raises(sluice.CallLost):
            await waiting

    soon(main())
    idle.over.set()
    service.check()


def test_ending_the_input_stops_a_send_under_way(place: Place) -> None:
    idle = Idle()
    service = Service(place, idle)

    async def main() -> None:
        async with sluice.open_call("vault", "s", agent_socket=str(place.agent_socket)) as call:
            await idle.has_begun()
            waiting = asyncio.ensure_future(call.send(BIG))
            while not call._waiting:
                await asyncio.sleep(0)
            await call.send_eof()
            with pytest.raises(LocalError, match="send_eof"):
                await waiting

    soon(main())
    idle.over.set()
    service.check()


def test_a_call_that_is_left_takes_and_gives_nothing(place: Place) -> None:
    service = Service(place, finish)

    async def main() -> None:
        async with sluice.open_call("vault", "s", agent_socket=str(place.agent_socket)) as call:
            assert await call.receive() == b""
            assert await call.wait() == 0
        with pytest.raises(LocalError):
            await call.send(b"x")
        assert await call.receive() == b""
        assert await call.wait() == 0

    soon(main())
    service.check()


def test_a_call_that_is_left_early_takes_and_gives_nothing(place: Place) -> None:
    idle = Idle()
    service = Service(place, idle)

    async def main() -> None:
        async with sluice.open_call("vault", "s", agent_socket=str(place.agent_socket)) as call:
            await idle.has_begun()
        for use in (call.send(b"x"), call.receive(), call.wait()):
            with pytest.raises(sluice.CallLost):
                await use
        idle.over.set()

    soon(main())
    service.check()


@pytest.mark.parametrize(
    ("status", "word", "text"),
    [
        (127, b"", "s of vault ended with status 127: the target has no such service"),
        (125, b"", "s of vault ended with status 125: it could not be started"),
        (127, b"spoken", "s of vault ended with status 127"),
        (3, b"", "s of vault ended with status 3"),
    ],
)
def test_a_failed_start_is_told(place: Place, status: int, word: bytes, text: str) -> None:
    def play(wire: Wire) -> None:
        if word:
            wire.message(STDOUT, word)
        finish(wire, status)

    service = Service(place, play)
    with pytest.raises(sluice.CallFailed) as caught:
        asyncio.run(sluice.call("vault", "s", agent_socket=str(place.agent_socket)))
    service.check()
    assert str(caught.value) == text and caught.value.status == status
