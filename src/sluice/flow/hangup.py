"""Hearing that the other side of a descriptor is gone, while nothing is read or written.

The Reactor can do it by itself. asyncio's loops cannot: add_writer would fire all the time. For
them the descriptors are put into an epoll of their own, asked for no event (hang-up and error come
without asking), and that epoll's descriptor, which is readable when it has an event, is given to
the loop as a reader.
"""

from __future__ import annotations

import errno
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from sluice.flow.reactor import Loop


LOOK = 0.1  # seconds


class Nested:
    """The epoll inside a loop that has no add_hangup."""

    def __init__(self, loop: Callable[[], Loop | None]) -> None:
        # A weak reference: the table below must not keep a loop alive.
        self._loop = loop
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._looked_at: set[int] = set()
        self._looking = False

    def add_hangup(self, fd: int, callback: Callable[[], None]) -> None:
        """Call ``callback()`` once when the other side of ``fd`` is gone (EPOLLHUP, EPOLLERR).

        Raises PermissionError for descriptors that cannot be waited for.
        """
        loop = self._loop()
        try:
            self._epoll.register(fd, 0)
        except OSError as error:
            if error.errno != errno.ENOSPC or loop is None:
                raise
            # The user's epoll watches are used up: look now and then, as long as any is like that.
            self._looked_at.add(fd)
            if not self._looking:
                self._looking = True
                loop.call_later(LOOK, self._look)
        if not self._callbacks and loop is not None:
            loop.add_reader(self._epoll.fileno(), self._fire)
        self._callbacks[fd] = callback

    def remove_hangup(self, fd: int) -> None:
        """Undo add_hangup, if it has not fired yet."""
        if self._callbacks.pop(fd, None) is None:
            return
        self._looked_at.discard(fd)
        try:  # noqa: SIM105
            self._epoll.unregister(fd)
        except OSError:
            pass
        loop = self._loop()
        if not self._callbacks and loop is not None:
            # Nothing is left registered with the loop of a process that has no call.
            loop.remove_reader(self._epoll.fileno())

    def _look(self) -> None:
        """Do for those that epoll did not take what ``_fire`` does for the others."""
        while (fd := self._gone()) >= 0:
            callback = self._callbacks[fd]
            self.remove_hangup(fd)
            callback()
        loop = self._loop()
        self._looking = bool(self._looked_at)
        if self._looking and loop is not None:
            loop.call_later(LOOK, self._look)

    def _gone(self) -> int:
        """Return one of them whose other side is gone, -1 where none is."""
        poll = select.poll()
        for fd in self._looked_at:
            poll.register(fd, 0)
        return next((fd for fd, mask in poll.poll(0) if not mask & select.POLLNVAL), -1)

    def _fire(self) -> None:
        # One at a time: a callback may close another descriptor whose number is given out again.
        for fd, _ in self._epoll.poll(0, 1):
            callback = self._callbacks.get(fd)
            if callback is not None:
                self.remove_hangup(fd)
                callback()


_nested: MutableMapping[Loop, Nested] | None = None


def of(loop: Loop) -> Nested:
    """Return the nested epoll of ``loop``, which lives as long as the loop does."""
    # Large processes only; the small ones use the Reactor and never come here.
    import weakref

    global _nested
    if _nested is None:
        _nested = weakref.WeakKeyDictionary()
    nested = _nested.get(loop)
    if nested is None:
        nested = _nested[loop] = Nested(weakref.ref(loop))
    return nested
