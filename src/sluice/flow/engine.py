"""What moves the bytes of one end of a call, and keeps the facts about it up to date.

Every event (a descriptor is ready, the process ended) does what it can without waiting, and then
``_settle`` asks the rules of ``callstate`` what follows: is something due to be sent, is this end
finished, and which events are wanted next. What is wanted is computed afresh each time:

    event wanted           while
    channel readable       it is not at its end, the streams are attached, and nothing received
                           waits for IN or for stderr (back-pressure: one message at most waits)
    channel writable       something waits to be sent
    OUT, ERR readable      the stream is open, and nothing waits to be sent
    IN writable            something received waits for it
    IN hang-up             otherwise, while it is open

so that the two directions never wait for each other, and an idle call wakes nobody.

Losing the channel is the end of reading it. A failed write only ends sending: what the other side
sent before it went, exit code included, is still received (5.6, 10.4, 17 number 15).

``channel.DataChannel`` is this with a handshake before it and an interface around it.
docs/spec/wire-protocol.md 10.
"""

from __future__ import annotations

from sluice.errors import RemoteError
from sluice.flow.callstate import CallState
from sluice.flow.endpoint import GROW_AFTER, Endpoint
from sluice.flow.inlet import Inlet
from sluice.flow.receiver import SHARE, Receiver
from sluice.flow.sender import EMPTY, ENDED, Sender
from sluice.wire.messages import (
    DATA_STDERR,
    DATA_STDIN,
    DATA_STDOUT,
    encode,
    encode_exit_code,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.flow.reactor import Loop


def terminal_table() -> bytes:
    """Return what character filtering makes of each byte (section 10.9)."""
    # Most calls filter nothing, and a module costs the small programs a fifth of a millisecond.
    from sluice.wire.names import TERMINAL_TABLE

    return TERMINAL_TABLE


class Engine:
    """Joins IN, OUT and ERR to a channel. A base class; see ``channel.DataChannel``."""

    def __init__(
        self,
        loop: Loop,
        read_fd: int,
        write_fd: int,
        *,
        caller: bool,
        on_warning: Callable[[str], None] | None,
    ) -> None:
        """Take the channel's two descriptors; the local streams come with ``_take_streams``."""
        self._loop = loop
        self._caller = caller
        self._on_open: Callable[[], None] | None = None
        self._on_stderr: Callable[[memoryview], None] | None = None
        self._on_out_end: Callable[[], None] | None = None
        self._on_unwanted: Callable[[], None] | None = None
        self._filter_stdout = self._filter_stderr = False
        self._exit_on_client_eof = self._exit_on_service_eof = False

        self.state = CallState(caller=caller)
        self._reading = Endpoint(loop, read_fd)
        self._writing = (
            self._reading if read_fd == write_fd else Endpoint(loop, write_fd, writing=True)
        )
        self._reading.on_read = self._receive
        self._writing.on_write = self._channel_writable
        self._sender = Sender(self._writing.fd)
        self._receiver = Receiver(
            self.state,
            self._reading,
            on_hello=self._take_hello,
            on_status=self._out_ended,
            on_stderr=self._show_stderr,
            on_warning=on_warning,
        )
        self._in: Endpoint | None = None
        self._out: Endpoint | None = None
        self._err: Endpoint | None = None
        self._stderr: Endpoint | None = None
        self._announced = False
        self._broken = ""
        self._grown_in = self._grown_out = False
        self._closed = False

    # --- what the subclass adds -----------------------------------------------------------------

    def _take_hello(self, body: bytes) -> None:
        """Act on the other side's HELLO. Raises RemoteError for a version that is too old."""
        raise NotImplementedError

    def _end(self, status: int) -> None:
        """Close everything and tell the result; the last thing that happens."""
        raise NotImplementedError

    def _fatal(self, reason: str) -> None:
        """Close everything and tell what broke; the other side is told nothing (10.3)."""
        raise NotImplementedError

    # --- the local streams ----------------------------------------------------------------------

    def _take_streams(self, in_fd: int, out_fd: int, err_fd: int, has_process: bool) -> None:
        """Take the local streams; -1 stands for none."""
        state, receiver = self.state, self._receiver
        receiver.attached = True
        state.has_process = state.has_process or has_process
        if in_fd >= 0:
            self._in = Endpoint(self._loop, in_fd, writing=True)
            self._in.on_write = self._in_writable
            self._in.on_hangup = self._in_gone
            state.in_open = True
            table = terminal_table() if self._filter_stdout and self._caller else None
            receiver.inlet = Inlet(self._in, self._in_closed, table=table)
            receiver.inlet.on_unwanted = self._on_unwanted
        if out_fd >= 0:
            shared = self._in if in_fd == out_fd else None
            self._out = shared or Endpoint(self._loop, out_fd)
            if self._in is not None and shared is None:
                self._in.share_flags(self._out)
            self._out.on_read = self._out_readable
            state.out_open = True
        if self._caller:
            if err_fd >= 0:
                self._set_stderr(Endpoint(self._loop, err_fd, writing=True))
        elif err_fd >= 0:
            self._err = Endpoint(self._loop, err_fd)
            self._err.on_read = self._err_readable
            state.err_open = True
        else:
            self._sender.queue(encode(DATA_STDERR))

    # --- sending -------------------------------------------------------------------------------

    def _channel_writable(self) -> None:
        if self._flush():
            # Go on where sending stopped, before the wanted events are changed and changed back.
            self._pull_out()
            self._pull_err()
        self._settle()

    def _out_readable(self) -> None:
        self._pull_out()
        self._settle()

    def _err_readable(self) -> None:
        self._pull_err()
        self._settle()

    def _pull_out(self) -> None:
        source = self._out
        if self.state.out_open and source is not None:
            kind = DATA_STDIN if self._caller else DATA_STDOUT
            if self._pull(source, kind, None):
                if self._on_out_end is not None:
                    self._on_out_end()
                if self._out is source:
                    self._out_ended()

    def _pull_err(self) -> None:
        if self.state.err_open and self._err is not None:
            ended = self._pull(self._err, DATA_STDERR, self._on_stderr)
            if ended:
                self._err_ended()

    def _pull(self, source: Endpoint, kind: int, look: Callable[[memoryview], None] | None) -> bool:
        """Send what ``source`` has while the channel takes it; tell whether it has ended."""
        sender = self._sender
        for _ in range(SHARE):
            if not self._flush():
                return False
            try:
                count = sender.take(source, kind, look)
            except OSError as error:
                if not self._caller:
                    self._broken = f"the command's output cannot be read: {error.strerror}"
                return True
            if count == EMPTY:
                return False
            if count == ENDED:
                return True
        self._flush()
        return False

    def _flush(self) -> bool:
        """Send what waits; return whether nothing does any more and more can be sent."""
        if self.state.mute:
            return False
        try:
            empty = self._sender.flush()
        except OSError:
            self._muted()
            return False
        if self._sender.taken > GROW_AFTER and not self._grown_out:
            self._grown_out = True
            self._writing.grow()
            if self._out is not None:
                self._out.grow()
        return empty

    def _muted(self) -> None:
        """Nothing can be sent any more. What was sent to us is still received."""
        self.state.mute = True
        self._sender.close()
        self._close_out()
        self._close_err()

    def _out_ended(self) -> None:
        """OUT has ended: say so, once."""
        if not self.state.out_open:
            return
        self._sender.queue(encode(DATA_STDIN if self._caller else DATA_STDOUT))
        self._close_out()
        if self._exit_on_service_eof and not self._caller and not self.state.has_process:
            self._close_in()

    def _err_ended(self) -> None:
        """ERR has ended: say so, once."""
        if self.state.err_open:
            self._sender.queue(encode(DATA_STDERR))
            self._close_err()

    # --- receiving -----------------------------------------------------------------------------

    def _receive(self) -> None:
        """The channel is readable, or what was received can be delivered now."""
        try:
            self._receiver.run()
        except RemoteError as error:
            self._fatal(str(error))
            return
        if self._receiver.received > GROW_AFTER and not self._grown_in:
            self._grown_in = True
            self._reading.grow()
            if self._in is not None:
                self._in.grow()
        if self.state.lost:
            self._muted()
            self._close_in()
        self._settle()

    def _in_writable(self) -> None:
        if self._receiver.inlet is not None:
            self._receiver.inlet.flush()
        self._receive()

    def _in_gone(self) -> None:
        """Nobody reads IN any more."""
        self._close_in()
        self._receive()

    def _show_stderr(self, payload: memoryview) -> None:
        """Pass on what the service wrote to its stderr."""
        if self._on_stderr is not None:
            data = bytes(payload)
            if self._filter_stderr:
                data = data.translate(terminal_table())
            self._on_stderr(memoryview(data))
            return
        if self._receiver.stderr is None:
            end = Endpoint(self._loop, 2, writing=True, borrowed=True)
            self._set_stderr(end)
        stderr = self._receiver.stderr
        if stderr is not None:
            stderr.put([payload])

    def _set_stderr(self, end: Endpoint) -> None:
        """Write the other side's stderr there. That it fails is nobody's concern."""
        table = terminal_table() if self._filter_stderr else None
        self._receiver.stderr = Inlet(end, self._stderr_closed, table=table)
        end.on_write = self._stderr_writable
        self._stderr = end

    def _stderr_closed(self) -> None:
        inlet, end = self._receiver.stderr, self._stderr
        if inlet is not None and inlet.error:
            self._receiver.warn(f"stderr of the service could not be written: {inlet.error}")
        if end is not None:
            end.close()

    def _stderr_writable(self) -> None:
        if self._receiver.stderr is not None:
            self._receiver.stderr.flush()
        self._receive()

    # --- closing -------------------------------------------------------------------------------

    def _close_in(self) -> None:
        """Close IN and drop what it did not take."""
        if self._receiver.inlet is not None:
            self._receiver.inlet.close()

    def _in_closed(self) -> None:
        """IN is closed, for whatever reason (section 10.5)."""
        self.state.in_open = False
        inlet, end = self._receiver.inlet, self._in
        if inlet is not None and inlet.error:
            self._receiver.warn(f"what was received could not be written: {inlet.error}")
        if end is not None:
            end.want_write(False)
            end.want_hangup(False)
            if end is self._out or (end.is_socket and end.number > 2):
                end.shutdown(reading=False)
            else:
                end.close()
        if self._exit_on_client_eof and not self._caller and not self.state.has_process:
            self._out_ended()

    def _close_out(self) -> None:
        """Close OUT (section 10.5)."""
        state, end = self.state, self._out
        if not state.out_open:
            return
        state.out_open = False
        if end is None:
            return
        if end is self._in or end.number > 2:
            end.shutdown(reading=True)
        if end is not self._in:
            end.close()

    def _close_err(self) -> None:
        """Close ERR."""
        self.state.err_open = False
        if self._err is not None:
            self._err.close()

    # --- what follows --------------------------------------------------------------------------

    def _settle(self) -> None:
        """Send what is due, end if this end is finished, and say which events to wait for."""
        state = self.state
        if state.opened and not self._announced and not self._closed:
            self._announced = True
            if self._on_open is not None:
                self._on_open()
        if self._closed:
            return
        if self._broken:
            self._fatal(self._broken)
            return
        self._flush()
        showing = self._receiver.stderr is not None and self._receiver.stderr.holding
        finished = self._receiver.attached and state.opened and state.finished() and not showing
        if finished and not (self._caller or state.mute or state.code_sent):
            state.code_sent = True
            self._sender.queue(encode_exit_code(state.result()))
            self._flush()
        if finished and (self._caller or state.mute or not self._sender.pending):
            self._end(state.result())
            return
        self._want()

    def _want(self) -> None:
        """Ask the loop for the events of the table at the top of this module."""
        state = self.state
        sending = self._sender.pending
        self._reading.want_read(self._receiver.may_read())
        self._writing.want_write(sending)
        if self._in is not None and state.in_open:
            blocked = self._receiver.inlet is not None and self._receiver.inlet.blocked
            self._in.want_hangup(not blocked)
            self._in.want_write(blocked)
        if self._out is not None:
            self._out.want_read(state.out_open and not sending)
        if self._err is not None:
            self._err.want_read(state.err_open and not sending)
        if self._stderr is not None and self._receiver.stderr is not None:
            self._stderr.want_write(self._receiver.stderr.holding)
        self._receiver.rest()
        self._sender.rest()
