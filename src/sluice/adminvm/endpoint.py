"""One domain's endpoint in the AdminVM: its link on a socket, told apart from who uses it.

``Endpoint`` joins the sans-I/O ``Link`` with a ``ControlChannel`` and tells an ``Owner`` what the
domain wants. ``qrexec-daemon`` and ``sluice up`` differ in their owners only: how calls are
numbered (``channels``), how bytes travel and where decisions come from.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Protocol

from sluice.adminvm.channels import Channel
from sluice.adminvm.control import ControlChannel
from sluice.adminvm.link import (
    Broken,
    Ended,
    Event,
    Greeted,
    Link,
    Rejected,
    Request,
    Requested,
    State,
)
from sluice.adminvm.local import LocalServer
from sluice.errors import ResourceError


class Owner(Protocol):
    """What an endpoint tells its owner. All calls come from the loop, none may block."""

    def greeted(self, endpoint: Endpoint) -> None:
        """Note that the handshake is done; ``endpoint.link.version`` is valid from now on."""

    def requested(self, endpoint: Endpoint, request: Request) -> None:
        """Take a valid request of the domain, pending."""

    def rejected(self, endpoint: Endpoint, event: Rejected) -> None:
        """Note that a request was refused without being looked at; the refusal has been sent."""

    def ended_side(self, endpoint: Endpoint, channel: Channel) -> None:
        """Note that the domain reported the end of a channel."""

    def lost(self, endpoint: Endpoint, reason: str, broken: bool) -> None:
        """Note, once, that the control channel is gone.

        ``broken`` where the agent broke the protocol; ``reason`` is safe to log.
        """


class Endpoint:
    """The AdminVM's end of one running domain."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        domid: int,
        sock: socket.socket,
        link: Link,
        owner: Owner,
        *,
        passed: bool = False,
    ) -> None:
        """Take the domain's name and number, a connected control socket and a fresh link.

        ``passed`` says that descriptors travel beside the messages (section 20).
        """
        self.name = name
        self.domid = domid
        self.link = link
        self.local: LocalServer | None = None
        self._owner = owner
        self._loop = loop
        self._channel = ControlChannel(
            loop,
            sock,
            on_bytes=self._bytes,
            on_end=self._ended,
            on_writable=self._writable,
            bounded_flight=passed,
        )

    def start(self) -> None:
        """Begin to listen to the agent."""
        self._channel.start()

    @property
    def open(self) -> bool:
        """Whether calls can be made through the endpoint."""
        return self.link.state is State.OPEN

    # --- from the owner -------------------------------------------------------------------

    def execute(
        self, kind: int, domain: int, number: int, text: bytes, fds: Sequence[int] = ()
    ) -> None:
        """Tell the agent to execute ``text`` for a data channel. Takes over ``fds``.

        Raises LocalError where the link is not open, ResourceError where the agent does not read;
        ``fds`` are the caller's again then.
        """
        self._check_room()
        self._send(self.link.execute(kind, domain, number, text), fds)

    def connect(
        self,
        request: Request,
        domain: int,
        number: int,
        text: bytes = b"",
        fds: Sequence[int] = (),
    ) -> None:
        """Allow ``request`` and tell the agent where to connect; errors as for ``execute``."""
        self._check_room()
        self._send(self.link.connect(request, domain, number, text), fds)

    def forward(self, message: bytes) -> None:
        """Send a message that was made for this link already."""
        self._send(message)

    def refuse(self, request: Request) -> None:
        """Refuse ``request``, unless it was decided or cannot be told any more."""
        self._send(self.link.refuse(request))

    def close(self) -> None:
        """End the channel from our side. The owner is not told."""
        self.link.end()
        self._channel.close()
        if self.local is not None:
            self.local.close()

    async def room(self, seconds: float) -> bool:
        """Wait, at most ``seconds``, until the agent has read enough for another call.

        Tells whether there is room; there is none any more where the channel has ended.
        """
        return await self._channel.room(seconds)

    @property
    def busy(self) -> bool:
        """Whether calls should wait until the agent has read more."""
        return self._channel.busy

    async def flush(self, seconds: float) -> None:
        """Wait until the agent has been sent everything, at most ``seconds``."""
        end = self._loop.time() + seconds
        while self._channel.queued and not self._channel.closed and self._loop.time() < end:
            await asyncio.sleep(0.01)

    # --- from the socket ------------------------------------------------------------------

    def _check_room(self) -> None:
        if self._channel.full:
            raise ResourceError("the agent does not read its control channel")

    def _send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        self._channel.send(message, fds)
        if self._channel.busy and self.local is not None and not self.local.paused:
            self.local.pause()

    def _writable(self) -> None:
        if self.local is not None:
            self.local.resume()

    def _bytes(self, untrusted_data: bytes) -> None:
        for event in self.link.receive(untrusted_data):
            self._handle(event)

    def _handle(self, event: Event) -> None:
        match event:
            case Greeted():
                self._send(event.answer)
                self._owner.greeted(self)
            case Requested():
                self._owner.requested(self, event.request)
            case Rejected():
                self._send(event.answer)
                self._owner.rejected(self, event)
            case Ended():
                self._owner.ended_side(self, event.channel)
            case Broken():
                self._lose(event.reason, broken=True)

    def _ended(self) -> None:
        truncated = self.link.end()
        reason = "the agent's last message was cut short" if truncated else "the agent is gone"
        self._lose(reason, broken=False)

    def _lose(self, reason: str, *, broken: bool) -> None:
        self.close()
        self._owner.lost(self, reason, broken)
