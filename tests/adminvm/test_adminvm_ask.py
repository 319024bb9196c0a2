"""Asking a daemon from the small programs: every wait has a deadline."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from tests.support.adminvm import short_directory

from sluice.adminvm import ask, qubesd
from sluice.errors import LocalError


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


def test_qubesd_is_waited_for(crowded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_QUBESD_SOCKET", crowded + "/qrexec.work")
    began = time.monotonic()
    with pytest.raises(LocalError, match="accepts no connection"):
        qubesd.call_blocking("admin.vm.Kill", "work", 0.2)
    assert time.monotonic() - began >= 0.15
