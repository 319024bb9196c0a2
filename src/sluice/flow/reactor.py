"""The little event loop of the small programs: epoll, timers, nothing else.

It has the method names of asyncio's loops (add_reader, remove_reader, add_writer, remove_writer,
call_soon, call_later, time), so that the pump and the data channel run on either. It imports
nothing that the small programs do not import already, and it sleeps without limit while nothing
happens: there is no tick.

Theory. A descriptor has one registration with epoll whose mask is the union of what is wanted of
it: reading, writing, or only to hear of its hang-up. A batch of events may contain one for a
descriptor that an earlier callback of the same batch closed and whose number was given out again:
a registration made during a batch therefore hears nothing before the next one. Events are level
triggered, so nothing is lost by it.
"""

from __future__ import annotations

import errno
import select
import time
from _heapq import heappop, heappush

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    class Handle(Protocol):
        """What call_later returns: something that can be cancelled."""

        def cancel(self) -> None:
            """Keep the callback from being called."""

    class Loop(Protocol):
        """What the pump and the data channel need: a Reactor or an asyncio loop."""

        def add_reader(self, fd: int, callback: Callable[..., Any], *args: Any) -> Any:
            """Call ``callback(*args)`` whenever ``fd`` can be read."""

        def remove_reader(self, fd: int) -> Any:
            """Undo add_reader."""

        def add_writer(self, fd: int, callback: Callable[..., Any], *args: Any) -> Any:
            """Call ``callback(*args)`` whenever ``fd`` can be written."""

        def remove_writer(self, fd: int) -> Any:
            """Undo add_writer."""

        def call_soon(self, callback: Callable[..., Any], *args: Any) -> Any:
            """Call ``callback(*args)`` in the next round."""

        def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Handle:
            """Call ``callback(*args)`` after ``delay`` seconds."""

        def time(self) -> float:
            """Return the clock of call_later, in seconds."""


_READ = select.EPOLLIN
_WRITE = select.EPOLLOUT
_GONE = select.EPOLLHUP | select.EPOLLERR
_READABLE = _READ | _GONE
_WRITABLE = _WRITE | _GONE


class _Watch:
    """What is wanted of one descriptor, and in which round it was first wanted."""

    __slots__ = ("born", "hangup", "reader", "writer")

    def __init__(self, born: int) -> None:
        self.born = born
        self.reader: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self.writer: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self.hangup: tuple[Callable[..., Any], tuple[Any, ...]] | None = None

    def mask(self) -> int:
        """Return the events to ask for; hang-up and error come without asking."""
        return (_READ if self.reader else 0) | (_WRITE if self.writer else 0)

    def empty(self) -> bool:
        """Tell whether nobody wants anything of the descriptor."""
        return self.reader is None and self.writer is None and self.hangup is None


