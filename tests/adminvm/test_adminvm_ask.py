"""Asking daemons and qubesd: every wait has a deadline."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.adminvm import EXEC_CMDLINE, exec_body, hello, message, short_directory
from tests.support.qrexec_daemon import listener

from sluice.adminvm import ask, peer, qubesd
from sluice.errors import LocalError, RemoteError


@pytest.fixture
def crowded() -> Iterator[str]:
    """A directory with a socket ``qrexec.work``: its queue is full and nobody accepts."""
    with short_directory() as directory:
        path = str(directory / "qrexec.work")
        with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as first:
            listening.bind(path)
            listening.listen(0)
            first.connect(path)
            yield str(directory)


def test_a_daemon_that_accepts_nobody(crowded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "PATIENCE", 0.2)
    began = time.monotonic()
    with pytest.raises(LocalError, match="accepts no connection"):
        ask.DaemonConnection(crowded, "work")
    assert time.monotonic() - began >= 0.15


def test_a_signal_does_not_end_the_waiting(crowded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a shell, where a job is stopped and continued."""
    monkeypatch.setattr(ask, "PATIENCE", 0.5)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    main = threading.get_ident()
    timers = [
        threading.Timer(at / 10, signal.pthread_kill, (main, signal.SIGUSR1)) for at in (1, 2, 3)
    ]
    began = time.monotonic()
    try:
        for timer in timers:
            timer.start()
        with pytest.raises(LocalError, match="accepts no connection"):
            ask.DaemonConnection(crowded, "work")
        assert time.monotonic() - began >= 0.4
    finally:
        for timer in timers:
            timer.join()
        signal.signal(signal.SIGUSR1, before)


def test_qubesd_is_waited_for(crowded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_QUBESD_SOCKET", crowded + "/qrexec.work")
    began = time.monotonic()
    with pytest.raises(LocalError, match="accepts no connection"):
        qubesd.call_blocking("admin.vm.Kill", "work", 0.2)
    assert time.monotonic() - began >= 0.15


# What a daemon may say before it falls silent: nothing, half a HELLO, HELLO, half a reply.
SILENCES = [b"", hello(3)[:7], hello(3), hello(3) + message(EXEC_CMDLINE, exec_body(43, 513))[:12]]


@pytest.fixture
def place() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


@pytest.mark.spec("WIRE-224")
@pytest.mark.parametrize("said", SILENCES)
def test_a_daemon_that_falls_silent(
    place: Path, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "PATIENCE", 0.05)
    silent = pytest.raises(RemoteError, match="work: its daemon does not answer")
    with listener(place / "qrexec.work") as listening, silent:
        _ask(listening, place, said)


def _ask(listening: socket.socket, place: Path, said: bytes) -> None:
    held: list[socket.socket] = []

    def serve() -> None:
        held.append(listening.accept()[0])
        held[0].sendall(said)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        daemon = ask.DaemonConnection(str(place), "work")
        daemon.send(EXEC_CMDLINE, 0, 0, b"u:x\0")
        daemon.reply(EXEC_CMDLINE)
    finally:
        thread.join()
        held[0].close()


@pytest.mark.spec("WIRE-099")
@pytest.mark.parametrize("said", SILENCES)
def test_another_daemon_that_falls_silent(
    place: Path, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "PATIENCE", 0.05)

    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(said)
            await reader.read()
            writer.close()

        async with await asyncio.start_unix_server(serve, str(place / "s")):
            with pytest.raises(RemoteError, match="does not answer"):
                await peer.request_execution(str(place / "s"), 42, b"u:x\0")

    asyncio.run(main())


@pytest.mark.spec("WIRE-105")
def test_a_qubesd_that_falls_silent(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "QUBESD_PATIENCE", 0.05)
    path = str(place / "s")

    async def main() -> None:
        over = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"0")
            await over.wait()
            writer.close()

        async with await asyncio.start_unix_server(serve, path):
            with pytest.raises(LocalError, match=r"did not answer admin\.vm\.Start"):
                await peer.call_qubesd(path, "admin.vm.Start", "work")
            with pytest.raises(LocalError, match="cannot be asked"):
                await asyncio.to_thread(_kill, path, monkeypatch)
            over.set()

    asyncio.run(main())


def _kill(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_QUBESD_SOCKET", path)
    qubesd.call_blocking("admin.vm.Kill", "work", 0.05)
