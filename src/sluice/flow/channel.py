"""The data channel of a call, either end of it: handshake, local streams, exit code.

Theory. What is known of the call, and what follows from it, is in ``callstate``: facts, and rules
that are functions of them. ``engine`` moves the bytes and keeps the facts up to date, with one half
for each direction (``sender``, ``receiver``). This module begins and ends a channel:

    HELLO both ways  ->  on_open  ->  attach: the command's streams   ->  data  ->  on_done
                                      fail: it could not be started   ->  its code -> on_done
                                      send_exit_only: JUST_EXEC       ->  its code -> on_done
    anything wrong   ->  on_fatal

docs/spec/wire-protocol.md 4.4, 7.4.5, 10, 13.6.
"""

from __future__ import annotations

from sluice.flow.callstate import payload_limit
from sluice.flow.endpoint import close_fd
from sluice.flow.engine import Engine
from sluice.wire.messages import (
    DATA_STDERR,
    DATA_STDIN,
    DATA_STDOUT,
    PROTOCOL_VERSION,
    U32,
    encode,
    encode_hello,
    negotiate,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.flow.reactor import Handle, Loop


class DataChannel(Engine):
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
        on_unwanted: Callable[[], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        """Take the descriptors; nothing happens before ``start``.

        hello: "send-first" (callers, and services in a domain), "read-first" (services in dom0) or
        "done" (the handshake was made elsewhere, with ``version``). handshake_timeout: seconds, 0
        means none. prefix: sent before anything of OUT. service_descriptor: written to IN before
        anything received. on_out_end: called when OUT has ended, before that is acted on: the last
        moment for ``use_single_socket``. on_unwanted: called for payload that IN does not take any
        more; without it, it is discarded in silence.
        """
        super().__init__(loop, read_fd, write_fd, caller=caller, on_warning=on_warning)
        self._on_done = on_done
        self._on_failure = on_fatal
        self._on_open = on_open
        self._on_stderr = on_stderr
        self._on_out_end = on_out_end
        self._on_unwanted = on_unwanted
        self._filter_stdout = filter_stdout
        self._filter_stderr = filter_stderr
        self._exit_on_client_eof = exit_on_client_eof
        self._exit_on_service_eof = exit_on_service_eof
        self._hello = hello
        self._version = version
        self._prefix = prefix
        self._descriptor = service_descriptor
        self._timeout = handshake_timeout
        self._timer: Handle | None = None
        self._late = max(in_fd, out_fd, err_fd) < 0
        self._early: tuple[int, int, int, bool] = (in_fd, out_fd, err_fd, has_process)
        self._failed: list[bytes] = []

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
    def spoken(self) -> bool:
        """Whether the other side sent any output; to a caller, also any stderr."""
        return self._receiver.received > 0 or self._receiver.stderr is not None

    @property
    def lost(self) -> bool:
        """Whether the channel ended before this end had what it needs: a caller, the exit code."""
        state = self.state
        return state.lost and not (state.caller and state.remote_status is not None)

    @property
    def cut(self) -> bool:
        """Whether the other side was gone, or took nothing any more, before this end was done."""
        return self.state.lost or self.state.mute

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
        if self._closed or self._receiver.attached:
            for fd in {in_fd, out_fd, err_fd}:
                close_fd(fd)
            return
        self._attach(in_fd, out_fd, err_fd, has_process)
        # Bytes that came with the handshake have been read already.
        self._receive()

    def fail(self, code: int, *, dom0: bool = False) -> None:
        """Report that the command could not be started (section 13.6), and close."""
        if self._receiver.attached or self._closed:
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
        if self._receiver.attached or self._closed:
            return
        self._receiver.attached = True
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
        # What waited for IN may have kept something else from being taken.
        self._receive()

    def use_single_socket(self) -> None:
        """Read OUT from the socket that serves as IN from now on (SIGUSR1, section 10.6).

        Honoured once, for a process whose stdin is a socket and whose output has not ended.
        """
        stdin = self._in
        if self._closed or not self.state.has_process or not self.state.out_open:
            return
        if stdin is None or stdin is self._out or not stdin.is_socket or stdin.closed:
            return
        if self._out is not None:
            self._out.shutdown(reading=True)
            self._out.close()
        self._out = stdin
        stdin.on_read = self._out_readable
        self._settle()

    def watch_peer(self, on_gone: Callable[[], None]) -> None:
        """Call ``on_gone()`` once, when nobody receives any more what is sent.

        Heard at once, also while something received waits for IN and the channel is not read.
        """
        self._writing.on_hangup = on_gone
        self._writing.want_hangup(True)

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
        if not self._late and not self._receiver.attached:
            self._attach(*self._early)

    def _take_hello(self, body: bytes) -> None:
        """Answer the version that the other side offers, if we have not yet."""
        version = negotiate(U32.unpack(body)[0])
        if self._hello == "read-first":
            self._sender.queue(encode_hello())
        self._open(version)

    def _attach(self, in_fd: int, out_fd: int, err_fd: int, has_process: bool) -> None:
        """Take the local streams; the service descriptor goes first."""
        self._early = (-1, -1, -1, False)
        self._take_streams(in_fd, out_fd, err_fd, has_process)
        if self._receiver.inlet is not None and self._descriptor:
            self._receiver.inlet.put([self._descriptor])

    # --- the end -------------------------------------------------------------------------------

    def _fatal(self, reason: str) -> None:
        """End at once; the other side is told nothing and no process is waited for (10.3)."""
        if not self._closed:
            self.close()
            self._on_failure(reason)

    def _end(self, status: int) -> None:
        """End in order."""
        self.close()
        self._on_done(status)
