"""The library for people: sluice.call and sluice.open_call, against a tester who is the agent."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from tests.support.agent import (
    EXIT,
    STDERR,
    STDIN,
    STDOUT,
    Place,
    Wire,
    a_place,
    send_fds,
    until,
)

import sluice
from sluice.errors import LocalError, ResourceError


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


class Service:
    """Accepts one request on the agent's socket and plays the other side in a thread."""

    def __init__(self, place: Place, play: Callable[[Wire], None] | None) -> None:
        self.listener = place.listen("run/agent")
        self.request = b""
        self.failure: BaseException | None = None
        self.gone = threading.Event()
        self._play = play
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            connection = self.listener.accept()[0]
            message = Wire(connection).next()
            assert message is not None
            self.request = message[1]
            if self._play is None:
                connection.close()
                return
            one_read, one_write = os.pipe()
            other_read, other_write = os.pipe()
            send_fds(connection, struct.pack("<II", 43, 1), [one_read, other_write])
            os.close(one_read)
            os.close(other_write)
            wire = Wire(other_read, one_write)
            wire.shake()
            self._play(wire)
            wire.close()
            assert Wire(connection).ended()
            self.gone.set()
            connection.close()
        except BaseException as error:
            self.failure = error

    def check(self) -> None:
        self.thread.join(20)
        if self.failure is not None:
            raise self.failure


def add(wire: Wire) -> None:
    """Answer like test.Add."""
    data = b""
    while (message := wire.next()) is not None and message[1]:
        assert message[0] == STDIN
        data += message[1]
    wire.message(STDERR, b"adding\n")
    wire.message(STDOUT, b"%d\n" % sum(map(int, data.split())))
    finish(wire)


def finish(wire: Wire, status: int = 0) -> None:
    wire.message(STDOUT)
    wire.message(STDERR)
    wire.message(EXIT, struct.pack("<i", status))


def test_a_whole_call(place: Place) -> None:
    service = Service(place, add)
    result = asyncio.run(
        sluice.call(
            "vault", "test.Add", argument="x", input=b"1 2\n", agent_socket=str(place.agent_socket)
        )
    )
    assert (result.output, result.errors, result.status) == (b"3\n", b"adding\n", 0)
    assert bytes(result) == b"3\n" and "2 bytes" in repr(result)
    service.check()
    assert service.request[64:128].rstrip(b"\0") == b"vault"
    assert service.request[160:] == b"test.Add+x\0"


