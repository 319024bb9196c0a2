"""The selector of the large processes' loops: epoll, until the kernel has no more of it for us.

Theory. The kernel counts what is registered with epoll for a user id (/proc/sys/fs/epoll) and
refuses more with ENOSPC. Where domains share our user id, one of them can take all of it, and
a loop that cannot register a descriptor is of no use to anybody. poll counts nothing: the
first refusal makes us go over to it, for good. It is slower where thousands wait, and works.
"""

from __future__ import annotations

import asyncio
import errno
import selectors
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

T = TypeVar("T")


class SteadySelector(selectors.BaseSelector):
    """An EpollSelector that becomes a PollSelector when the user's epoll watches are used up."""

    def __init__(self) -> None:
        """Begin with epoll."""
        self._inner: selectors.BaseSelector = selectors.EpollSelector()

    def register(
        self, fileobj: FileDescriptorLike, events: int, data: Any = None
    ) -> selectors.SelectorKey:
        """Watch a descriptor; see ``selectors.BaseSelector``."""
        try:
            return self._inner.register(fileobj, events, data)
        except OSError as error:
            if error.errno != errno.ENOSPC or isinstance(self._inner, selectors.PollSelector):
                raise
        self._go_over()
        return self._inner.register(fileobj, events, data)

    def _go_over(self) -> None:
        poll = selectors.PollSelector()
        for key in self._inner.get_map().values():
            poll.register(key.fileobj, key.events, key.data)
        self._inner.close()
        self._inner = poll

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        """Watch a descriptor no longer."""
        return self._inner.unregister(fileobj)

    def modify(
        self, fileobj: FileDescriptorLike, events: int, data: Any = None
    ) -> selectors.SelectorKey:
        """Watch a descriptor for something else."""
        return self._inner.modify(fileobj, events, data)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait until something happens, at most ``timeout`` seconds."""
        return self._inner.select(timeout)

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        """Return what is watched."""
        return self._inner.get_map()

    def close(self) -> None:
        """Let go of everything."""
        self._inner.close()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Do what ``asyncio.run`` does, on a loop with such a selector."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(SteadySelector())) as runner:
        return runner.run(main)
