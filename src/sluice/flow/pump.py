"""One direction of bytes between two descriptors.

Where nobody looks at the bytes the kernel moves them (splice, through a pipe of ours when neither
end is one) and only their number is known. Where ``inspect`` is given each piece is read into
memory and shown to it; what is written is that very copy, or what ``inspect`` put in its place.
``inspect`` may be set to None at any moment, and from then on the kernel moves the rest.

Back-pressure: nothing is read while anything waits for the sink. The end: when the source has ended
and all before it is delivered, the sink's writing side is closed, the opposite direction of a
socket left alone. A sink whose reader is gone does not end the pump: the rest is read and discarded
(or, on request, the pump ends there).

docs/spec/proxy.md 4.
"""

from __future__ import annotations

import os

from sluice.flow.endpoint import GROW_AFTER, GROWN, Endpoint
from sluice.flow.spare import (
    BUFFER,
    CANNOT,
    SINK_FULL,
    borrow_buffer,
    borrow_pipe,
    return_buffer,
    return_pipe,
    splice,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sluice.flow.reactor import Loop

# Pieces moved in one go before the loop sees to its other descriptors.
_SHARE = 16

# Why a pump ended (``cause``).
EOF = "eof"
READER_GONE = "reader-gone"
FINISHED = "finished"
SOURCE_ERROR = "source-error"


class Pump:
    """Moves bytes from ``src`` to ``dst`` until the source ends.

    Descriptors given as numbers belong to the pump: it closes them when it ends. Give Endpoints
    where two pumps share a socket: then only its directions are ended, and the owner closes it.

    taken: bytes read from the source. moved: bytes delivered to the sink. spliced: those of them
    that the kernel moved. discarded: bytes read and thrown away. held: bytes that wait in memory.
    cause: why it ended.
    """

    def __init__(
        self,
        loop: Loop,
        src: int | Endpoint,
        dst: int | Endpoint,
        *,
        on_end: Callable[[Pump], None],
        inspect: Callable[[memoryview], Iterable[bytes | memoryview] | None] | None = None,
        on_eof: Callable[[Pump], None] | None = None,
        on_reader_gone: Callable[[Pump], None] | None = None,
        on_drained: Callable[[Pump], None] | None = None,
        discard: bool = True,
    ) -> None:
        """Take the two ends; nothing happens before ``start``.

        inspect(piece): None passes the piece, else the bytes to write instead of it (none: it is
        dropped, or kept by the filter, which then must copy it: the piece is valid only during the
        call). It may call any method of the pump. on_eof(pump): the source has ended; call
        ``finish`` now or later. Without it the pump finishes by itself. on_reader_gone(pump): the
        sink takes nothing any more. on_drained(pump): what had to wait in memory is delivered.
        discard: when the reader is gone go on reading, else end with READER_GONE.
        on_end(pump) is called once, as the last thing, with everything closed.
        """
        self._own = (isinstance(src, int), isinstance(dst, int))
        self.src = Endpoint(loop, src) if isinstance(src, int) else src
        self.dst = Endpoint(loop, dst, writing=True) if isinstance(dst, int) else dst
        self.inspect = inspect
        self.taken = 0
        self.moved = 0
        self.spliced = 0
        self.discarded = 0
        self.held = 0
        self.cause = ""
        self.paused = False
        self.reader_gone = False
        self._on_end = on_end
        self._on_eof = on_eof
        self._on_reader_gone = on_reader_gone
        self._on_drained = on_drained
        self._discard = discard
        self._queue: list[bytes | memoryview] = []
        self._buffer: bytearray | None = None
        self._via: tuple[int, int] | None = None
        self._owed = 0
        self._full = False
        self._grown = False
        self._src_ended = False
        self._finishing = False
        self._dst_ended = False
        self._started = self._done = self._busy = False

    # --- what the owner may do ------------------------------------------------------------------

    def start(self) -> None:
        """Begin moving bytes."""
        self.src.on_read = self._step
        self.dst.on_write = self._step
        self.dst.on_hangup = self._gone
        self._started = True
        self._step()

    def pause(self) -> None:
        """Read no more until ``resume``; what was read is still delivered."""
        self.paused = True
        self._settle()

    def resume(self) -> None:
        """Undo ``pause``."""
        if self.paused:
            self.paused = False
            self._step()

    def emit(self, data: bytes) -> None:
        """Write ``data`` behind what waits. Bounding what is emitted is the caller's business."""
        if data and not self._finishing and not self._done:
            self._put(data)
            self._step()

    def finish(self, *, drain: bool = False) -> None:
        """End the direction: deliver what waits, then let the sink see end-of-file.

        drain: go on reading the source until it ends by itself; what comes is still shown to
        ``inspect``, if there is one, and then discarded. Else the source is told to stop.
        """
        if self._finishing or self._done:
            return
        self._finishing = True
        self.cause = self.cause or (EOF if self._src_ended else FINISHED)
        if not drain and not self._src_ended:
            self._end_source()
        self._step()

    def close(self) -> None:
        """Stop at once. No callback comes any more."""
        if self._done:
            return
        self._done = True
        self._drop()
        for own, end in zip(self._own, (self.src, self.dst), strict=True):
            if own:
                end.close()
        if not self._own[0] and not self.src.closed:
            self.src.want_read(False)
        if not self._own[1] and not self.dst.closed:
            self.dst.want_write(False)
            self.dst.want_hangup(False)

    # --- moving --------------------------------------------------------------------------------

    def _step(self) -> None:
        """Do what can be done without waiting."""
        if self._busy or self._done or not self._started:
            # Called from within inspect or on_eof: the round under way goes on by itself.
            return
        self._busy = True
        self._full = False
        waited = self.held > 0
        try:
            for _ in range(_SHARE):
                if not self._flush() or not self._may_read() or not self._read():
                    break
            self._flush()
            if self.moved > GROW_AFTER and not self._grown:
                self._grown = True
                self.src.grow()
                self.dst.grow()
        finally:
            self._busy = False
        self._settle()
        if waited and not self.held and not self._done and self._on_drained is not None:
            self._on_drained(self)

    def _may_read(self) -> bool:
        return not (self._src_ended or self.paused or self._done)

    def _read(self) -> bool:
        """Take one piece of the source; return False where it must be awaited or has ended."""
        sinking = self.reader_gone or self._finishing
        if self.inspect is None and not sinking and self.src.spliceable and self.dst.spliceable:
            count = self._splice()
            if count != CANNOT:
                return count > 0
        if self._buffer is None:
            self._buffer = borrow_buffer()
        view = memoryview(self._buffer)
        try:
            size = os.readv(self.src.fd, [view])
        except BlockingIOError:
            return False
        except ConnectionResetError:
            size = 0
        except OSError:
            self.cause = SOURCE_ERROR
            size = 0
        if not size:
            self._source_ended()
            return False
        self.taken += size
        if sinking:
            self.discarded += size
            if self.inspect is not None:
                self.inspect(view[:size])
            return True
        self._show(view[:size])
        return True

    def _show(self, piece: memoryview) -> None:
        """Let the piece be inspected and write what comes of it."""
        verdict = None if self.inspect is None else self.inspect(piece)
        if verdict is None:
            self._put(piece)
            return
        for data in verdict:
            if len(data):
                self._put(data)

    def _put(self, data: bytes | memoryview) -> None:
        if self.reader_gone or self._dst_ended or self._done:
            self.discarded += len(data)
            return
        self._queue.append(data)
        self.held += len(data)

    def _splice(self) -> int:
        """Let the kernel move a piece; returns as ``spare.splice``."""
        try:
            if self.src.is_pipe or self.dst.is_pipe:
                count = splice(self.src.fd, self.dst.fd, GROWN)
                if count > 0:
                    self.moved += count
                    self.spliced += count
            else:
                count = self._splice_via()
        except ConnectionResetError:
            count = 0
        except OSError:
            # Copying shows which of the two is broken.
            count = CANNOT
        if count > 0:
            self.taken += count
        elif count == 0:
            self._source_ended()
        elif count == SINK_FULL:
            self._full = True
        elif count == CANNOT:
            self.src.spliceable = False
        return count

    def _splice_via(self) -> int:
        """Splice into a pipe of ours, out of which ``_flush`` splices into the sink."""
        if self._via is None:
            self._via = borrow_pipe()
            if self._via is None:
                return CANNOT
        count = splice(self.src.fd, self._via[1], BUFFER)
        if count > 0:
            self._owed = count
        return count

    def _flush(self) -> bool:
        """Write what waits; return whether nothing does any more."""
        try:
            while self._owed and self._via is not None:
                count = splice(self._via[0], self.dst.fd, self._owed)
                if count == SINK_FULL:
                    return False
                if count == CANNOT:
                    data = os.read(self._via[0], self._owed)
                    self._queue.append(data)
                    self.held += len(data)
                    self._owed -= len(data)
                    break
                self._owed -= count
                self.moved += count
                self.spliced += count
            while self._queue:
                self._write()
        except BlockingIOError:
            return False
        except OSError:
            self._sink_broken()
        return True

    def _write(self) -> None:
        """Write some of what waits in memory."""
        queue = self._queue
        count = os.writev(self.dst.fd, queue[:64]) if len(queue) > 1 else self.dst.write(queue[0])
        self.moved += count
        self.held -= count
        while queue and count >= len(queue[0]):
            count -= len(queue.pop(0))
        if count:
            queue[0] = memoryview(queue[0])[count:]

    # --- ending --------------------------------------------------------------------------------

    def _gone(self) -> None:
        """The sink's reader is gone while nothing was written."""
        self._sink_broken()
        self._step()

    def _sink_broken(self) -> None:
        """Nothing can be delivered any more."""
        if self.reader_gone:
            return
        self.reader_gone = True
        self.discarded += self.held + self._owed
        self._drop()
        if self._on_reader_gone is not None:
            self._on_reader_gone(self)
        if not self._discard and not self._done:
            self.cause = READER_GONE
            self._finishing = True
            self._end_source()

    def _source_ended(self) -> None:
        """Nothing more comes: finish, or let the owner say when."""
        self._end_source()
        self.cause = self.cause or EOF
        if not self._finishing:
            if self._on_eof is not None:
                self._on_eof(self)
            else:
                self._finishing = True

    def _end_source(self) -> None:
        if not self._src_ended:
            self._src_ended = True
            if self._own[0]:
                self.src.close()
            else:
                self.src.end_reading()

    def _drop(self) -> None:
        """Let go of what waits."""
        self._queue.clear()
        self.held = 0
        if self._via is not None:
            return_pipe(self._via, self._owed == 0)
            self._via = None
        self._owed = 0

    def _settle(self) -> None:
        """End what is over and ask for the events that are wanted next."""
        if self._busy or self._done or not self._started:
            return
        waiting = bool(self._queue or self._owed)
        if self._finishing and not waiting and not self._dst_ended:
            self._dst_ended = True
            if self._own[1]:
                self.dst.close()
            else:
                self.dst.end_writing()
        if self._dst_ended and self._src_ended:
            self.close()
            self._on_end(self)
            return
        blocked = waiting or self._full
        self.src.want_read(self._may_read() and not blocked)
        if not self._dst_ended and not self.reader_gone:
            self.dst.want_hangup(not blocked)
            self.dst.want_write(blocked)
        elif not self._dst_ended:
            self.dst.want_hangup(False)
            self.dst.want_write(False)
        if not self._queue and self._buffer is not None:
            return_buffer(self._buffer)
            self._buffer = None
        if not self._owed and self._via is not None:
            return_pipe(self._via, True)
            self._via = None
