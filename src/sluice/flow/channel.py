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

Received payload is spliced from the channel into IN while messages are large and nobody looks at
them; ``framing`` explains when. Sent payload: see ``sender``.

Losing the channel is the end of reading it. A failed write only ends sending: what the other side
sent before it went, exit code included, is still received (5.6, 10.4, 17 number 15).

docs/spec/wire-protocol.md 4.4, 10, 13.6, 17.
"""

from __future__ import annotations

import fcntl
import os
import select

from sluice.errors import RemoteError
from sluice.flow.callstate import (
    TO_HELLO,
    TO_IN,
    TO_STATUS,
    TO_STDERR,
    CallState,
    payload_limit,
)
from sluice.flow.endpoint import Endpoint, close_fd
from sluice.flow.framing import BULK, Framer
from sluice.flow.sender import EMPTY, ENDED, SPLICE, Sender
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

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.flow.reactor import Handle, Loop

# Messages taken in one direction before the loop sees to its other descriptors.
_SHARE = 16

# A pipe that has passed so many bytes is worth more room, in bytes.
_GROW_AFTER = 1 << 20
_GROWN = 1 << 18

# What character filtering (section 10.9) makes of each byte.
_FILTER = bytes(
    byte if 0x20 <= byte <= 0x7E or byte in b"\a\b\t\n\r" else 0x5F for byte in range(256)
)


class DataChannel:
    """One end of one call. Owns the descriptors given to it, and closes them.

    ``on_done(status)`` or ``on_fatal(reason)`` is called exactly once, as the last thing, with
    everything closed, unless ``close`` comes first. Statuses are 0..255 (``CallState.result``);
    ``lost`` tells whether the channel went before the call was over. ``opened`` tells, in
    ``on_fatal``, a failed handshake (False) from a violation afterwards.

    The service side may be made without streams (in_fd = out_fd = -1): ``on_open`` is called after
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
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        """Take the descriptors; nothing happens before ``start``.

        hello: "send-first" (callers, and services in a domain), "read-first" (services in dom0) or
        "done" (the handshake was made elsewhere, with ``version``). handshake_timeout: seconds, 0
        means none. prefix: sent before anything of OUT. service_descriptor: written to IN before
        anything received.
        """
        self._loop = loop
        self._caller = caller
        self._on_done = on_done
        self._on_fatal = on_fatal
        self._on_open = on_open
        self._on_stderr = on_stderr
        self._on_warning = on_warning
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
        self._framer = Framer(self.state.check)
        self._in: Endpoint | None = None
        self._out: Endpoint | None = None
        self._err: Endpoint | None = None
        self._stderr: Endpoint | None = None

        # BUF of section 10.1: what IN, and what stderr, did not accept yet.
        self._held: bytes | memoryview = service_descriptor
        self._held_stderr: bytes | memoryview = b""
        # IN refused a splice; the payload is still in the channel.
        self._in_full = False
        # The end of IN has been received, behind what is held.
        self._in_eof = False
        self._status = b""
        self._hello_body = b""
        self._late = in_fd < 0 and out_fd < 0
        self._attached = False
        self._early = (in_fd, out_fd, err_fd, has_process)
        self._announced = False
        self._grown = False
        self._single = False
        self._warned = False
        self._closed = False
        self._received = 0

    # --- what the owner may do ------------------------------------------------------------------

    @property
    def bytes_in(self) -> int:
        """Bytes of payload for IN that were received (not stderr)."""
        return self._received

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
        """Whether the other side closed the channel before this end was finished."""
        return self.state.lost

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
        for message in ends:
            self._sender.queue(message)
        self.send_exit_only(code)

    def send_exit_only(self, code: int) -> None:
        """Send the exit code and nothing else (JUST_EXEC, section 7.4.5), and close."""
        if self._attached or self._closed:
            return
        self._attached = True
        self.state.local_status = code
        self._held = b""
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
        self._held = self._held_stderr = b""
        for end in (self._in, self._out, self._err, self._stderr, self._reading, self._writing):
            if end is not None:
                end.close()
        if not self._attached:
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
        if not self._late:
            self._attach(*self._early)

    def _take_hello(self, piece: memoryview, last: bool) -> None:
        """Collect the version that HELLO offers and answer it."""
        self._hello_body += piece
        if not last:
            return
        version = negotiate(U32.unpack(self._hello_body)[0])
        if self._hello == "read-first":
            self._sender.queue(encode_hello())
        self._open(version)

    def _attach(self, in_fd: int, out_fd: int, err_fd: int, has_process: bool) -> None:
        """Take the local streams."""
        state = self.state
        self._attached = True
        state.has_process = state.has_process or has_process
        if in_fd >= 0:
            self._in = Endpoint(self._loop, in_fd, writing=True)
            self._in.on_write = self._in_writable
            self._in.on_hangup = self._in_gone
            state.in_open = True
        if out_fd >= 0:
            shared = self._in if in_fd == out_fd else None
            self._out = shared or Endpoint(self._loop, out_fd)
            self._out.on_read = self._out_readable
            state.out_open = True
        if self._caller:
            if err_fd >= 0:
                self._stderr = Endpoint(self._loop, err_fd, writing=True)
                self._stderr.on_write = self._stderr_writable
        elif err_fd >= 0:
            self._err = Endpoint(self._loop, err_fd)
            self._err.on_read = self._err_readable
            state.err_open = True
        else:
            self._sender.queue(encode(DATA_STDERR))
        self._write_held()

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
        if self.state.out_open and self._out is not None:
            kind = DATA_STDIN if self._caller else DATA_STDOUT
            if self._pull(self._out, kind, None):
                self._out_ended()

    def _pull_err(self) -> None:
        if self.state.err_open and self._err is not None:
            ended = self._pull(self._err, DATA_STDERR, self._on_stderr)
            if ended:
                self._err_ended()

    def _pull(self, source: Endpoint, kind: int, look: Callable[[memoryview], None] | None) -> bool:
        """Send what ``source`` has while the channel takes it; tell whether it has ended."""
        sender = self._sender
        for _ in range(_SHARE):
            if not self._flush():
                return False
            try:
                count = sender.take(source, kind, look)
            except OSError:
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
            self._grow()
        return empty

    def _muted(self) -> None:
        """Nothing can be sent any more. What was sent to us is still received."""
        self.state.mute = True
        self._sender.close()
        self._close_out()
        self._close_err()

    def _grow(self) -> None:
        """Give a pipe that carries much more room; being refused is normal (EPERM, EBUSY)."""
        self._grown = True
        if not self._writing.is_pipe:
            return
        try:
            if fcntl.fcntl(self._writing.fd, fcntl.F_GETPIPE_SZ) < _GROWN:
                fcntl.fcntl(self._writing.fd, fcntl.F_SETPIPE_SZ, _GROWN)
        except OSError:
            pass

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
            self._take_messages()
        except RemoteError as error:
            self._fatal(str(error))
            return
        self._settle()

    def _take_messages(self) -> None:
        """Take messages until the channel is empty, something is full, or the share is used."""
        framer, state = self._framer, self.state
        self._take_pieces()
        for _ in range(_SHARE):
            if not self._may_read():
                return
            if framer.left >= BULK and self._may_splice():
                if not self._splice_in():
                    return
                continue
            try:
                count = os.readv(self._reading.fd, [framer.room()])
            except BlockingIOError:
                return
            except OSError:
                # A reset is an end-of-file.
                count = 0
            if not count:
                self._channel_ended()
                return
            framer.filled(count)
            self._take_pieces()
            if state.lost:
                return

    def _may_read(self) -> bool:
        """Tell whether bytes may be taken from the channel now."""
        return not self.state.lost and not self._in_full and self._may_take()

    def _may_take(self) -> bool:
        """Tell whether nothing received waits, and there is somebody to take more."""
        if self._held or self._held_stderr or self._closed:
            return False
        return self._attached or not self.state.opened

    def _take_pieces(self) -> None:
        """Deliver what was read, in order; payloads for IN that follow each other in one write."""
        framer, state = self._framer, self.state
        batch: list[memoryview] = []
        while self._may_take():
            piece = framer.next()
            if piece is None:
                break
            kind, payload, last = piece
            route = state.route(kind)
            if route == TO_IN and payload:
                self._warn_of(kind)
                batch.append(payload)
                continue
            if batch:
                self._deliver(batch)
                batch = []
            if route == TO_IN:
                self._end_in()
            else:
                self._take_other(route, payload, last)
        if batch:
            self._deliver(batch)

    def _take_other(self, route: int, payload: memoryview, last: bool) -> None:
        """Take a piece of anything that is not for IN."""
        if route == TO_STDERR:
            if payload:
                self._show_stderr(payload)
        elif route == TO_STATUS:
            self._status += bytes(payload[: 4 - len(self._status)])
            if last:
                self.state.exit_code(self._status)
                self._status = b""
                self._out_ended()
        elif route == TO_HELLO:
            self._take_hello(payload, last)
        else:
            self._warn("a message that only a caller takes was ignored")

    def _warn_of(self, kind: int) -> None:
        """Remark, once, on a payload of the wrong direction."""
        if (kind == DATA_STDIN) == self._caller:
            self._warn("payload of the wrong direction was taken as if it were right")

    def _warn(self, text: str) -> None:
        """Tell the owner of something odd, once a call: the other side chooses how often."""
        if not self._warned and self._on_warning is not None:
            self._warned = True
            self._on_warning(text)

    def _channel_ended(self) -> None:
        """The other side has closed; all it sent before is delivered (section 10.8)."""
        if self._framer.inside:
            raise RemoteError("the channel ended inside a message")
        if not self.state.opened:
            raise RemoteError("the channel ended before the handshake")
        self.state.lost = True
        self._muted()
        self._close_in()

    # --- IN ------------------------------------------------------------------------------------

    def _deliver(self, batch: list[memoryview]) -> None:
        """Write payload to IN; what it does not take now is held."""
        data: bytes | memoryview = batch[0] if len(batch) == 1 else b"".join(batch)
        self._received += len(data)
        if not self.state.in_open or self._in_eof:
            return
        if self._filter_stdout and self._caller:
            data = bytes(data).translate(_FILTER)
        self._held = memoryview(data)
        self._write_held()

    def _write_held(self) -> None:
        """Write to IN what is held for it; a failure closes IN."""
        end = self._in
        while self._held and end is not None and self.state.in_open:
            try:
                count = os.write(end.fd, self._held)
            except BlockingIOError:
                return
            except OSError:
                break
            self._held = self._held[count:]
        if self._held or self._in_eof:
            self._close_in()

    def _end_in(self) -> None:
        """The other side's end-of-file for IN: close it when all before has been delivered."""
        if self._held:
            self._in_eof = True
        else:
            self._close_in()

    def _in_writable(self) -> None:
        self._in_full = False
        self._write_held()
        self._receive()

    def _in_gone(self) -> None:
        """Nobody reads IN any more."""
        self._close_in()
        self._receive()

    def _may_splice(self) -> bool:
        """Tell whether the kernel may move the payload under way from the channel into IN."""
        end, state = self._in, self.state
        return (
            end is not None
            and end.spliceable
            and state.in_open
            and not self._filter_stdout
            and not self._in_eof
            and (end.is_pipe or self._reading.is_pipe)
            and state.opened
            and state.route(self._framer.kind) == TO_IN
        )

    def _splice_in(self) -> bool:
        """Move payload from the channel into IN; return False where one of them must be awaited."""
        end, framer = self._in, self._framer
        assert end is not None
        try:
            count = os.splice(self._reading.fd, end.fd, framer.left, flags=SPLICE)
        except BlockingIOError:
            self._find_blocked(end)
            return False
        except OSError:
            # Which of the two is to blame shows when the bytes are copied.
            end.spliceable = False
            return True
        if not count:
            self._channel_ended()
            return False
        self._received += count
        framer.skip(count)
        return True

    def _find_blocked(self, end: Endpoint) -> None:
        """Find out which side a refused splice waits for."""
        poll = select.poll()
        poll.register(self._reading.fd, select.POLLIN)
        poll.register(end.fd, select.POLLOUT)
        ready = dict(poll.poll(0))
        if end.fd not in ready:
            self._in_full = True
        elif self._reading.fd in ready:
            # Both say that they are ready and the splice says not: copy, so as not to spin.
            end.spliceable = False

    # --- stderr of the other side, at the caller -------------------------------------------------

    def _show_stderr(self, payload: memoryview) -> None:
        """Pass on what the service wrote to its stderr."""
        data = bytes(payload)
        if self._filter_stderr:
            data = data.translate(_FILTER)
        if self._on_stderr is not None:
            self._on_stderr(memoryview(data))
            return
        if self._stderr is None:
            self._stderr = Endpoint(self._loop, 2, writing=True, borrowed=True)
            self._stderr.on_write = self._stderr_writable
        self._held_stderr = memoryview(data)
        self._write_stderr()

    def _write_stderr(self) -> None:
        """Write what is held for stderr; errors are nobody's concern."""
        assert self._stderr is not None
        while self._held_stderr:
            try:
                count = self._stderr.write(self._held_stderr)
            except BlockingIOError:
                return
            except OSError:
                self._held_stderr = b""
                self._warn("stderr of the service could not be written")
                return
            self._held_stderr = self._held_stderr[count:]

    def _stderr_writable(self) -> None:
        self._write_stderr()
        self._receive()

    # --- closing -------------------------------------------------------------------------------

    def _close_in(self) -> None:
        """Close IN (section 10.5) and drop what it did not take."""
        state, end = self.state, self._in
        if not state.in_open:
            return
        state.in_open = False
        self._held = b""
        self._in_full = self._in_eof = False
        if end is not None:
            if end is self._out or (end.is_socket and end.number > 2):
                end.shutdown(reading=False)
            else:
                end.close()
        if self._exit_on_client_eof and not self._caller and not state.has_process:
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
        receiving = self._may_read()
        if self._reading is self._writing:
            self._reading.want(receiving, sending)
        else:
            self._reading.want(receiving, False)
            self._writing.want(False, sending)
        if not self._attached:
            return
        filling = state.in_open and bool(self._held or self._in_full)
        idle = state.in_open and not filling
        draining = state.out_open and not sending
        if self._in is not None and self._in is self._out:
            self._in.want(draining, filling, idle)
        else:
            if self._in is not None:
                self._in.want(False, filling, idle)
            if self._out is not None:
                self._out.want(draining, False)
        if self._err is not None:
            self._err.want(state.err_open and not sending, False)
        if self._stderr is not None:
            self._stderr.want(False, bool(self._held_stderr))
        if not (self._held or self._held_stderr):
            self._framer.rest()
