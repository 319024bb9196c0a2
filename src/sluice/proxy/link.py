"""What a filter may use besides the bytes: its link to the chain (docs/spec/proxy.md 5).

A filter does no I/O of its own accord. Time, timers, chance, held bytes, counters and the log come
from its ``Link``, so that a test can put its own in their place.
"""

from __future__ import annotations

import os

from sluice.errors import ResourceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from sluice.flow.reactor import Loop
    from sluice.proxy.chain import Chain
    from sluice.proxy.stage import Stage
    from sluice.proxy.verdicts import Bytes, Direction, Verdict

# What a filter may hold that declares nothing (section 5).
DEFAULT_MAX_HELD = 1 << 20


class Call:
    """Who calls what, as the proxy knows it. All parts are validated; none needs escaping.

    ``target`` may be a keyword (``@default``, ``@dispvm:NAME``). ``argument`` is None where the
    call has none. ``ident`` is a number that names the call in log and audit.
    """

    __slots__ = ("argument", "chain", "form", "ident", "service", "source", "target")

    def __init__(
        self,
        source: str,
        target: str,
        service: str,
        argument: str | None = None,
        *,
        chain: str = "",
        ident: str = "",
        form: str = "program",
    ) -> None:
        """Keep the parts of the call; ``form`` is how the proxy runs (section 2)."""
        self.source = source
        self.target = target
        self.service = service
        self.argument = argument
        self.chain = chain
        self.ident = ident
        self.form = form

    @property
    def descriptor(self) -> str:
        """``SERVICE`` or ``SERVICE+ARGUMENT``."""
        return self.service if self.argument is None else f"{self.service}+{self.argument}"


class HeldTooMuchError(ResourceError):
    """A filter holds more than it declared, or than it may."""


