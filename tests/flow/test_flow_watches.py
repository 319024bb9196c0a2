"""When another process of our user id has taken all of epoll's watches, everything goes on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import select
import selectors
from collections.abc import Callable, Iterator

import pytest

from sluice.flow import hangup
from sluice.flow.reactor import Reactor
from sluice.flow.selector import SteadySelector, run

ENOUGH = 3  # the selector's own wake-up socket and a few of the test


class Scarce:
    """An epoll in a world that has ``left`` watches."""

    left = 0

    def __init__(self, *_: object) -> None:
        self._epoll = select_epoll()

    def register(self, fd: int, mask: int = 0) -> None:
        if Scarce.left < 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._epoll.register(fd, mask)
        Scarce.left -= 1

    def __getattr__(self, name: str) -> object:
        return getattr(self._epoll, name)


select_epoll = select.epoll


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> type[Scarce]:
    monkeypatch.setattr(select, "epoll", Scarce)
    monkeypatch.setattr(selectors.EpollSelector, "_selector_cls", Scarce)
    Scarce.left = ENOUGH
    return Scarce


@pytest.fixture
def pipes() -> Iterator[list[tuple[int, int]]]:
    made = [os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) for _ in range(6)]
    yield made
    for ends in made:
        for fd in ends:
            with contextlib.suppress(OSError):
                os.close(fd)


@pytest.mark.spec("CORE-177")
def test_a_reactor_goes_over_to_poll(scarce: type[Scarce], pipes: list[tuple[int, int]]) -> None:
    reactor = Reactor()
    seen: list[object] = []

    def read(number: int) -> None:
        seen.append(number)
        os.read(pipes[number][0], 9)

    for number, (reading, _) in enumerate(pipes):
        reactor.add_reader(reading, read, number)
    assert scarce.left == 0
    for _, writing in pipes:
        os.write(writing, b"x")
    while len(seen) < len(pipes):
        assert reactor.run_once(10) > 0
    assert sorted(seen, key=str) == [0, 1, 2, 3, 4, 5]
    assert reactor.run_once(0) == 0
    reactor.add_hangup(pipes[1][1], seen.append, "gone")
    assert reactor.remove_reader(pipes[1][0])
    os.close(pipes[1][0])
    assert reactor.run_once(10) == 1
    assert seen[-1] == "gone"
    # Closed without a word, as epoll allows it: that is no event, now and ever after.
    os.close(pipes[2][0])
    for _ in range(3):
        assert reactor.run_once(0) == 0
    assert reactor.remove_reader(pipes[2][0])
    reactor.close()


@pytest.mark.spec("CORE-177")
def test_a_loop_of_asyncio_goes_over_to_poll(
    scarce: type[Scarce], pipes: list[tuple[int, int]]
) -> None:
    async def main() -> str:
        loop = asyncio.get_running_loop()
        assert isinstance(loop._selector, SteadySelector)  # type: ignore[attr-defined]
        futures: list[asyncio.Future[None]] = [loop.create_future() for _ in pipes]

        def read(number: int) -> None:
            os.read(pipes[number][0], 9)
            futures[number].set_result(None)

        for number, (reading, _) in enumerate(pipes):
            loop.add_reader(reading, read, number)
        for _, writing in pipes:
            os.write(writing, b"x")
        async with asyncio.timeout(10):
            await asyncio.gather(*futures)
        for reading, _ in pipes:
            assert loop.remove_reader(reading)
        gone: asyncio.Future[None] = loop.create_future()
        hangup.of(loop).add_hangup(pipes[0][1], functools.partial(gone.set_result, None))
        os.close(pipes[0][0])
        async with asyncio.timeout(10):
            await gone
        return "went on"

    assert run(main()) == "went on"
    assert scarce.left == 0


def test_looking_for_hangups_takes_one_timer(
    scarce: type[Scarce], pipes: list[tuple[int, int]]
) -> None:
    class Loop:
        timers: list[Callable[[], None]] = []

        def call_later(self, _delay: float, callback: Callable[[], None]) -> None:
            self.timers.append(callback)

        def add_reader(self, *_: object) -> None:
            """Nothing comes by it here."""

        remove_reader = add_reader

    loop = Loop()
    nested = hangup.Nested(lambda: loop)  # type: ignore[arg-type, return-value]
    scarce.left = 0
    gone: list[int] = []
    for reading, writing in pipes:  # they come and go
        nested.add_hangup(writing, lambda: None)
        nested.remove_hangup(writing)
        nested.add_hangup(reading, functools.partial(gone.append, reading))
        nested.remove_hangup(reading)
    last = pipes[-1]
    nested.add_hangup(last[1], functools.partial(gone.append, last[1]))
    for _ in range(3):
        assert len(loop.timers) == 1
        loop.timers.pop()()
    os.close(last[0])
    loop.timers.pop()()
    assert gone == [last[1]] and not loop.timers
    nested.add_hangup(pipes[0][1], lambda: None)
    assert len(loop.timers) == 1


def test_what_else_goes_wrong_is_told(pipes: list[tuple[int, int]]) -> None:
    selector = SteadySelector()
    with pytest.raises(ValueError):
        selector.register(-1, selectors.EVENT_READ)
    os.close(pipes[0][0])
    with pytest.raises(OSError, match="Bad file descriptor"):
        selector.register(pipes[0][0], selectors.EVENT_READ)
    assert isinstance(selector._inner, selectors.EpollSelector)
    selector.close()
