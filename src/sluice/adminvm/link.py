"""The AdminVM's end of one control channel: bytes and decisions in, events and bytes out.

Theory. A control channel joins one domain's agent, which is **untrusted**, to the AdminVM. Three
things live on it, and each has its table of transitions below.

*The link* itself. The agent speaks first; we answer HELLO only after its version was found good;
then messages flow until the channel ends. What an agent may send depends on the negotiated version
(``wire.messages.from_agent``); a message that the table does not list cannot be answered or
skipped, because we no longer know what the peer means: the link is broken, and with it the domain's
daemon (section 6.7). The last event is then ``Broken`` and the link is CLOSED.

*A request*: a call that the agent asked for. It is judged on its own: a bad ident or service name
is refused and nothing else happens (section 6.8). A good one is PENDING until exactly one of
SERVICE_CONNECT and SERVICE_REFUSED was made for it; the second attempt is an error of ours, or a
local client's, never a message. At most 256 are pending; over it, and over the allowed rate, the
answer is SERVICE_REFUSED at once, before a byte of the body is looked at.

*A data channel*: numbered by ``channels``, forwarded by EXEC_CMDLINE, JUST_EXEC or
SERVICE_CONNECT, and alive until the agent reports its end.

There is no I/O here and no clock but the one inside the bucket. ``receive`` takes bytes in any
fragments and returns events, some with an ``answer`` that must be sent; the other methods return
the bytes to send. What must travel beside a message (descriptors) is the driver's business.

docs/spec/wire-protocol.md 4.3, 6.3 to 6.11, 20.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from sluice.adminvm.bucket import TokenBucket
from sluice.adminvm.channels import Channel, Channels
from sluice.errors import LocalError, RemoteError
from sluice.wire import messages as wire
from sluice.wire.names import BadTrigger, Trigger, parse_trigger

MAX_PENDING = 256
TRIGGER_RATE = 100.0
TRIGGER_BURST = 500.0


class State(enum.Enum):
    """Where the link stands."""

    GREETING = "greeting"  # the agent's HELLO has not come yet
    OPEN = "open"
    CLOSED = "closed"  # broken or ended; nothing more is read or sent


class Input(enum.Enum):
    """What can happen to a link."""

    HELLO = "hello"  # HELLO of a version that we speak
    MESSAGE = "message"  # any other message that the version's table allows
    SEND = "send"  # we want to send something
    BREAK = "break"  # the agent broke the protocol
    END = "end"  # the channel ended, or we close it


# A pair that is missing is an error: of the agent for what it sent, of ours for SEND.
LINK: dict[tuple[State, Input], State] = {
    (State.GREETING, Input.HELLO): State.OPEN,
    (State.GREETING, Input.BREAK): State.CLOSED,
    (State.GREETING, Input.END): State.CLOSED,
    (State.OPEN, Input.MESSAGE): State.OPEN,
    (State.OPEN, Input.SEND): State.OPEN,
    (State.OPEN, Input.BREAK): State.CLOSED,
    (State.OPEN, Input.END): State.CLOSED,
    (State.CLOSED, Input.END): State.CLOSED,
}


class Verdict(enum.Enum):
    """What became of a request (section 6.10)."""

    PENDING = "pending"
    ALLOWED = "allowed"  # SERVICE_CONNECT was made
    REFUSED = "refused"  # SERVICE_REFUSED was made
    DROPPED = "dropped"  # the link ended first, or the handler ended without a word


# (before, what is wanted) -> may it be? Everything that is missing may not.
REQUEST: frozenset[tuple[Verdict, Verdict]] = frozenset(
    {
        (Verdict.PENDING, Verdict.ALLOWED),
        (Verdict.PENDING, Verdict.REFUSED),
        (Verdict.PENDING, Verdict.DROPPED),
    }
)


class Request:
    """A valid call request of the domain, waiting for its decision."""

    __slots__ = ("trigger", "verdict")

    def __init__(self, trigger: Trigger) -> None:
        """Begin pending."""
        self.trigger = trigger
        self.verdict = Verdict.PENDING

    @property
    def ident(self) -> bytes:
        """The 32 bytes by which the agent knows the request."""
        return self.trigger.ident


@dataclass(frozen=True, slots=True)
class Greeted:
    """The handshake is done. ``answer`` (our HELLO) must be sent (section 4.3)."""

    version: int
    answer: bytes


@dataclass(frozen=True, slots=True)
class Requested:
    """A valid request came in and is pending."""

    request: Request


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request was refused without asking anybody; ``answer`` must be sent.

    ``flood`` is set where a bound was the reason: such events are folded, not logged one by one.
    ``reason`` is safe to log.
    """

    reason: str
    flood: bool
    answer: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """The agent reported the end of a channel that was numbered here (section 6.11)."""

    channel: Channel


@dataclass(frozen=True, slots=True)
class Broken:
    """The agent broke the protocol; always the last event. ``reason`` is safe to log."""

    reason: str


Event = Greeted | Requested | Rejected | Ended | Broken

# Where the ident lies in the body of each trigger (section 3.3).
_IDENT_AT = {wire.TRIGGER_SERVICE: 96, wire.TRIGGER_SERVICE3: 64, wire.TRIGGER_SERVICE4: 128}


