"""qubes-rpc-multiplexer, the wrapper of older releases, and qubes.WaitForSession."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest
from tests.support.agent import BIN, DEADLINE, ROOT, Place, a_place, as_user, until


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


# The program on a machine of which the tester says what system log it has.
ON_A_MACHINE = """
import sys
sys.path.insert(0, sys.argv[1])
from sluice.agent import log, multiplexer
log.SYSTEM_LOGS = (sys.argv[2],)
sys.exit(multiplexer.main(sys.argv[3:]))
"""


def run(
    place: Place, *words: str, data: bytes = b"", system_log: str | None = None
) -> tuple[int, bytes, bytes]:
    environment = place.environment(QREXEC_FOO="stale")
    environment["PATH"] = f"{place.path}/bin:{environment['PATH']}"
    program = [str(BIN / "qubes-rpc-multiplexer")]
    if system_log is not None:
        program = ["/usr/bin/python3", "-IS", "-c", ON_A_MACHINE, str(ROOT / "src"), system_log]
    done = subprocess.run(
        as_user([*program, *words]),
        input=data,
        capture_output=True,
        env=environment,
        timeout=DEADLINE,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_program_takes_its_place(place: Place) -> None:
    (place.path / "bin").mkdir()
    logged = place.path / "run" / "logged"
    place.service(
        "logger", f'#!/bin/sh\n(echo "$@"; cat) >{logged}.new\nmv {logged}.new {logged}\n', "bin"
    )
    place.service(
        "test.S",
        "#!/bin/sh\nread x\n"
        'echo "$x $1 $QREXEC_REMOTE_DOMAIN $QREXEC_REQUESTED_TARGET ${QREXEC_FOO-unset}"\n'
        "echo oops >&2; exit 4\n",
    )
    words = ("test.S+arg", "work", "name", "vault")
    status, out, err = run(place, *words, data=b"in\n", system_log="/")
    assert (status, out, err) == (4, b"in arg work vault unset\n", b"")
    until(logged.exists, "the log")
    assert logged.read_text() == "-t test.S+arg-work\noops\n"


def test_without_a_system_log_stderr_stays_where_it_is(place: Place) -> None:
    (place.path / "bin").mkdir()
    place.service("logger", "#!/bin/sh\nexec cat >/dev/null\n", "bin")
    place.service("test.S", "#!/bin/sh\necho oops >&2; exit 4\n")
    assert run(place, "test.S", "work", system_log="/nowhere") == (4, b"", b"oops\n")


def test_a_pipe_that_breaks_kills_the_service(place: Place) -> None:
    """SIGPIPE is not ignored in it, although Python ignores it."""
    place.service("test.S", "#!/bin/sh\ngrep SigIgn /proc/$$/status\n")
    assert int(run(place, "test.S", "work")[1].split()[1], 16) & (1 << 12) == 0


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ([], 125),
        (["test.S"], 125),
        (["test.S", "work", "name"], 125),
        (["test.S", ""], 125),
        (["test.None", "work"], 127),
        (["test.Bad", "work"], 127),
        (["+x", "work"], 125),
    ],
)
def test_failures(place: Place, words: list[str], status: int) -> None:
    place.service("test.S", "#!/bin/sh\n")
    place.service("test.Bad", "#!/no/such\n")
    assert run(place, *words)[0] == status


def test_a_socket_service(place: Place) -> None:
    listener = place.listen("rpc/test.S")
    received = []

    def serve() -> None:
        connection = listener.accept()[0]
        data = b""
        while piece := connection.recv(65536):
            data += piece
        received.append(data)
        connection.sendall(b"answer")
        connection.shutdown(socket.SHUT_WR)
        connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert run(place, "test.S+a", "work", data=b"x" * 300000) == (0, b"answer", b"")
    thread.join(DEADLINE)
    assert received == [b"test.S+a work\0" + b"x" * 300000]


def test_a_socket_service_that_ends_first(place: Place) -> None:
    listener = place.listen("rpc/test.S")

    def serve() -> None:
        connection = listener.accept()[0]
        connection.recv(100)
        connection.sendall(b"bye")
        connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    process = subprocess.Popen(
        as_user([str(BIN / "qubes-rpc-multiplexer"), "test.S", "work"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=place.environment(),
    )
    place._processes.append(process)
    assert process.stdout is not None
    assert process.stdout.read() == b"bye"
    # Its stdin is still open: the service has gone, nothing more can come of it.
    assert process.wait(DEADLINE) == 0
    thread.join(DEADLINE)


@pytest.mark.parametrize("setting", ["exit-on-client-eof", "exit-on-service-eof"])
def test_settings_that_end_a_socket_service_early(place: Place, setting: str) -> None:
    """One side says that it is done, the other says nothing and keeps the connection open."""
    (place.path / "conf" / "test.S").write_text(f"{setting} = true\n")
    listener = place.listen("rpc/test.S")
    over = threading.Event()

    def serve() -> None:
        connection = listener.accept()[0]
        connection.recv(100)
        if setting == "exit-on-service-eof":
            connection.sendall(b"bye")
            connection.shutdown(socket.SHUT_WR)
        over.wait(DEADLINE)
        connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    process = subprocess.Popen(
        as_user([str(BIN / "qubes-rpc-multiplexer"), "test.S", "work"]),
        stdin=subprocess.PIPE if setting == "exit-on-service-eof" else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=place.environment(),
    )
    place._processes.append(process)
    try:
        assert process.wait(DEADLINE / 2) == 0
        assert process.stdout is not None
        assert process.stdout.read() == (b"bye" if setting == "exit-on-service-eof" else b"")
    finally:
        over.set()
        thread.join(DEADLINE)


@pytest.mark.skipif(os.path.isdir("/run/systemd/system"), reason="there is a service manager")
def test_without_a_service_manager_there_is_no_session_to_wait_for() -> None:
    for data in (b"user\n", b"no newline", b""):
        done = subprocess.run(
            [BIN / "qubes.WaitForSession"], input=data, check=False, timeout=DEADLINE
        )
        assert done.returncode == 0


def test_waiting_for_a_session_takes_no_argument() -> None:
    done = subprocess.run(
        [BIN / "qubes.WaitForSession", "x"], input=b"", check=False, timeout=DEADLINE
    )
    assert done.returncode == 1
