"""Connecting to the resident proxy's sockets."""

from __future__ import annotations

import signal
import socket
import tempfile
import threading

import pytest

from sluice.proxy.sockets import connect


def test_a_signal_does_not_end_the_waiting_for_a_server_that_has_no_time() -> None:
    """As where a job is stopped and continued: it is not taken for connected."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    main = threading.get_ident()
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGUSR1))
    with (
        tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as directory,
        socket.socket(socket.AF_UNIX) as listening,
        socket.socket(socket.AF_UNIX) as first,
    ):
        listening.bind(f"{directory}/s")
        listening.listen(0)
        first.connect(f"{directory}/s")
        try:
            timer.start()
            with pytest.raises(BlockingIOError):
                connect(f"{directory}/s", socket.SOCK_STREAM, 0.5)
        finally:
            timer.join()
            signal.signal(signal.SIGUSR1, before)
