"""So many calls at once."""

from __future__ import annotations

from sluice.proxy import state
from sluice.proxy.options import Duration, OptionError, absolute
from sluice.proxy.verdicts import CONTINUE, HOLD, Refuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from sluice.proxy.link import Call, Link
    from sluice.proxy.stage import Cause
    from sluice.proxy.verdicts import Answer

_LOOK = 0.1


class Concurrent:
    """Lets so many calls be under way at once, over all processes.

    A call holds a place: the lock of a file, which the kernel takes back when the process ends in
    whatever way. With ``queue`` so many more wait for a place; what is over that is refused at
    once. The waiting ones are served in no certain order.
    """

    name = "concurrent"
    inspects = ()

    class Options:
        """What can be set.

        limit: calls at once
        per: which calls are counted together
        queue: calls that may wait
        wait: the longest time that one waits, then it is refused
        state: where the places are kept; empty for the place of the configuration
        """

        limit: int
        per: Literal["chain", "source", "source+service+target"] = "chain"
        queue: int = 0
        wait: Duration = 60.0
        state: str = ""

    @staticmethod
    def check(options: Options) -> None:
        """See that there are places."""
        if not 1 <= options.limit <= 4096:
            raise OptionError("limit", "must be from 1 to 4096")
        if not 0 <= options.queue <= 4096:
            raise OptionError("queue", "must be from 0 to 4096")
        absolute("state", options.state)

    def __init__(self, options: Options, link: Link) -> None:
        """Take the options."""
        self._options = options
        self._link = link
        self._place: tuple[int, str] | None = None
        self._waiting: tuple[int, str] | None = None
        self._since = 0.0

    def opened(self, call: Call) -> Answer:
        """Take a place, or one in the queue."""
        self._since = self._link.time()
        try:
            self._place = self._take("place", self._options.limit)
            if self._place is not None:
                return CONTINUE
            self._waiting = self._take("queue", self._options.queue)
        except state.StateError as error:
            return Refuse(f"the state cannot be used: {error.filename}: {error.strerror}")
        if self._waiting is None:
            return Refuse(f"{self._options.limit} calls are under way already")
        self._link.set_timer("look", _LOOK)
        return HOLD

    def timer(self, key: str) -> Answer:
        """Look whether a place is free now."""
        self._place = self._take("place", self._options.limit)
        if self._place is not None:
            self._leave_queue()
            return CONTINUE
        if self._link.time() - self._since >= self._options.wait:
            return Refuse("no place became free")
        self._link.set_timer("look", _LOOK)
        return ()

    def closed(self, cause: Cause) -> None:
        """Give the place back."""
        self._leave_queue()
        if self._place is not None:
            state.unlock(*self._place)
            self._place = None

    def _leave_queue(self) -> None:
        if self._waiting is not None:
            state.unlock(*self._waiting)
            self._waiting = None

    def _take(self, what: str, places: int) -> tuple[int, str] | None:
        if places == 0:
            return None
        base = self._options.state or self._link.state_directory
        where = state.directory(base, "concurrent")
        # One directory for all: a caller can choose the keys, so there is nothing left of those
        # that are not under way.
        mine = state.key_of(self._options.per, self._link.name, self._link.call)
        for number in range(places):
            path = f"{where}/{mine}-{what}-{number}"
            fd = state.try_lock(path)
            if fd is not None:
                return fd, path
        return None
