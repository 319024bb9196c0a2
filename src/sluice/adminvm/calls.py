"""What the calls of one AdminVM share: their numbers, and how the end of one is known.

A call has two sides. Its end is known when each side has ended: a domain by its agent's
CONNECTION_TERMINATED or by the end of its run, dom0 by the end of what it runs. No deadline is set,
because a service may go on for days after its caller left (docs/spec/wire-protocol.md 10.8); each
side is counted against its own domain's bound until it has ended.
"""

from __future__ import annotations

import asyncio

from sluice.adminvm.audit import CallRecord

# Above the ports of the other transport, so that a number in a log cannot be mistaken for one.
FIRST_NUMBER = 1024
LAST_NUMBER = (1 << 32) - 2


class CallNumbers:
    """Numbers of calls: unique while the call lives, not used again soon after (section 20)."""

    def __init__(self, first: int = FIRST_NUMBER) -> None:
        """Begin with ``first``."""
        self._next = first
        self._live: set[int] = set()

    def take(self) -> int:
        """Return a number that no living call has."""
        while self._next in self._live:
            self._advance()
        number = self._next
        self._live.add(number)
        self._advance()
        return number

    def _advance(self) -> None:
        self._next = FIRST_NUMBER if self._next >= LAST_NUMBER else self._next + 1

    def free(self, number: int) -> None:
        """Give a number back."""
        self._live.discard(number)

    def __len__(self) -> int:
        """Count the living calls."""
        return len(self._live)


class Ends:
    """The two sides of one call that are still to end, and why the first did."""

    def __init__(self, loop: asyncio.AbstractEventLoop, record: CallRecord) -> None:
        """``record`` gets a stage for each side that ends."""
        self._over: asyncio.Future[None] = loop.create_future()
        self._record = record
        self._sides: set[str] = set()
        self.cause = ""

    def expect(self, side: str) -> Side:
        """Add a side (``source``, ``target``); return what its end is told to."""
        self._sides.add(side)
        return Side(self, side)

    def end(self, side: str, cause: str) -> None:
        """Note the end of one side; ``cause`` is empty for an ordinary one."""
        if side not in self._sides:
            return
        self._sides.discard(side)
        self._record.stage(f"{side}_ended")
        self.cause = self.cause or cause
        if not self._sides and not self._over.done():
            self._over.set_result(None)

    async def wait(self) -> str:
        """Wait until all sides have ended; return the cause, ``ended`` for an ordinary end."""
        await self._over
        return self.cause or "ended"


class Side:
    """One side of a call, as the owner of its channel."""

    __slots__ = ("_ends", "name")

    def __init__(self, ends: Ends, name: str) -> None:
        """Made by ``Ends.expect``."""
        self._ends = ends
        self.name = name

    def end(self, cause: str = "") -> None:
        """Tell the call that this side has ended."""
        self._ends.end(self.name, cause)
