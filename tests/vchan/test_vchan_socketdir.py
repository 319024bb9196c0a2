"""vchans over Unix sockets in a directory, met by plain sockets."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator

import pytest
from tests.support.flow import Driver, Peer, count_fds

from sluice.errors import LocalError
from sluice.flow.channel import DataChannel
from sluice.vchan.socketdir import Client, Server, own_domain, socket_path
from sluice.wire import messages as m


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A short directory for sockets, and domain 42 to be."""
    path = tempfile.mkdtemp(prefix="s-", dir="/tmp")
    monkeypatch.setenv("VCHAN_SOCKET_DIR", path)
    monkeypatch.setenv("VCHAN_DOMAIN", "42")
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=["reactor", "asyncio"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    made = Driver(request.param)
    yield made
    made.close()


@pytest.mark.spec("WIRE-009")
def test_file_name(directory: str) -> None:
    assert socket_path(42, 0, 512) == f"{directory}/vchan.42.0.512.sock"
    assert socket_path(0, 42, 513) == f"{directory}/vchan.0.42.513.sock"
    assert socket_path(0xFFFFFFFF, 0, 512) == f"{directory}/vchan.-1.0.512.sock"
    assert socket_path(1, 2, 3, "/elsewhere") == "/elsewhere/vchan.1.2.3.sock"


@pytest.mark.spec("WIRE-009")
def test_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VCHAN_SOCKET_DIR", raising=False)
    assert socket_path(1, 0, 512) == "/var/run/vchan/vchan.1.0.512.sock"


@pytest.mark.spec("WIRE-009")
def test_both_sides_use_the_server_first(directory: str, driver: Driver) -> None:
    server = Server(driver.loop, 0, 512, lambda fd: None)
    client = Client(driver.loop, 7, 600, lambda fd: None, None, lambda reason: None)
    assert server.path == f"{directory}/vchan.42.0.512.sock"
    assert client.path == f"{directory}/vchan.7.42.600.sock"
    server.close()
    client.close()


def test_a_path_too_long_is_refused() -> None:
    assert len(socket_path(1, 2, 3, "/" + "d" * 89)) == 107
    with pytest.raises(LocalError):
        socket_path(1, 2, 3, "/" + "d" * 90)


@pytest.mark.spec("WIRE-010")
@pytest.mark.parametrize(
    ("text", "number"),
    [
        (None, 0),
        ("", 0),
        ("42", 42),
        (" \t-7x", -7),
        ("+5", 5),
        ("x5", 0),
        ("- 5", 0),
        ("4294967295", -1),
        ("12.9", 12),
        ("٣", 0),
    ],
)
def test_own_domain(monkeypatch: pytest.MonkeyPatch, text: str | None, number: int) -> None:
    if text is None:
        monkeypatch.delenv("VCHAN_DOMAIN", raising=False)
    else:
        monkeypatch.setenv("VCHAN_DOMAIN", text)
    assert own_domain() == number


def connect(path: str) -> socket.socket:
    """Connect as any other implementation would."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


@pytest.mark.spec("WIRE-011")
@pytest.mark.parametrize("stale", ["socket", "file"])
def test_a_stale_file_is_replaced(directory: str, driver: Driver, stale: str) -> None:
    path = socket_path(42, 0, 512)
    if stale == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
    else:
        with open(path, "w") as file:
            file.write("not a socket")
    connected: list[int] = []
    server = Server(driver.loop, 0, 512, connected.append)
    with connect(path):
        driver.until(lambda: connected)
    os.close(connected[0])
    assert server.fileno() == -1


@pytest.mark.spec("WIRE-011")
def test_a_name_that_cannot_be_bound_is_an_error(directory: str, driver: Driver) -> None:
    before = count_fds()
    os.mkdir(socket_path(42, 0, 512))
    with pytest.raises(OSError):
        Server(driver.loop, 0, 512, lambda fd: None)
    with pytest.raises(FileNotFoundError):
        Server(driver.loop, 0, 512, lambda fd: None, directory=directory + "/absent")
    assert count_fds() == before


@pytest.mark.spec("WIRE-012")
@pytest.mark.parametrize("stale", [False, True])
def test_a_client_waits_for_its_server(directory: str, driver: Driver, stale: bool) -> None:
    path = socket_path(7, 42, 513)
    if stale:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
            sock.listen(1)
    connected: list[int] = []
    failed: list[str] = []
    client = Client(driver.loop, 7, 513, connected.append, 60, failed.append)
    driver.quiet()
    assert not connected and not failed
    if stale:
        os.unlink(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(1)
        driver.until(lambda: connected or failed)
        assert not failed
        assert not os.get_blocking(connected[0])
        os.close(connected[0])
    client.close()


def test_a_client_gives_up_at_its_deadline(directory: str, driver: Driver) -> None:
    failed: list[str] = []
    begin = driver.loop.time()
    Client(driver.loop, 7, 513, lambda fd: None, 0.05, failed.append)
    driver.until(lambda: failed)
    assert driver.loop.time() - begin >= 0.05
    assert "in time" in failed[0]


@pytest.mark.spec("WIRE-013")
@pytest.mark.parametrize("obstacle", ["not a directory", "a datagram socket", "a loop of links"])
def test_other_errors_are_fatal_at_once(directory: str, driver: Driver, obstacle: str) -> None:
    path = socket_path(7, 42, 513)
    other = None
    if obstacle == "not a directory":
        with open(directory + "/file", "w"):
            pass
    elif obstacle == "a datagram socket":
        other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        other.bind(path)
    else:
        os.symlink(path, path)
    failed: list[str] = []
    Client(
        driver.loop,
        7,
        513,
        lambda fd: None,
        60,
        failed.append,
        directory=directory + "/file" if obstacle == "not a directory" else None,
    )
    driver.until(lambda: failed)
    assert "in time" not in failed[0]
    if other is not None:
        other.close()


@pytest.mark.spec("WIRE-013")
def test_no_descriptor_left_is_fatal_at_once(directory: str, driver: Driver) -> None:
    failed: list[str] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    Client(driver.loop, 7, 513, lambda fd: None, 60, failed.append)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        driver.until(lambda: failed)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "Too many open files" in failed[0]


def test_a_client_can_be_given_up(directory: str, driver: Driver) -> None:
    called: list[object] = []
    client = Client(driver.loop, 7, 513, called.append, 0.05, called.append)
    client.close()
    client.close()
    driver.quiet()
    assert not called


def test_a_server_gives_up_at_its_deadline(directory: str, driver: Driver) -> None:
    ended: list[int] = []
    server = Server(driver.loop, 0, 513, lambda fd: None, 0.05, lambda: ended.append(1))
    driver.until(lambda: ended)
    with pytest.raises(ConnectionRefusedError):
        connect(server.path)


@pytest.mark.spec("WIRE-014")
def test_what_a_server_sends_first_waits_for_the_client(directory: str, driver: Driver) -> None:
    """The client connects, and reads what is there without saying anything."""
    done: list[object] = []

    def connected(fd: int) -> None:
        DataChannel(
            driver.loop, fd, fd, caller=True, prefix=b"early", on_done=done.append,
            on_fatal=done.append,
        ).start()  # fmt: skip

    server = Server(driver.loop, 0, 513, connected)
    with connect(server.path) as sock:
        sock.setblocking(False)
        got = bytearray()

        def received() -> bool:
            with contextlib.suppress(BlockingIOError):
                got.extend(sock.recv(100))
            return len(got) >= 12

        driver.loop.add_reader(sock.fileno(), lambda: None)
        driver.until(received)
        driver.loop.remove_reader(sock.fileno())
        assert got == m.encode_hello(4)
    driver.until(lambda: done)


@pytest.mark.spec("WIRE-015")
def test_a_close_does_not_overtake_data(directory: str, driver: Driver) -> None:
    done: list[int] = []
    fatals: list[str] = []

    def connected(fd: int) -> None:
        channel = DataChannel(
            driver.loop, fd, fd, caller=False, on_done=done.append, on_fatal=fatals.append,
            on_open=lambda: channel.fail(127),
        )  # fmt: skip
        channel.start()

    server = Server(driver.loop, 0, 513, connected)
    sock = connect(server.path)
    peer = Peer(driver, sock.fileno(), sock.fileno())
    peer.hello()
    driver.until(lambda: peer.eof)
    assert peer.messages[1:] == [
        (m.DATA_STDOUT, b""),
        (m.DATA_STDERR, b""),
        (m.DATA_EXIT_CODE, b"\x7f\0\0\0"),
    ]
    assert done == [127] and not fatals
    peer.deafen()
    sock.close()


@pytest.mark.spec("WIRE-019")
def test_one_peer_only(directory: str, driver: Driver) -> None:
    connected: list[int] = []
    server = Server(driver.loop, 0, 512, connected.append)
    first = connect(server.path)
    driver.until(lambda: connected)
    # The file stays, and nobody listens behind it: a late one sees a refusal and keeps trying.
    assert os.path.exists(server.path)
    with pytest.raises(ConnectionRefusedError):
        connect(server.path)
    driver.quiet()
    assert len(connected) == 1
    first.close()
    os.close(connected[0])


@pytest.mark.spec("WIRE-019")
def test_the_one_that_waited_in_the_queue_is_dropped(directory: str, driver: Driver) -> None:
    connected: list[int] = []
    server = Server(driver.loop, 0, 512, connected.append)
    first, second = connect(server.path), connect(server.path)
    driver.until(lambda: connected)
    driver.quiet()
    assert len(connected) == 1
    os.close(connected[0])
    for sock in (first, second):
        sock.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        sock.close()


def test_server_and_client_meet(directory: str, driver: Driver) -> None:
    """The two ends of this implementation, a whole call between them."""
    results: dict[str, int] = {}
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    in_read, in_write = os.pipe2(os.O_CLOEXEC)
    os.write(in_write, b"from the caller")
    os.close(in_write)
    stdin_read, stdin_write = os.pipe2(os.O_CLOEXEC)
    stdout_read, stdout_write = os.pipe2(os.O_CLOEXEC)
    os.write(stdout_write, b"from the service")
    os.close(stdout_write)

    def as_caller(fd: int) -> None:
        DataChannel(
            driver.loop, fd, fd, caller=True, in_fd=out_write, out_fd=in_read,
            on_done=lambda status: results.update(caller=status),
            on_fatal=lambda reason: results.update(caller=-1),
        ).start()  # fmt: skip

    def as_service(fd: int) -> None:
        DataChannel(
            driver.loop, fd, fd, caller=False, in_fd=stdin_write, out_fd=stdout_read,
            on_done=lambda status: results.update(service=status),
            on_fatal=lambda reason: results.update(service=-1),
        ).start()  # fmt: skip

    client = Client(driver.loop, 42, 513, as_service, 60, lambda reason: None, client_domain=43)
    server = Server(driver.loop, 43, 513, as_caller, 60)
    driver.until(lambda: len(results) == 2)
    assert results == {"caller": 0, "service": 0}
    assert os.read(out_read, 100) == b"from the service"
    assert os.read(stdin_read, 100) == b"from the caller"
    assert os.read(out_read, 100) == os.read(stdin_read, 100) == b""
    os.close(out_read)
    os.close(stdin_read)
    client.close()
    server.close()
