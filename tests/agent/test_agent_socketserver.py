"""sluice.SocketServer: descriptors, several services, limits, deadlines, systemd's sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import sluice
from sluice import socketserver
from sluice.errors import LocalError
from sluice.socketserver import listen_at, listen_fds


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    yield f"/tmp/s-ss-{os.getpid()}"
    Path(f"/tmp/s-ss-{os.getpid()}").unlink(missing_ok=True)


def serve(server: sluice.SocketServer, test: Callable[[], Awaitable[None]]) -> None:
    """Run a test against a started server."""

    async def main() -> None:
        await server.start()
        try:
            async with asyncio.timeout(20):
                await test()
        finally:
            await server.stop()

    asyncio.run(main())


async def exchange(path: str, data: bytes, *, eof: bool = True) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(data)
    if eof:
        writer.write_eof()
    try:
        return await reader.read()
    except ConnectionResetError:
        return b"(reset)"
    finally:
        writer.close()


def make(path: str, **options: object) -> sluice.SocketServer:
    server = sluice.SocketServer(path, **options)  # type: ignore[arg-type]

    @server.service("test.Upper")
    async def upper(request: sluice.ServiceRequest) -> bytes:
        return (await request.read(limit=1000)).upper()

    @server.service("test.Who")
    async def who(request: sluice.ServiceRequest) -> None:
        shown = (request.service, request.argument, request.source, request.target_type)
        await request.write(repr((*shown, request.target)).encode())

    @server.service("test.Fail")
    async def fail(request: sluice.ServiceRequest) -> bytes:
        raise ValueError("a bug")

    @server.service("test.Hang")
    async def hang(request: sluice.ServiceRequest) -> None:
        await asyncio.sleep(1000)

    return server


def test_services_on_one_socket(path: str) -> None:
    async def test() -> None:
        assert await exchange(path, b"test.Upper work\0abc") == b"ABC"
        expected = ("test.Who", "a+b", "work", "", "")
        assert await exchange(path, b"test.Who+a+b work\0") == repr(expected).encode()
        expected = ("test.Who", "", "work", "keyword", "default")
        descriptor = b"test.Who+ work keyword default\0"
        assert await exchange(path, descriptor) == repr(expected).encode()
        assert b"None" in await exchange(path, b"test.Who work\0", eof=False)

    serve(make(path), test)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no descriptor",
        b"\0",
        b"test.Upper\0",
        b"test.Upper work name\0",
        b"test.Upp\xc3\xa9r work\0",
        b"test.Upper wo\x1brk\0",
        b"test.None work\0",
        b"x" * 70000 + b" work\0",
        b"test.Upper work\0" + b"x" * 2000,
        b"test.Fail work\0",
    ],
)
def test_what_is_given_up(path: str, data: bytes) -> None:
    """The caller sees the end, the server goes on."""

    async def test() -> None:
        assert await exchange(path, data) in (b"", b"(reset)")
        assert await exchange(path, b"test.Upper work\0x") == b"X"

    serve(make(path), test)


def test_a_handler_for_all_others(path: str) -> None:
    server = make(path)

    @server.service("*")
    async def other(request: sluice.ServiceRequest) -> bytes:
        return request.full_name.encode()

    async def test() -> None:
        assert await exchange(path, b"any.Thing+x work\0") == b"any.Thing+x"
        assert await exchange(path, b"test.Upper work\0x") == b"X"

    serve(server, test)


def test_deadlines(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socketserver, "DESCRIPTOR_TIMEOUT", 0.05)

    async def test() -> None:
        assert await exchange(path, b"test.Upper", eof=False) == b""
        assert await exchange(path, b"test.Hang work\0") == b""
        assert await exchange(path, b"test.Upper work\0half", eof=False) == b""

    serve(make(path, call_timeout=0.1), test)


def test_calls_over_the_bound_wait(path: str) -> None:
    async def test() -> None:
        first = await asyncio.open_unix_connection(path)
        first[1].write(b"test.Upper work\0one")
        second = await asyncio.open_unix_connection(path)
        second[1].write(b"test.Upper work\0two")
        second[1].write_eof()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await second[0].read()
        first[1].write_eof()
        assert await first[0].read() == b"ONE"
        assert await second[0].read() == b"TWO"
        first[1].close()
        second[1].close()

    serve(make(path, max_calls=1), test)


def test_run_ends_with_sigterm_and_gives_calls_time(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socketserver, "DRAIN_TIMEOUT", 0.1)
    server = make(path)

    async def main() -> None:
        task = asyncio.ensure_future(server.run())
        while not os.path.exists(path):
            await asyncio.sleep(0)
        hanging = asyncio.ensure_future(exchange(path, b"test.Hang work\0"))
        async with asyncio.timeout(20):
            while not server._calls:
                await asyncio.sleep(0)
            os.kill(os.getpid(), signal.SIGTERM)
            await task
            assert await hanging == b""

    asyncio.run(main())
    assert not os.path.exists(path)


def test_run_ends_when_idle(path: str) -> None:
    server = make(path, idle_timeout=0.1)

    async def main() -> None:
        async with asyncio.timeout(20):
            task = asyncio.ensure_future(server.run())
            while not os.path.exists(path):
                await asyncio.sleep(0)
            assert await exchange(path, b"test.Upper work\0x") == b"X"
            await task

    asyncio.run(main())


def test_who_connects_when_the_server_has_been_idle_for_long_enough_is_served(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the very last moment: between the look at the clock and the end."""
    server = make(path, idle_timeout=0.01)
    connections: list[socket.socket] = []
    left = server._idle_left

    def looked() -> float | None:
        found = left()
        if not found and not connections:
            connections.append(socket.socket(socket.AF_UNIX))
            connections[0].connect(path)
            connections[0].sendall(b"test.Upper work\0x")
            connections[0].shutdown(socket.SHUT_WR)
        return found

    monkeypatch.setattr(server, "_idle_left", looked)
    asyncio.run(server.run())
    with connections[0] as connection:
        connection.settimeout(20)
        assert connection.recv(10) == b"X"


