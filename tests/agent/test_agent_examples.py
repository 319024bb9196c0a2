"""The examples of docs/writing-a-service.md run as they stand, through the real programs."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.agent import DEADLINE, ROOT, Place, System, a_place, as_user, until
from tests.support.listening import listens

EXAMPLES = ROOT / "examples" / "services"


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as made:
        for path in (EXAMPLES / "rpc").iterdir():
            shutil.copy2(path, made.path / "rpc")
        yield made


@pytest.fixture
def system(place: Place) -> System:
    return System(place)


def test_add(system: System) -> None:
    assert system.client("test.Add", b"1 2\n") == (0, b"3\n", b"")
    status, out, err = system.client("test.Add", b"1 $(id)\n")
    assert (status, out) == (2, b"") and b"two numbers" in err
    assert system.client("test.Add")[0] == 1


def test_file(system: System) -> None:
    shared = system.place.path / "shared"
    shared.mkdir()
    (shared / "notes").write_text("text\n")
    (shared / "-n").write_text("dash\n")
    assert system.client("test.File+notes")[:2] == (0, b"text\n")
    assert system.client("test.File+-n")[:2] == (0, b"dash\n")
    assert system.client("test.File+none")[0] == 1
    for argument in ("", "+", "+.", "+.."):
        assert system.client(f"test.File{argument}")[0] == 2


def test_a_script_for_one_argument(system: System) -> None:
    assert system.client("test.Greet+de")[1] == b"guten Tag, dom0\n"
    assert system.client("test.Greet+fr")[1] == b"hello, dom0\n"
    assert system.client("test.Greet")[1] == b"hello, dom0\n"


def test_the_price(place: Place) -> None:
    price = place.path / "price"
    price.write_text("64219.50\n")
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    script = place.path / "rpc" / "my.GetBTCprice"
    for url, status in ((f"file://{price}", 0), (f"file://{price}.none", 37)):
        done = subprocess.run(
            [script],
            env={**place.environment(), "PRICE_URL": url},
            capture_output=True,
            check=False,
        )
        assert done.returncode == status
        assert bool(done.stderr) == bool(status)
        assert done.stdout == (b"" if status else b"64219.50\n")


class AskServer:
    """The example server, started by hand or with a passed socket as systemd does it."""

    def __init__(self, place: Place, *, activated: bool = False) -> None:
        self.path = place.path / "run" / "ask.sock"
        command = [sys.executable, str(EXAMPLES / "ask-server")]
        environment = {**place.environment(), "PYTHONPATH": str(ROOT / "src")}
        if not activated:
            self.process = subprocess.Popen(as_user([*command, str(self.path)]), env=environment)
        else:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self.path))
            self.path.chmod(0o777)
            listener.listen(8)
            # exec keeps the process id, which LISTEN_PID must name; the socket becomes 3.
            script = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
            inner = as_user(["/bin/sh", "-c", script, "sh", *command])
            three = f'exec 3<&{listener.fileno()} {listener.fileno()}<&-; exec "$@"'
            self.process = subprocess.Popen(
                ["/bin/bash", "-c", three, "bash", *inner],
                env=environment,
                pass_fds=[listener.fileno()],
            )
            listener.close()
        place._processes.append(self.process)
        for name in ("example.Ask", "example.Count"):
            (place.path / "rpc" / name).symlink_to(self.path)


@pytest.mark.parametrize("activated", [False, True])
def test_the_socket_service(system: System, activated: bool) -> None:
    server = AskServer(system.place, activated=activated)
    until(lambda: activated or listens(server.path), "the server's socket")
    assert system.client("example.Ask", b"coffee\n") == (0, b"allow\n", b"")
    assert system.client("example.Ask", b"cigars\n") == (0, b"deny\n", b"")
    assert system.client("example.Count") == (0, b"2 for dom0\n", b"")
    # Locally, as with nc -U: the descriptor and a NUL come first.
    local = system.place.connect(system.place.path / "rpc" / "example.Ask")
    local.sendall(b"example.Ask dom0\0tea\n")
    local.shutdown(socket.SHUT_WR)
    assert local.recv(100) == b"allow\n" and local.recv(100) == b""
    # Too much input: the call is given up, the server goes on.
    assert system.client("example.Ask", b"x" * 1000) == (0, b"", b"")
    assert system.client("example.Count") == (0, b"4 for dom0\n", b"")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(DEADLINE) == 0
    assert server.path.exists() == activated


def test_the_unit_files_name_what_is_there() -> None:
    service = (EXAMPLES / "systemd" / "ask-server.service").read_text()
    assert re.search(r"ExecStart=\S*/ask-server$", service, re.M)
    assert "Requires=ask-server.socket" in service
    stream = re.search(
        r"ListenStream=%t/(\S+)", (EXAMPLES / "systemd" / "ask-server.socket").read_text()
    )
    assert stream is not None and stream[1] in (EXAMPLES / "ask-server").read_text()


def test_the_page_shows_the_examples_as_they_are() -> None:
    """Every code block of the page that names a file of the examples has that file's text."""
    page = (ROOT / "docs" / "writing-a-service.md").read_text()
    blocks = re.findall(r"`examples/services/([^`]+)`:\n\n```\w*\n(.*?)```", page, re.S)
    assert len(blocks) >= 5
    for name, text in blocks:
        assert (EXAMPLES / name).read_text() == text, name
    for entry in Path(EXAMPLES / "rpc").iterdir():
        assert entry.name in page


def test_a_service_can_use_the_library(system: System) -> None:
    """A service that calls another: the library finds the agent that started it."""
    system.place.service(
        "test.Chain",
        f"#!{sys.executable}\n"
        "import asyncio, sluice\n"
        "try:\n"
        "    asyncio.run(sluice.call('nobody', 'test.Add'))\n"
        "except sluice.CallRefused as error:\n"
        "    print(error.status)\n",
    )
    status, out, err = system.client("test.Chain")
    assert (status, out) == (0, b"126\n"), err
