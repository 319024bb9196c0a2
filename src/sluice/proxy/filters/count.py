"""So many calls in an interval."""

from __future__ import annotations

import os

from sluice.proxy import state
from sluice.proxy.options import Duration, OptionError, absolute
from sluice.proxy.units import show_duration
from sluice.proxy.verdicts import CONTINUE, HOLD, Refuse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from sluice.proxy.link import Call, Link
    from sluice.proxy.verdicts import Answer

MAX_KEYS = 10_000
# Looking through all keys takes a moment in which the process does nothing else.
_SCAN_EVERY = 1.0
_HEADER = "sluice-count 1"
# The lock is held for a millisecond; who cannot get it for so long finds something broken.
_RETRY, _PATIENCE = 0.01, 5.0
_MAX_LIMIT = 10_000


# When the keys of a directory were looked through, for the calls of one process.
_scanned: dict[str, float] = {}


class Count:
    """Lets so many calls begin in a sliding interval, over all processes and restarts.

    The state is kept on disk and replaced as a whole, under a lock that the kernel takes back from
    a process that dies. What cannot be read refuses the call. A clock that is set back gains
    nothing: the newest call ever counted is the least that the time can be.
    """

    name = "count"
    aliases = (("limit_interval", "interval"), ("state_dir", "state"))
    inspects = ()

    class Options:
        """What can be set.

        limit: calls in the interval
        interval: its length
        per: which calls are counted together
        state: where the state is kept; empty for the place of the configuration
        """

        limit: int
        interval: Duration
        per: Literal["chain", "source", "source+service+target"] = "chain"
        state: str = ""

    @staticmethod
    def check(options: Options) -> None:
        """See that the numbers can be kept."""
        if not 0 <= options.limit <= _MAX_LIMIT:
            raise OptionError("limit", f"must be from 0 to {_MAX_LIMIT}")
        if options.interval <= 0:
            raise OptionError("interval", "must be longer than 0")
        absolute("state", options.state)

    def __init__(self, options: Options, link: Link) -> None:
        """Take the options; nothing is read before the call is opened."""
        self._options = options
        self._link = link
        self._since = 0.0

    def opened(self, call: Call) -> Answer:
        """Count the call, or refuse it."""
        self._since = self._link.time()
        return self._try(call)

    def timer(self, key: str) -> Answer:
        """Try again to get the lock."""
        answer = self._try(self._link.call)
        return () if answer is HOLD else answer

    def _try(self, call: Call) -> Answer:
        base = self._options.state or self._link.state_directory
        try:
            where = state.directory(base, "count")
            lock = state.try_lock(where + "/lock")
            if lock is None:
                if self._link.time() - self._since >= _PATIENCE:
                    return Refuse("the state is locked by another process")
                self._link.set_timer("lock", _RETRY)
                return HOLD
            try:
                return self._counted(where, call)
            finally:
                os.close(lock)
        except state.StateError as error:
            return Refuse(f"the state cannot be used: {error.filename}: {error.strerror}")
        except ValueError as error:
            return Refuse(f"the state cannot be read: {error}")

    def _make_room(self, where: str) -> bool:
        """Forget keys that hold no call back, now and then; tell whether there is room."""
        now = self._link.time()
        last = _scanned.get(where)
        if last is not None and 0 <= now - last < _SCAN_EVERY:
            return False
        _scanned[where] = now
        _forget_old(where, self._link.wall_time())
        return _keys(where) < MAX_KEYS

    def _counted(self, where: str, call: Call) -> Answer:
        """Read, decide and write, with the lock held."""
        path = f"{where}/{state.key_of(self._options.per, self._link.name, call)}"
        kept = state.read(path)
        if kept is None:
            if _keys(where) >= MAX_KEYS and not self._make_room(where):
                return Refuse(f"more than {MAX_KEYS} different callers are remembered")
            calls: list[float] = []
        else:
            calls = parse(kept)[1]
        now = max([self._link.wall_time(), *calls])
        calls = [moment for moment in calls if moment > now - self._options.interval]
        if len(calls) >= self._options.limit:
            return Refuse(
                f"{len(calls)} calls in {show_duration(self._options.interval)},"
                f" {self._options.limit} are allowed"
            )
        calls.append(now)
        state.replace(path, encode(self._options.interval, calls))
        return CONTINUE


def encode(interval: float, calls: list[float]) -> bytes:
    """Return the state of one key."""
    text = f"{_HEADER} {interval!r}\n" + "".join(f"{moment!r}\n" for moment in calls)
    return (text + "end\n").encode()


def parse(kept: bytes) -> tuple[float, list[float]]:
    """Return interval and moments. Raises ValueError where it is not whole."""
    lines = kept.decode("ascii").split("\n")
    header, _, interval = lines[0].rpartition(" ")
    if header != _HEADER or lines[-2:] != ["end", ""]:
        raise ValueError("is damaged")
    moments = [float(line) for line in lines[1:-2]]
    if any(not 0 <= moment < 1e12 for moment in moments):
        raise ValueError("is damaged")
    return float(interval), moments


def _keys(where: str) -> int:
    return sum(len(name) == 64 for name in os.listdir(where))


def _forget_old(where: str, now: float) -> None:
    """Remove the keys whose calls are all out of their interval."""
    for name in os.listdir(where):
        if len(name) != 64:
            continue
        kept = state.read(f"{where}/{name}")
        if kept is None:
            continue
        interval, calls = parse(kept)
        if not calls or max(calls) <= now - interval:
            os.unlink(f"{where}/{name}")
