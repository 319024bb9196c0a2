"""What one end of a call knows, and what follows from it. No I/O.

Theory. An end of a call has up to three local streams, perhaps a process, and a channel:

    IN    takes what the other side sends     (the service's stdin; the caller's stdout)
    OUT   gives what is sent to it            (the service's stdout; the caller's stdin)
    ERR   likewise, the service side only

Each stream is open or closed and never opens again. Whether the end is finished is a question
about the whole of them, never about the order in which they closed, so the state is a set of facts
and the rules are functions of it: all orders of events give the same end.

    service side, finished:   IN, OUT, ERR closed, and the process (if any) ended.
                              It then sends the exit code as its last message, and closes.
    caller side, finished:    the exit code came, IN and OUT closed, the process (if any) ended.
    either side, channel lost: the process (if any) ended. (All streams are closed by the loss.)

What closes a stream:

    IN    the other side's end-of-file, once all before it is delivered; a write that fails; its
          reader gone; the process ended; the channel lost
    OUT   its end-of-file or a read that fails; caller: the exit code came; nobody receives any
          more (a write to the channel failed); the channel lost
    ERR   its end-of-file or a read that fails; nobody receives any more; the channel lost

``ROUTES`` says where a received message goes; what is not in it breaks the protocol.
docs/spec/wire-protocol.md 10.2, 10.3, 10.7, 10.8.
"""

from __future__ import annotations

from sluice.errors import RemoteError
from sluice.wire.messages import (
    DATA_EXIT_CODE,
    DATA_STDERR,
    DATA_STDIN,
    DATA_STDOUT,
    EXIT_LOST,
    HELLO,
    I32,
    MAX_DATA,
    MAX_DATA_V2,
    type_name,
)

# Where a received payload goes.
TO_IN = 1
TO_STDERR = 2
TO_STATUS = 3
IGNORED = 4
TO_HELLO = 5

SERVICE_ROUTES = {
    DATA_STDIN: TO_IN,
    DATA_STDOUT: TO_IN,  # the wrong direction is accepted as if it were right
    DATA_STDERR: IGNORED,
    DATA_EXIT_CODE: IGNORED,
}
CALLER_ROUTES = {
    DATA_STDIN: TO_IN,
    DATA_STDOUT: TO_IN,
    DATA_STDERR: TO_STDERR,
    DATA_EXIT_CODE: TO_STATUS,
}


def payload_limit(version: int) -> int:
    """Return the largest payload of a data message under ``version`` (section 2.1)."""
    return MAX_DATA_V2 if version < 3 else MAX_DATA


class CallState:
    """The facts about one end of one call."""

    __slots__ = (
        "caller",
        "code_sent",
        "err_open",
        "has_process",
        "in_open",
        "limit",
        "local_status",
        "lost",
        "mute",
        "opened",
        "out_open",
        "process_ended",
        "remote_status",
        "routes",
    )

    def __init__(self, *, caller: bool) -> None:
        """Begin before the handshake, without streams."""
        self.caller = caller
        self.routes = CALLER_ROUTES if caller else SERVICE_ROUTES
        self.limit = MAX_DATA
        # The handshake is over.
        self.opened = False
        self.in_open = self.out_open = self.err_open = False
        self.has_process = self.process_ended = False
        self.local_status = 0
        self.remote_status: int | None = None
        # The other side closed; nothing more will come.
        self.lost = False
        # A write to the channel failed; nothing more can be sent.
        self.mute = False
        self.code_sent = False

    def check(self, kind: int, size: int) -> None:
        """Accept the header of a received message or raise RemoteError (section 10.3)."""
        if not self.opened:
            if kind != HELLO or size != 4:
                raise RemoteError(f"{type_name(kind)} of {size} bytes instead of HELLO")
            return
        if kind not in self.routes:
            raise RemoteError(f"message of type {type_name(kind)} on a data channel")
        if size > self.limit:
            raise RemoteError(f"{type_name(kind)} with {size} bytes, {self.limit} are allowed")

    def route(self, kind: int) -> int:
        """Return where the payload of a message that ``check`` accepted goes."""
        return self.routes[kind] if self.opened else TO_HELLO

    def exit_code(self, payload: bytes) -> None:
        """Take the first (at most four) bytes of a DATA_EXIT_CODE; fewer mean 255."""
        if self.remote_status is None:
            self.remote_status = EXIT_LOST if len(payload) < 4 else I32.unpack(payload[:4])[0]

    def streams_closed(self) -> bool:
        """Tell whether IN, OUT and ERR are all closed."""
        return not (self.in_open or self.out_open or self.err_open)

    def process_done(self) -> bool:
        """Tell whether there is no process, or it has ended."""
        return self.process_ended or not self.has_process

    def finished(self) -> bool:
        """Tell whether this end is finished (for the service side: but for its exit code)."""
        if not self.process_done():
            return False
        if self.lost:
            return True
        if not self.streams_closed():
            return False
        return not self.caller or self.remote_status is not None

    def result(self) -> int:
        """Return the status 0..255 that this end ends with (section 10.7).

        Caller: the remote status unless it is 0, then the local program's. 255 where none came.
        Service side: that of the process, 0 without one.
        """
        if not self.caller:
            return self.local_status & 0xFF
        remote = -1 if self.remote_status is None else self.remote_status
        return (remote or self.local_status) & 0xFF