class Memory:
    """The bytes that all calls of this process hold together (``max_memory``, section 4).

    ``full`` turns true one piece before the bound, so that what is being read still fits; whoever
    listens is told when it changes.
    """

    def __init__(self, limit: int = 256 << 20, piece: int = 1 << 16) -> None:
        """Take the bound, and the most that one reading adds, in bytes."""
        self.limit = limit
        self.threshold = max(limit - piece, 0)
        self.held = 0
        self.peak = 0
        self.full = self.threshold == 0
        self._listeners: list[Callable[[], None]] = []

    def add(self, size: int) -> None:
        """Count ``size`` bytes more (or fewer, where it is negative)."""
        self.held += size
        if self.held > self.peak:
            self.peak = self.held
        full = self.held >= self.threshold
        if full is not self.full:
            self.full = full
            for listener in self._listeners[:]:
                listener()

    def set_limit(self, limit: int, piece: int = 1 << 16) -> None:
        """Change the bound; what is held already stays."""
        self.limit = limit
        self.threshold = max(limit - piece, 0)
        self.add(0)

    def listen(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever ``full`` changes."""
        self._listeners.append(callback)

    def forget(self, callback: Callable[[], None]) -> None:
        """Undo ``listen``."""
        if callback in self._listeners:
            self._listeners.remove(callback)


class Held:
    """The bytes of one direction that a filter keeps; every byte of it is counted.

    HOLD appends the chunk here. A filter may append what it wants to keep of a chunk that it
    answers otherwise, and takes out what it then hands on.
    """

    __slots__ = ("_bytes", "_charge")

    def __init__(self, charge: Callable[[int], None]) -> None:
        """Take the function that counts: more bytes, or fewer where the number is negative."""
        self._charge = charge
        self._bytes = bytearray()

    def __len__(self) -> int:
        """Return how many bytes are held."""
        return len(self._bytes)

    def append(self, chunk: Bytes) -> None:
        """Copy ``chunk`` to the end. Raises HeldTooMuchError over the declared bound."""
        self._charge(len(chunk))
        self._bytes += chunk

    def take(self, size: int = -1) -> bytes:
        """Remove and return the first ``size`` bytes, or all."""
        if size < 0 or size >= len(self._bytes):
            taken, self._bytes = bytes(self._bytes), bytearray()
        else:
            taken = bytes(memoryview(self._bytes)[:size])
            del self._bytes[:size]
        self._charge(-len(taken))
        return taken

    def find(self, what: bytes, start: int = 0) -> int:
        """Return where ``what`` begins, or -1."""
        return self._bytes.find(what, start)

    def rfind(self, what: bytes) -> int:
        """Return where ``what`` begins last, or -1."""
        return self._bytes.rfind(what)

    def peek(self, size: int = -1) -> bytes:
        """Return a copy of the first ``size`` bytes, or of all, without taking them."""
        return bytes(self._bytes if size < 0 else self._bytes[:size])


class Timers:
    """The timers of one chain: for each filter and key when, by the chain's clock, it is due."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Take the clock."""
        self._clock = clock
        self._timers: dict[tuple[Stage, str], float] = {}

    def set(self, stage: Stage, key: str, delay: float) -> None:
        """Make ``timer(key)`` of a filter due in ``delay`` seconds."""
        self._timers[stage, key] = self._clock() + delay

    def cancel(self, stage: Stage, key: str) -> None:
        """Forget a timer."""
        self._timers.pop((stage, key), None)

    def clear(self) -> None:
        """Forget all."""
        self._timers.clear()

    def next_due(self) -> float | None:
        """Return when the next one is due; None for never."""
        return min(self._timers.values()) if self._timers else None

    def due(self) -> Iterator[tuple[Stage, str]]:
        """Take out those that are due, the earliest first, one by one.

        One that is set meanwhile waits for the next time, even if it is due at once: a filter that
        always wants to be called again does not keep everything else from happening.
        """
        now = self._clock()
        due = [(when, place) for place, when in self._timers.items() if when <= now]
        for when, place in sorted(due, key=_when):
            if self._timers.get(place) == when:
                del self._timers[place]
                yield place


def _when(due: tuple[float, tuple[Stage, str]]) -> float:
    return due[0]


class Link:
    """What one filter of one call can see and do. Made by the chain; methods never block."""

    __slots__ = ("_chain", "_stage", "call")

    def __init__(self, chain: Chain, stage: Stage) -> None:
        """Made by ``Chain``; a filter never makes one."""
        self._chain = chain
        self._stage = stage
        self.call = chain.call

    def time(self) -> float:
        """Return seconds of the chain's clock, which only goes forward."""
        return self._chain.clock()

    def wall_time(self) -> float:
        """Return seconds since 1970. The clock may be set back."""
        return self._chain.tools.wall_clock()

    def random(self) -> float:
        """Return an unpredictable number from 0 up to, not including, 1."""
        return self._chain.tools.random()

    def set_timer(self, key: str, delay: float) -> None:
        """Let ``timer(key)`` be called in ``delay`` seconds; a running one of that key is moved."""
        self._chain.timers.set(self._stage, key, delay)

    def cancel_timer(self, key: str) -> None:
        """Forget the timer of that key, if it runs."""
        self._chain.timers.cancel(self._stage, key)

    def held(self, direction: Direction) -> Held:
        """Return the bytes of a direction that this filter holds."""
        return self._stage.held[direction]

    def moved(self, direction: Direction) -> int:
        """Return how many bytes were read from the sender of a direction, spliced ones too."""
        return self._chain.tools.moved(direction)

    def delivered(self, direction: Direction) -> int:
        """Return how many bytes the reader of a direction was given, spliced ones too."""
        return self._chain.tools.delivered(direction)

    def ended(self, direction: Direction) -> bool:
        """Tell whether a direction has ended and all of it was delivered."""
        return self._chain.tools.ended(direction)

    def waiting(self, direction: Direction) -> int:
        """Return how many bytes of a direction wait for a slow reader behind the last filter."""
        return self._chain.tools.waiting(direction)

    def on_drained(self, callback: Callable[[Direction], None]) -> None:
        """Call ``callback(direction)`` whenever what waited in a direction is delivered."""
        self._stage.on_drained = callback

    def log(self, text: str) -> None:
        """Write a line to the proxy's log, under the name of the filter. It is escaped there."""
        self._chain.tools.log(f"{self._stage.name}: {text}")

    def act(self, *verdicts: Verdict) -> None:
        """Do what a timer could answer, at any other time: for filters with events of their own."""
        self._chain.act(self._stage, verdicts)

    @property
    def name(self) -> str:
        """The name of this filter in its chain; unlike any other's there."""
        return self._stage.name

    @property
    def chain(self) -> str:
        """The name of the chain."""
        return self.call.chain

    @property
    def state_directory(self) -> str:
        """The directory for what must outlive the call; it may not exist yet."""
        return self._chain.tools.state_directory

    @property
    def loop(self) -> Loop:
        """The event loop, for filters that wait for descriptors. Raises LookupError without one."""
        loop = self._chain.tools.loop
        if loop is None:
            raise LookupError("this filter needs an event loop")
        return loop


class Tools:
    """What a chain gets from its surroundings: the flow's, or a test's."""

    def __init__(
        self,
        *,
        wall_clock: Callable[[], float] | None = None,
        random: Callable[[], float] | None = None,
        log: Callable[[str], None] | None = None,
        state_directory: str = "",
        loop: Loop | None = None,
    ) -> None:
        """Take the clock of the day, chance, the log; those not given are the real ones."""
        self.wall_clock = wall_clock or _wall_clock
        self.random = random or _random
        self.log: Callable[[str], None] = log or _no_log
        self.state_directory = state_directory
        self.loop = loop
        self.shared: dict[str, Any] = {}

    def moved(self, direction: Direction) -> int:
        """Return bytes read from the sender of ``direction``; the flow replaces this."""
        return 0

    def delivered(self, direction: Direction) -> int:
        """Return bytes given to the reader of ``direction``; the flow replaces this."""
        return 0

    def ended(self, direction: Direction) -> bool:
        """Tell whether ``direction`` is delivered and closed; the flow replaces this."""
        return False

    def waiting(self, direction: Direction) -> int:
        """Return how many bytes wait behind the last filter; the flow replaces this."""
        return 0


def _wall_clock() -> float:
    import time

    return time.time()


def _random() -> float:
    return (int.from_bytes(os.urandom(7), "big") >> 3) / (1 << 53)


def _no_log(_text: str) -> None:
    return None