class Link:
    """State of one control channel. See the theory at the head of the module."""

    def __init__(
        self,
        channels: Channels,
        *,
        default_user: str = "user",
        bucket: TokenBucket | None = None,
        max_pending: int = MAX_PENDING,
    ) -> None:
        """Begin in GREETING. ``bucket`` limits the rate of triggers; None means no limit."""
        self.channels = channels
        self.state = State.GREETING
        self.version = 0
        self._default_user = default_user.encode()
        self._bucket = bucket
        self._max_pending = max_pending
        self._pending: list[Request] = []
        self._reader = wire.MessageReader(wire.HELLO_ONLY)

    # --- what the agent sends -------------------------------------------------------------

    def receive(self, untrusted_data: bytes) -> list[Event]:
        """Take bytes of the agent and return what they mean, in order; nothing once CLOSED."""
        events: list[Event] = []
        if self.state is State.CLOSED:
            return events
        self._reader.feed(untrusted_data)
        try:
            while (message := self._reader.next()) is not None:
                event = self._take(*message)
                if event is not None:
                    events.append(event)
        except RemoteError as error:
            self._move(Input.BREAK)
            events.append(Broken(str(error)))
        return events

    def end(self) -> bool:
        """Take the end of the channel; tell whether it cut a message short.

        What is pending is dropped: nobody can be told any more (section 6.12).
        """
        truncated = self.state is not State.CLOSED and self._reader.pending > 0
        self._move(Input.END)
        self._drop_all()
        return truncated

    def _take(self, kind: int, untrusted_body: bytes) -> Event | None:
        if kind == wire.HELLO:
            version = wire.negotiate(wire.decode_hello(kind, untrusted_body))
            self._move(Input.HELLO)
            self.version = version
            self._reader.lengths = wire.from_agent(version)
            return Greeted(version, wire.encode_hello(version))
        self._move(Input.MESSAGE)
        if kind == wire.CONNECTION_TERMINATED:
            domain, number, _ = wire.decode_exec(untrusted_body)
            channel = self.channels.terminated(domain, number)
            return None if channel is None else Ended(channel)
        return self._triggered(kind, untrusted_body)

    def _triggered(self, kind: int, untrusted_body: bytes) -> Event:
        at = _IDENT_AT[kind]
        untrusted_ident = untrusted_body[at : at + wire.IDENT_SIZE]
        if self._bucket is not None and not self._bucket.take():
            return Rejected("too many requests a second", True, refusal(untrusted_ident))
        if len(self._pending) >= self._max_pending:
            return Rejected("too many pending requests", True, refusal(untrusted_ident))
        try:
            trigger = parse_trigger(kind, untrusted_body)
        except BadTrigger as bad:
            return Rejected(str(bad), False, refusal(bad.ident))
        request = Request(trigger)
        self._pending.append(request)
        return Requested(request)

    # --- what we decide -------------------------------------------------------------------

    def find(self, ident: bytes) -> Request | None:
        """Return the first pending request whose ident, as a C string, equals ``ident`` (6.5)."""
        wanted = wire.c_string(ident)
        for request in self._pending:
            if wire.c_string(request.ident) == wanted:
                return request
        return None

    def connect(self, request: Request, domain: int, number: int, text: bytes = b"") -> bytes:
        """Allow ``request``: return SERVICE_CONNECT for a data channel (section 6.10).

        ``text`` replaces the 32 ident bytes where a local client supplied its own spelling.
        Raises LocalError where the request was decided before.
        """
        self.allow(request)
        return wire.encode_exec(wire.SERVICE_CONNECT, domain, number, text or request.ident)

    def allow(self, request: Request) -> None:
        """Mark ``request`` as allowed: it can never be refused after this (section 6.5, check 6).

        Raises LocalError where it was decided before.
        """
        self._move(Input.SEND)
        self._decide(request, Verdict.ALLOWED)

    def refuse(self, request: Request) -> bytes:
        """Refuse ``request``: return SERVICE_REFUSED, or nothing where it was decided before."""
        if request.verdict is not Verdict.PENDING or self.state is not State.OPEN:
            self.drop(request)
            return b""
        self._decide(request, Verdict.REFUSED)
        return refusal(request.ident)

    def drop(self, request: Request) -> None:
        """Forget ``request`` without a word to the agent."""
        if request.verdict is Verdict.PENDING:
            self._decide(request, Verdict.DROPPED)

    def execute(self, kind: int, domain: int, number: int, text: bytes) -> bytes:
        """Return EXEC_CMDLINE or JUST_EXEC for the agent; ``text`` carries its NUL.

        ``DEFAULT:`` at the start becomes the domain's default user (section 6.5).
        """
        self._move(Input.SEND)
        if text.startswith(b"DEFAULT:"):
            text = self._default_user + text[7:]
        return wire.encode_exec(kind, domain, number, text)

    @property
    def pending(self) -> int:
        """Requests that wait for a decision."""
        return len(self._pending)

    # --- transitions ----------------------------------------------------------------------

    def _move(self, event: Input) -> None:
        after = LINK.get((self.state, event))
        if after is None:
            if event is Input.SEND:
                raise LocalError(f"the control channel is {self.state.value}")
            raise RemoteError(f"{event.value} while the control channel is {self.state.value}")
        self.state = after

    def _decide(self, request: Request, verdict: Verdict) -> None:
        if (request.verdict, verdict) not in REQUEST:
            raise LocalError(f"a request that is {request.verdict.value} cannot be {verdict.value}")
        request.verdict = verdict
        self._pending.remove(request)

    def _drop_all(self) -> None:
        for request in list(self._pending):
            self.drop(request)


def refusal(untrusted_ident: bytes) -> bytes:
    """Return SERVICE_REFUSED carrying the 32 ident bytes exactly as they came (section 6.8).

    The field of TRIGGER_SERVICE is 32 bytes too, so that no case needs padding.
    """
    return wire.encode_refused(untrusted_ident)
