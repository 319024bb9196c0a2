"""The data engine: joins local streams to one data channel, for either side of a call.

Theory. The protocol's state is in ``callstate``: facts, and rules that are functions of them. This
module keeps the facts up to date and moves bytes. Every event (a descriptor is ready, the process
ended, a deadline passed) does what it can without waiting, and then ``_settle`` asks the rules what
follows: is something due to be sent, is this end finished, and which events are wanted next. What
is wanted is computed afresh each time:

    event wanted           while
    channel readable       it is not at its end, the streams are attached, and nothing received
                           waits for IN or for stderr (back-pressure: one message at most waits)
    channel writable       something waits to be sent
    OUT, ERR readable      the stream is open, and nothing waits to be sent
    IN writable            something received waits for it
    IN hang-up             otherwise, while it is open

so that the two directions never wait for each other, and an idle call wakes nobody.

How the bytes move, and what is copied and what the kernel moves: see ``sender`` and ``receiver``.

Losing the channel is the end of reading it. A failed write only ends sending: what the other side
sent before it went, exit code included, is still received (5.6, 10.4, 17 number 15).

docs/spec/wire-protocol.md 4.4, 10, 13.6, 17.
"""

from __future__ import annotations

from sluice.errors import RemoteError
from sluice.flow.callstate import CallState, payload_limit
from sluice.flow.endpoint import Endpoint, close_fd
from sluice.flow.inlet import Inlet
from sluice.flow.receiver import SHARE, Receiver
from sluice.flow.sender import EMPTY, ENDED, Sender
from sluice.flow.spare import grow
from sluice.wire.messages import (
    DATA_STDERR,
    DATA_STDIN,
    DATA_STDOUT,
    PROTOCOL_VERSION,
    U32,
    encode,
    encode_exit_code,
    encode_hello,
    negotiate,
)
from sluice.wire.names import TERMINAL_TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.flow.reactor import Handle, Loop

# A pipe that has passed so many bytes is worth more room, in bytes.
_GROW_AFTER = 1 << 20
_GROWN = 1 << 18