class Timer:
    """A callback that is due; ``cancel()`` undoes it."""

    __slots__ = ("args", "callback", "due")

    def __init__(self, due: float, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Take the time (of Reactor.time) at which ``callback(*args)`` is due."""
        self.due = due
        self.callback: Callable[..., Any] | None = callback
        self.args = args

    def cancel(self) -> None:
        """Keep the callback from being called, and let go of what it holds."""
        self.callback = None
        self.args = ()

    def __lt__(self, other: Timer) -> bool:
        """Order by due time, for the heap."""
        return self.due < other.due


class _Poll:
    """poll in the place of epoll, for when the kernel gives our user id no more watches (ENOSPC).

    It forgets a closed descriptor when it meets it, where epoll has done so by itself.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self.register = self._poll.register
        self.modify = self._poll.modify

    def unregister(self, fd: int) -> None:
        """Forget ``fd``; nothing happens where it is not known."""
        try:  # noqa: SIM105
            self._poll.unregister(fd)
        except KeyError:
            pass

    def poll(self, timeout: float, _most: int) -> list[tuple[int, int]]:
        """Wait at most ``timeout`` seconds (below 0: no limit) and return what happened."""
        found = self._poll.poll(None if timeout < 0 else timeout * 1000)
        for fd, mask in found:
            if mask & select.POLLNVAL:
                self.unregister(fd)
        return [(fd, mask) for fd, mask in found if not mask & select.POLLNVAL]

    def close(self) -> None:
        """There is nothing to close."""


class Reactor:
    """An epoll loop for one thread. Callbacks must not raise: what they raise ends ``run``."""

    def __init__(self) -> None:
        """Make the epoll descriptor (close-on-exec)."""
        self._epoll: select.epoll | _Poll = select.epoll()
        self._watches: dict[int, _Watch] = {}
        self._timers: list[Timer] = []
        self._soon: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._stopping = False
        self._round = 0

    # --- descriptors ---------------------------------------------------------------------------

    def add_reader(self, fd: int, callback: Callable[..., Any], *args: Any) -> None:
        """Call ``callback(*args)`` whenever ``fd`` is readable, at its end, or broken.

        Raises PermissionError for what epoll refuses: regular files, /dev/null and their like.
        """
        watch = self._watches.get(fd) or _Watch(self._round)
        old, watch.reader = watch.reader, (callback, args)
        if old is None:
            self._apply(fd, watch)

    def add_writer(self, fd: int, callback: Callable[..., Any], *args: Any) -> None:
        """Call ``callback(*args)`` whenever ``fd`` is writable or broken. Raises as add_reader."""
        watch = self._watches.get(fd) or _Watch(self._round)
        old, watch.writer = watch.writer, (callback, args)
        if old is None:
            self._apply(fd, watch)

    def add_hangup(self, fd: int, callback: Callable[..., Any], *args: Any) -> None:
        """Call ``callback(*args)`` once, when the other side of ``fd`` is gone.

        For the write end of a pipe that means: nobody reads it any more.
        """
        watch = self._watches.get(fd) or _Watch(self._round)
        old, watch.hangup = watch.hangup, (callback, args)
        if old is None:
            self._apply(fd, watch)

    def remove_reader(self, fd: int) -> bool:
        """Undo add_reader; return whether there was one."""
        watch = self._watches.get(fd)
        if watch is None or watch.reader is None:
            return False
        watch.reader = None
        self._apply(fd, watch)
        return True

    def remove_writer(self, fd: int) -> bool:
        """Undo add_writer; return whether there was one."""
        watch = self._watches.get(fd)
        if watch is None or watch.writer is None:
            return False
        watch.writer = None
        self._apply(fd, watch)
        return True

    def remove_hangup(self, fd: int) -> bool:
        """Undo add_hangup; return whether there was one."""
        watch = self._watches.get(fd)
        if watch is None or watch.hangup is None:
            return False
        watch.hangup = None
        self._apply(fd, watch)
        return True

    def _apply(self, fd: int, watch: _Watch) -> None:
        """Bring epoll's registration of ``fd`` in line with ``watch``."""
        if watch.empty():
            del self._watches[fd]
            try:  # noqa: SIM105  contextlib is too dear for the small programs
                self._epoll.unregister(fd)
            except OSError:
                # Closed by its owner before: epoll has forgotten it by itself.
                pass
            return
        known = fd in self._watches
        try:
            if known:
                self._epoll.modify(fd, watch.mask())
            else:
                self._epoll.register(fd, watch.mask())
        except OSError as error:
            # The number was closed and given out again without our being told, or is the same
            # file still under a registration that we forgot: the other call is the right one.
            if known and error.errno == errno.ENOENT:
                self._epoll.register(fd, watch.mask())
            elif not known and error.errno == errno.EEXIST:
                self._epoll.modify(fd, watch.mask())
            elif error.errno == errno.ENOSPC:
                # A domain with our user id can take all the watches there are (see _Poll).
                self._go_over()
                self._epoll.register(fd, watch.mask())
            else:
                raise
        self._watches[fd] = watch

    def _go_over(self) -> None:
        """Use poll from now on."""
        self._epoll.close()
        self._epoll = _Poll()
        for fd, watch in self._watches.items():
            self._epoll.register(fd, watch.mask())

    # --- time ----------------------------------------------------------------------------------

    def time(self) -> float:
        """Return seconds of the monotonic clock."""
        return time.monotonic()

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Timer:
        """Call ``callback(*args)`` after ``delay`` seconds; return a handle to cancel it."""
        timer = Timer(time.monotonic() + max(delay, 0.0), callback, args)
        if len(self._timers) > 64 and sum(t.callback is None for t in self._timers) * 2 > len(
            self._timers
        ):
            self._timers = sorted(t for t in self._timers if t.callback is not None)
        heappush(self._timers, timer)
        return timer

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> None:
        """Call ``callback(*args)`` in the next round, before waiting for anything."""
        self._soon.append((callback, args))

    def _run_due(self) -> bool:
        """Call what call_soon left and the timers that are due; tell whether there was anything."""
        soon, self._soon = self._soon, []
        for callback, args in soon:
            callback(*args)
        any_due = bool(soon)
        if not self._timers:
            return any_due
        now = time.monotonic()
        while self._timers and (self._timers[0].callback is None or self._timers[0].due <= now):
            timer = heappop(self._timers)
            if timer.callback is not None:
                due, args = timer.callback, timer.args
                timer.cancel()
                due(*args)
                any_due = True
        return any_due

    def _timeout(self) -> float:
        """Return how long epoll may wait: -1 (no limit) while no timer runs."""
        if self._soon or self._stopping:
            return 0.0
        while self._timers and self._timers[0].callback is None:
            heappop(self._timers)
        if not self._timers:
            return -1
        return max(self._timers[0].due - time.monotonic(), 0.0)

    # --- running -------------------------------------------------------------------------------

    def stop(self) -> None:
        """Make ``run`` return after the callback under way."""
        self._stopping = True

    def run(self) -> None:
        """Serve events until ``stop``. May be called again afterwards."""
        self._stopping = False
        while not self._stopping:
            self.run_once()

    def run_once(self, limit: float = -1) -> int:
        """Serve what is due, then wait for descriptors and serve them.

        Waits at most until the next timer, at most ``limit`` seconds (-1: no limit), and not at all
        if something was due. Returns the number of descriptors that had something.
        """
        timeout = 0.0 if self._run_due() else self._timeout()
        if limit >= 0 and (timeout < 0 or timeout > limit):
            timeout = limit
        events = self._epoll.poll(timeout, 64)
        self._round += 1
        current = self._round
        for fd, mask in events:
            if self._stopping:
                break
            watch = self._watches.get(fd)
            if watch is None or watch.born >= current:
                continue
            if mask & _READABLE and watch.reader is not None:
                callback, args = watch.reader
                callback(*args)
            if mask & _WRITABLE and watch.writer is not None and self._watches.get(fd) is watch:
                callback, args = watch.writer
                callback(*args)
            if mask & _GONE and watch.hangup is not None and self._watches.get(fd) is watch:
                callback, args = watch.hangup
                self.remove_hangup(fd)
                callback(*args)
        return len(events)

    def close(self) -> None:
        """Close the epoll descriptor; the reactor is of no use afterwards."""
        self._watches.clear()
        self._timers.clear()
        self._soon.clear()
        self._epoll.close()
