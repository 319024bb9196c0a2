"""Numbers of data channels: who may use which, and when one is free again.

Two ways to number, one for each transport; both answer the same three calls:

* ``PortTable``: ports 513 to 768 of one daemon, which two daemons share without talking to each
  other (docs/spec/wire-protocol.md 6.6). An entry is freed by a matching CONNECTION_TERMINATED
  and by nothing else that a peer can do; it survives the client's exit and an agent's restart.
* ``CallTable``: call numbers of the transport ``passed`` (section 20). The AdminVM chooses them,
  unique while the call lives; the table of one domain only remembers which of them are alive on
  this domain's side, as caller or as callee, and bounds both.

A domain reports the end of a channel by domain *and* number. A report that does not fit is
ignored, because for a call between two domains both report and only one of them was numbered here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from sluice.errors import RemoteError, ResourceError
from sluice.wire.messages import DATA_PORTS, FIRST_DATA_PORT, LAST_DATA_PORT

MAX_CALLS = 1024


@dataclass(eq=False, slots=True)
class Channel:
    """One side of a data channel: the peer's domain number, the port or call number.

    ``owner`` is what the layer above wants to be told of when the channel ends: a waiting local
    session, or a call.
    """

    domain: int
    number: int
    outgoing: bool = False
    owner: object = None
    alive: bool = field(default=True)


class Channels(Protocol):
    """What a control link asks of its numbering."""

    def terminated(self, domain: int, number: int) -> Channel | None:
        """Take CONNECTION_TERMINATED; return the channel that it ended, or None (6.11).

        Raises RemoteError where the number can never be one of a channel.
        """

    def release(self, channel: Channel) -> None:
        """Free a channel that was never handed out."""

    def __len__(self) -> int:
        """Count the channels in use."""


def signed(domain: int) -> int:
    """Read a u32 domain number as the signed number that the port rule compares (6.6)."""
    return domain - (1 << 32) if domain & 0x80000000 else domain


class PortTable:
    """The 256 data ports of one daemon (section 6.6)."""

    def __init__(self, own_domain: int) -> None:
        """Begin with all ports free, for the daemon of domain number ``own_domain``."""
        self._own = own_domain
        self._entries: list[Channel | None] = [None] * DATA_PORTS

    def allocate(self, domain: int, owner: object = None) -> Channel:
        """Take the lowest free port that the pair may use. Raises ResourceError if there is none.

        dom0 (0) may use all; lower numbers and our own odd ports, higher numbers even ones, so
        that the two daemons of a pair never choose the same.
        """
        peer = signed(domain)
        if peer == 0:
            candidates = range(DATA_PORTS)
        else:
            candidates = range(0 if peer <= self._own else 1, DATA_PORTS, 2)
        for index in candidates:
            if self._entries[index] is None:
                channel = Channel(domain, FIRST_DATA_PORT + index, owner=owner)
                self._entries[index] = channel
                return channel
        raise ResourceError(f"no data port is free for domain {peer}")

    def terminated(self, domain: int, number: int) -> Channel | None:
        """Free the port if it belongs to ``domain``. Raises RemoteError outside 513..768."""
        if not FIRST_DATA_PORT <= number <= LAST_DATA_PORT:
            raise RemoteError(f"the end of a connection on port {number} was reported")
        channel = self._entries[number - FIRST_DATA_PORT]
        if channel is None or channel.domain != domain:
            return None
        self.release(channel)
        return channel

    def release(self, channel: Channel) -> None:
        """Free the port of ``channel``; it will be the next to be taken."""
        index = channel.number - FIRST_DATA_PORT
        if self._entries[index] is channel:
            self._entries[index] = None
        channel.alive = False

    def __len__(self) -> int:
        """Count the ports in use."""
        return sum(entry is not None for entry in self._entries)


def _role(peer: int, outgoing: bool) -> str:
    """Return which of the bounds of a domain a call counts against."""
    return "makes" if outgoing else "answers" if peer else "answers dom0 in"


class CallTable:
    """The calls that are alive on one domain's side of the transport ``passed`` (section 20).

    Calls that the domain makes and calls that it answers are bounded separately, so that others
    cannot take away its ability to call by calling it; and those of dom0 apart from both, so that
    other domains cannot keep dom0 out of it.
    """

    def __init__(self, limit: int = MAX_CALLS) -> None:
        """Allow ``limit`` calls in each of the three roles."""
        self.limit = limit
        self._alive: dict[tuple[int, int], Channel] = {}
        self._roles = dict.fromkeys(("makes", "answers", "answers dom0 in"), 0)

    def open(self, domain: int, number: int, *, outgoing: bool, owner: object = None) -> Channel:
        """Remember a call with ``domain`` under ``number``. Raises ResourceError over the limit."""
        role = _role(domain, outgoing)
        if self._roles[role] >= self.limit:
            raise ResourceError(f"the domain {role} {self.limit} calls already")
        channel = Channel(domain, number, outgoing, owner)
        self._alive[domain, number] = channel
        self._roles[role] += 1
        return channel

    def terminated(self, domain: int, number: int) -> Channel | None:
        """End the call if this domain has it with ``domain``."""
        channel = self._alive.get((domain, number))
        if channel is not None:
            self.release(channel)
        return channel

    def release(self, channel: Channel) -> None:
        """Forget a call."""
        if channel.alive:
            channel.alive = False
            self._roles[_role(channel.domain, channel.outgoing)] -= 1
            del self._alive[channel.domain, channel.number]

    def all(self) -> list[Channel]:
        """Return the calls that are alive, in the order in which they began."""
        return list(self._alive.values())

    def __len__(self) -> int:
        """Count the calls that are alive, in both roles."""
        return len(self._alive)