class DataChannel:
    """One end of one call. Owns the descriptors given to it, and closes them.

    ``on_done(status)`` or ``on_fatal(reason)`` is called exactly once, as the last thing, with
    everything closed, unless ``close`` comes first. Statuses are 0..255 (``CallState.result``);
    ``lost`` tells whether the channel went before the call was over. ``opened`` tells, in
    ``on_fatal``, a failed handshake (False) from a violation afterwards.

    The service side may be made without streams (all of them -1): ``on_open`` is called after
    the handshake, and ``attach`` (or ``fail``, or ``send_exit_only``) then or later; until then
    nothing is read from the channel. On the caller side ``err_fd`` is where the other side's stderr
    is written (-1: descriptor 2, which stays open); with ``on_stderr`` it goes there instead.
    """

    def __init__(
        self,
        loop: Loop,
        read_fd: int,
        write_fd: int,
        *,
        caller: bool,
        in_fd: int = -1,
        out_fd: int = -1,
        err_fd: int = -1,
        on_done: Callable[[int], None],
        on_fatal: Callable[[str], None],
        hello: str = "send-first",
        version: int = PROTOCOL_VERSION,
        has_process: bool = False,
        prefix: bytes = b"",
        service_descriptor: bytes = b"",
        filter_stdout: bool = False,
        filter_stderr: bool = False,
        exit_on_client_eof: bool = False,
        exit_on_service_eof: bool = False,
        handshake_timeout: float = 10.0,
        on_stderr: Callable[[memoryview], None] | None = None,
        on_open: Callable[[], None] | None = None,
        on_out_end: Callable[[], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        """Take the descriptors; nothing happens before ``start``.

        hello: "send-first" (callers, and services in a domain), "read-first" (services in dom0) or
        "done" (the handshake was made elsewhere, with ``version``). handshake_timeout: seconds, 0
        means none. prefix: sent before anything of OUT. service_descriptor: written to IN before
        anything received. on_out_end: called when OUT has ended, before that is acted on: the last
        moment for ``use_single_socket``.
        """
        self._loop = loop
        self._caller = caller
        self._on_done = on_done
        self._on_fatal = on_fatal
        self._on_open = on_open
        self._on_stderr = on_stderr
        self._on_out_end = on_out_end
        self._hello = hello
        self._version = version
        self._prefix = prefix
        self._filter_stdout = filter_stdout
        self._filter_stderr = filter_stderr
        self._exit_on_client_eof = exit_on_client_eof
        self._exit_on_service_eof = exit_on_service_eof
        self._timeout = handshake_timeout
        self._timer: Handle | None = None

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

        self._descriptor = service_descriptor
        self._late = max(in_fd, out_fd, err_fd) < 0
        self._attached = False
        self._early: tuple[int, int, int, bool] = (in_fd, out_fd, err_fd, has_process)
        self._failed: list[bytes] = []
        self._broken = ""
        self._announced = False
        self._grown = False
        self._single = False
        self._closed = False

    # --- what the owner may do ------------------------------------------------------------------

    @property
    def bytes_in(self) -> int:
        """Bytes of payload for IN that were received (not stderr)."""
        return self._receiver.received

    @property
    def bytes_out(self) -> int:
        """Bytes of payload taken from OUT and ERR."""
        return self._sender.taken

    @property
    def opened(self) -> bool:
        """Whether the handshake is over."""
        return self.state.opened

    @property
    def lost(self) -> bool:
        """Whether the channel ended before this end had what it needs: a caller, the exit code."""
        state = self.state
        return state.lost and not (state.caller and state.remote_status is not None)

    def start(self) -> None:
        """Begin: handshake, then data."""
        if self._hello == "done":
            self._open(self._version)
        else:
            if self._hello == "send-first":
                self._sender.queue(encode_hello())
            if self._timeout > 0:
                self._timer = self._loop.call_later(self._timeout, self._handshake_late)
        self._settle()

    def attach(self, in_fd: int, out_fd: int, err_fd: int = -1, *, has_process: bool) -> None:
        """Give the streams of the command that was started (the service side, after on_open).

        in_fd may equal out_fd (a socket service). Without ``err_fd`` the end of stderr is sent at
        once. If the channel is gone meanwhile, the descriptors are closed.
        """
        if self._closed or self._attached:
            for fd in {in_fd, out_fd, err_fd}:
                close_fd(fd)
            return
        self._attach(in_fd, out_fd, err_fd, has_process)
        # Bytes that came with the handshake have been read already.
        self._receive()

    def fail(self, code: int, *, dom0: bool = False) -> None:
        """Report that the command could not be started (section 13.6), and close."""
        if self._attached or self._closed:
            return
        ends = [encode(DATA_STDOUT), encode(DATA_STDERR)]
        if dom0:
            ends.reverse()
        if self.state.opened:
            for message in ends:
                self._sender.queue(message)
        else:
            # Behind our HELLO, which may not have been sent yet.
            self._failed = ends
        self.send_exit_only(code)

    def send_exit_only(self, code: int) -> None:
        """Send the exit code and nothing else (JUST_EXEC, section 7.4.5), and close."""
        if self._attached or self._closed:
            return
        self._attached = self._receiver.attached = True
        self.state.local_status = code
        self._settle()

    def process_exited(self, status: int) -> None:
        """Say that the process ended, with 0..255 or 128 + signal."""
        if self._closed or self.state.process_ended:
            return
        self.state.process_ended = True
        self.state.has_process = True
        self.state.local_status = status
        self._close_in()
        self._settle()

    def use_single_socket(self) -> None:
        """Read OUT from the socket that serves as IN from now on (SIGUSR1, section 10.6).

        Honoured once, for a process whose stdin is a socket and whose output has not ended.
        """
        stdin = self._in
        if self._single or self._closed or not self.state.has_process or not self.state.out_open:
            return
        if stdin is None or stdin is self._out or not stdin.is_socket or stdin.closed:
            return
        self._single = True
        if self._out is not None:
            self._out.shutdown(reading=True)
            self._out.close()
        self._out = stdin
        stdin.on_read = self._out_readable
        self._settle()

    def close(self) -> None:
        """Abort at once: close every descriptor; no callback comes any more."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._sender.close()
        for end in (self._in, self._out, self._err, self._stderr, self._reading, self._writing):
            if end is not None:
                end.close()
        for fd in {self._early[0], self._early[1], self._early[2]}:
            close_fd(fd)

    # --- handshake -----------------------------------------------------------------------------

    def _handshake_late(self) -> None:
        self._timer = None
        self._fatal("no handshake in time")

    def _open(self, version: int) -> None:
        """Begin the data phase under the effective ``version``."""
        state = self.state
        state.opened = True
        state.limit = self._sender.limit = payload_limit(version)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        prefix = self._prefix
        for start in range(0, len(prefix), state.limit):
            self._sender.queue(encode(DATA_STDIN, prefix[start : start + state.limit]))
        for message in self._failed:
            self._sender.queue(message)
        if not self._late and not self._attached:
            self._attach(*self._early)

    def _take_hello(self, body: bytes) -> None:
        """Answer the version that the other side offers, if we have not yet."""
        version = negotiate(U32.unpack(body)[0])
        if self._hello == "read-first":
            self._sender.queue(encode_hello())
        self._open(version)

    def _attach(self, in_fd: int, out_fd: int, err_fd: int, has_process: bool) -> None:
        """Take the local streams."""
        state, receiver = self.state, self._receiver
        self._attached = receiver.attached = True
        self._early = (-1, -1, -1, False)
        state.has_process = state.has_process or has_process
        if in_fd >= 0:
            self._in = Endpoint(self._loop, in_fd, writing=True)
            self._in.on_write = self._in_writable
            self._in.on_hangup = self._in_gone
            state.in_open = True
            table = TERMINAL_TABLE if self._filter_stdout and self._caller else None
            receiver.inlet = Inlet(self._in, self._in_closed, table=table)
        if out_fd >= 0:
            shared = self._in if in_fd == out_fd else None
            self._out = shared or Endpoint(self._loop, out_fd)
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
        if receiver.inlet is not None and self._descriptor:
            receiver.inlet.put([self._descriptor])

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
        if empty and not self._grown and self._sender.taken > _GROW_AFTER:
            self._grown = True
            grow(self._writing, _GROWN)
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
            self._on_stderr(memoryview(data.translate(TERMINAL_TABLE) if self._filter_stderr else data))
            return
        if self._receiver.stderr is None:
            end = Endpoint(self._loop, 2, writing=True, borrowed=True)
            self._set_stderr(end)
        stderr = self._receiver.stderr
        if stderr is not None:
            stderr.put([payload])

    def _set_stderr(self, end: Endpoint) -> None:
        """Write the other side's stderr there. That it fails is nobody's concern."""
        table = TERMINAL_TABLE if self._filter_stderr else None
        self._receiver.stderr = Inlet(end, end.close, table=table)
        end.on_write = self._stderr_writable
        self._stderr = end

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
        end = self._in
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

    def _fatal(self, reason: str) -> None:
        """End at once; the other side is told nothing and no process is waited for (10.3)."""
        if not self._closed:
            self.close()
            self._on_fatal(reason)

    def _finish(self) -> None:
        """End in order."""
        status = self.state.result()
        self.close()
        self._on_done(status)

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
        finished = self._attached and state.opened and state.finished()
        if finished and not (self._caller or state.mute or state.code_sent):
            state.code_sent = True
            self._sender.queue(encode_exit_code(state.result()))
            self._flush()
        if finished and (self._caller or state.mute or not self._sender.pending):
            self._finish()
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