def test_the_agent_is_found_by_its_variable(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_AGENT_SOCKET", str(place.agent_socket))
    service = Service(place, add)
    assert asyncio.run(sluice.call("vault", "test.Add", input=b"1 2")).output == b"3\n"
    service.check()


def test_refusal(place: Place) -> None:
    service = Service(place, None)
    with pytest.raises(sluice.CallRefused) as caught:
        asyncio.run(sluice.call("vault", "test.Add", agent_socket=str(place.agent_socket)))
    assert caught.value.status == 126
    service.check()


def test_no_agent(place: Place) -> None:
    with pytest.raises(sluice.CallRefused) as caught:
        asyncio.run(sluice.call("vault", "test.Add", agent_socket=str(place.agent_socket)))
    assert caught.value.status == 1


@pytest.mark.parametrize("status", [1, 127, 255])
def test_a_failed_service(place: Place, status: int) -> None:
    service = Service(place, lambda wire: (wire.message(STDOUT, b"x"), finish(wire, status))[1])
    with pytest.raises(sluice.CallFailed) as caught:
        asyncio.run(sluice.call("vault", "test.Add", agent_socket=str(place.agent_socket)))
    assert caught.value.status == status and caught.value.result.output == b"x"
    service.check()


def test_without_check_the_status_is_returned(place: Place) -> None:
    service = Service(place, lambda wire: finish(wire, 7))
    result = asyncio.run(
        sluice.call("vault", "test.Add", check=False, agent_socket=str(place.agent_socket))
    )
    assert result.status == 7
    service.check()


def test_a_lost_call(place: Place) -> None:
    service = Service(place, lambda wire: wire.message(STDOUT, b"some"))
    with pytest.raises(sluice.CallLost):
        asyncio.run(sluice.call("vault", "test.Add", agent_socket=str(place.agent_socket)))
    service.check()


def test_a_timeout_ends_the_call(place: Place) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        began, real = loop.time(), loop.time

        def play(wire: Wire) -> None:
            # The call has begun: the clock jumps to where its time is over.
            loop.time = lambda: real() + 10_000  # type: ignore[method-assign]
            loop.call_soon_threadsafe(lambda: None)
            wire.rest()

        services.append(Service(place, play))
        with pytest.raises(TimeoutError):
            await sluice.call(
                "vault", "test.Slow", timeout=5_000, agent_socket=str(place.agent_socket)
            )
        assert loop.time() - began > 5_000

    services: list[Service] = []
    asyncio.run(main())
    (service,) = services
    service.check()
    assert service.gone.is_set()


def test_cancelling_the_task_ends_the_call(place: Place) -> None:
    service = Service(place, lambda wire: wire.rest() and None)

    async def main() -> None:
        task = asyncio.ensure_future(
            sluice.call("vault", "test.Slow", agent_socket=str(place.agent_socket))
        )
        await asyncio.to_thread(until, lambda: service.request, "the request")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    service.thread.join(20)


def test_too_much_output(place: Place) -> None:
    def flood(wire: Wire) -> None:
        try:
            for _ in range(100):
                wire.message(STDOUT, b"x" * 60000)
        except BrokenPipeError:
            pass

    service = Service(place, flood)
    with pytest.raises(ResourceError):
        asyncio.run(
            sluice.call("vault", "test.Add", limit=100000, agent_socket=str(place.agent_socket))
        )
    service.check()


def test_a_service_that_does_not_read_its_input(place: Place) -> None:
    def close_early(wire: Wire) -> None:
        wire.message(STDOUT, b"done")
        finish(wire)
        wire.rest()

    service = Service(place, close_early)
    result = asyncio.run(
        sluice.call(
            "vault", "test.Add", input=b"x" * (4 << 20), agent_socket=str(place.agent_socket)
        )
    )
    assert result.output == b"done"
    service.check()


def test_streaming_both_ways(place: Place) -> None:
    def echo(wire: Wire) -> None:
        while (message := wire.next()) is not None and message[1]:
            wire.message(STDOUT, message[1].upper())
        finish(wire, 3)

    service = Service(place, echo)

    async def main() -> None:
        async with sluice.open_call(
            "vault", "test.Echo", agent_socket=str(place.agent_socket)
        ) as call:
            for word in (b"one", b"two"):
                await call.send(word)
                assert await call.receive() == word.upper()
            await call.send_eof()
            with pytest.raises(LocalError):
                await call.send(b"x")
            assert [piece async for piece in call] == []
            assert await call.wait() == 3

    asyncio.run(main())
    service.check()


def test_a_megabyte_with_back_pressure(place: Place) -> None:
    received = bytearray()

    def echo(wire: Wire) -> None:
        while (message := wire.next()) is not None and message[1]:
            received.extend(message[1])
        wire.message(STDOUT, b"x" * 65536)
        for _ in range(15):
            wire.message(STDOUT, b"x" * 65536)
        finish(wire)

    service = Service(place, echo)
    sent = os.urandom(1 << 20)
    result = asyncio.run(
        sluice.call("vault", "test.Echo", input=sent, agent_socket=str(place.agent_socket))
    )
    assert bytes(received) == sent and len(result.output) == 1 << 20
    service.check()


def test_leaving_the_block_ends_the_call_and_leaves_no_descriptor(place: Place) -> None:
    begun = threading.Event()

    def play(wire: Wire) -> None:
        begun.set()
        wire.rest()

    service = Service(place, play)

    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        async with sluice.open_call(
            "vault", "test.Slow", agent_socket=str(place.agent_socket)
        ) as call:
            await call.send(b"x")
            # Later than its handshake, which would find nobody.
            assert await asyncio.to_thread(begun.wait, 20)
        await asyncio.to_thread(service.gone.wait, 20)
        with pytest.raises(sluice.CallLost):
            await call.wait()
        # Ours are gone; those of the service's thread go with it, a moment later.
        await asyncio.to_thread(service.check)
        # The loop keeps one, by which it hears of hang-ups.
        assert len(os.listdir("/proc/self/fd")) <= before + 1

    # Made before the descriptors are counted.
    socket.socketpair()[0].close()
    asyncio.run(main())
    service.check()


@pytest.mark.parametrize("service", ["", "a b", "a\0b"])
def test_names_that_no_service_can_have(service: str) -> None:
    with pytest.raises(LocalError):
        asyncio.run(sluice.call("vault", service, agent_socket="/nowhere"))


def test_without_an_agent_the_dom0_client_is_used(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In dom0 there is no agent: qrexec-client makes the call."""
    client = place.service(
        "qrexec-client", '#!/bin/sh\nread x; echo "got $x: $*"; echo err >&2; exit 4\n', "run"
    )
    monkeypatch.setattr("sluice.runtime.launcher", lambda _name: str(client))
    result = asyncio.run(
        sluice.call("vault", "test.S", input=b"in\n", daemon_directory="/d", check=False)
    )
    words = "-d vault --socket-dir=/d DEFAULT:QUBESRPC test.S dom0"
    assert result.output.decode() == f"got in: {words}\n"
    assert (result.errors, result.status) == (b"err\n", 4)


def test_giving_up_kills_the_dom0_client(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = place.path / "run" / "pid"
    client = place.service("qrexec-client", f"#!/bin/sh\necho $$ >{mark}\nexec sleep 1000\n", "run")
    monkeypatch.setattr("sluice.runtime.launcher", lambda _name: str(client))

    async def main() -> None:
        async with sluice.open_call("vault", "test.S", daemon_directory="/d"):
            await asyncio.to_thread(until, lambda: mark.exists() and mark.read_text(), "a start")

    asyncio.run(main())
    assert not os.path.exists(f"/proc/{mark.read_text().strip()}")


def test_the_package_loads_the_library_lazily() -> None:
    assert sluice.SocketServer.__module__ == "sluice.socketserver"
    with pytest.raises(AttributeError):
        sluice.nonsense  # noqa: B018
