"""Hearing of a hang-up on a loop that cannot tell by itself."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import weakref
from collections.abc import Iterator

import pytest
from tests.support.flow import Driver

from sluice.flow import hangup


@pytest.fixture
def driver() -> Iterator[Driver]:
    made = Driver("asyncio")
    yield made
    made.close()


def test_once_and_only_when_gone(driver: Driver) -> None:
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    seen: list[int] = []
    nested = hangup.of(driver.loop)
    assert hangup.of(driver.loop) is nested
    nested.add_hangup(write_fd, lambda: seen.append(1))
    driver.quiet()
    assert not seen
    os.close(read_fd)
    driver.until(lambda: seen)
    driver.quiet()
    assert seen == [1]
    nested.remove_hangup(write_fd)
    os.close(write_fd)


def test_undone(driver: Driver) -> None:
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    seen: list[int] = []
    nested = hangup.of(driver.loop)
    nested.add_hangup(write_fd, lambda: seen.append(1))
    nested.remove_hangup(write_fd)
    os.close(read_fd)
    driver.quiet()
    assert not seen
    os.close(write_fd)


def test_what_cannot_be_waited_for(driver: Driver) -> None:
    nested = hangup.of(driver.loop)
    with open("/dev/null", "rb") as null:
        with pytest.raises(PermissionError):
            nested.add_hangup(null.fileno(), lambda: None)
        nested.remove_hangup(null.fileno())


def test_several_at_once_and_a_number_used_again(driver: Driver) -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    healthy = os.pipe2(os.O_CLOEXEC)
    nested = hangup.of(driver.loop)
    seen: list[str] = []

    def gone(index: int) -> None:
        seen.append("gone")
        if len(seen) > 1:
            return
        # The others have hung up too; their numbers are given out again before they are told.
        for other, (sock, _) in enumerate(pairs):
            if other != index:
                number = sock.fileno()
                nested.remove_hangup(number)
                sock.close()
                os.dup2(healthy[1], number)
                nested.add_hangup(number, lambda: seen.append("stale"))
                reused.append(number)

    reused: list[int] = []
    for index, (one, _) in enumerate(pairs):
        nested.add_hangup(one.fileno(), lambda index=index: gone(index))  # type: ignore[misc]
    for _, other in pairs:
        other.close()
    driver.until(lambda: seen)
    driver.quiet()
    assert seen == ["gone"]
    for fd in (*reused, *healthy):
        nested.remove_hangup(fd)
        os.close(fd)
    for one, _ in pairs:
        one.close() if one.fileno() not in reused else one.detach()


def test_a_loop_is_not_kept_alive() -> None:
    loop = asyncio.new_event_loop()
    hangup.of(loop)
    gone = weakref.ref(loop)
    loop.close()
    del loop
    gc.collect()
    assert gone() is None