def test_a_stale_socket_is_replaced_a_live_one_is_not(path: str) -> None:
    listen_at(path, 0o600).close()
    listener = listen_at(path, 0o640)
    assert os.stat(path).st_mode & 0o777 == 0o640
    with pytest.raises(LocalError, match="another server"):
        listen_at(path, 0o600)
    listener.close()
    with pytest.raises(LocalError, match="cannot listen"):
        listen_at("/nowhere/s", 0o600)


def test_systemds_sockets_are_taken_when_they_are_ours(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = listen_at(path, 0o600)
    # A number above all others, so that the descriptors of this process are left alone.
    number = 200
    os.dup2(listener.fileno(), number)
    monkeypatch.setattr(socketserver, "FIRST_LISTEN_FD", number)
    for pid, expected in ((os.getpid() + 1, 0), (os.getpid(), 1)):
        monkeypatch.setenv("LISTEN_PID", str(pid))
        monkeypatch.setenv("LISTEN_FDS", "1")
        monkeypatch.setenv("LISTEN_FDNAMES", "x")
        sockets = listen_fds()
        assert len(sockets) == expected
        assert not {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} & set(os.environ)
    assert sockets[0].fileno() == number and not os.get_inheritable(number)
    sockets[0].close()
    listener.close()


def test_descriptors_that_systemd_cannot_have_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socketserver, "FIRST_LISTEN_FD", 200)
    one, other = socket.socketpair()
    for fd in (os.open("/dev/null", os.O_RDONLY), one.fileno()):
        os.dup2(fd, 200)
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "1")
        with pytest.raises(LocalError):
            listen_fds()
    other.close()
    one.close()


def test_nowhere_to_listen() -> None:
    with pytest.raises(LocalError, match="no path"):
        asyncio.run(sluice.SocketServer().start())


def test_readiness_is_announced(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(f"\0{path}")
    receiver.settimeout(10)
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{path}")

    async def test() -> None:
        assert receiver.recv(100) == b"READY=1"

    serve(make(path), test)
    receiver.close()
