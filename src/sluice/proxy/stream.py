"""One direction of a proxied call: a pump, and the chain that looks into it.

The chain says in which mode a direction is (chain.py): SPLICE leaves the bytes to the kernel and
counts, INSPECT leads each piece through the filters, DISCARD reads and forgets. The pump does the
rest: back-pressure, short writes, half-close, readers that go away (flow/pump.py).
"""

from __future__ import annotations

from sluice.flow.pump import Pump
from sluice.proxy.chain import INSPECT, OPEN, SPLICE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.flow.endpoint import Endpoint
    from sluice.proxy.flow import Flow
    from sluice.proxy.verdicts import Bytes, Direction


class Stream:
    """Moves the bytes of ``direction`` from ``source`` to ``sink``; owns both."""

    def __init__(self, flow: Flow, direction: Direction, source: int, sink: int | Endpoint) -> None:
        """Take the two ends. Nothing moves before ``start``."""
        self.direction = direction
        self.name = direction.name
        # The sender ended, and all that it sent is delivered, or for nobody.
        self.finished = False
        self.source_ended = False
        self.gone = False
        self._flow = flow
        self._chain = flow.chain
        self._counted = 0
        self.pump = Pump(
            flow.loop,
            source,
            sink,
            on_end=self._on_end,
            on_eof=self._on_eof,
            on_reader_gone=self._on_gone,
            on_drained=self._on_drained,
        )
        # The pump closes what it was given as numbers; the sink may be an Endpoint of ours.
        self._ends = (self.pump.src, self.pump.dst)

    # --- counters ---------------------------------------------------------------------------------

    @property
    def moved(self) -> int:
        """Bytes read from the sender."""
        return self.pump.taken

    def counters(self) -> dict[str, int]:
        """Return bytes read, written, moved by the kernel, and discarded."""
        return {
            "read": self.moved,
            "written": self.pump.moved,
            "spliced": self.pump.spliced,
            "discarded": self.pump.discarded + self._chain.dropped[self.direction],
        }

    # --- driven by the flow -----------------------------------------------------------------------

    def start(self) -> None:
        """Begin to move bytes, by what the chain says already: it may have closed a direction."""
        self.settle()
        self.pump.start()

    def settle(self) -> None:
        """Write what the chain put out, tell the far side the end, pause or go on."""
        out = self._chain.out[self.direction]
        if out:
            data = b"".join(out)
            out.clear()
            self.pump.emit(data)
        self._choose()
        if self._chain.ended[self.direction]:
            self.pump.finish(drain=not self.source_ended)
        self.update()

    def update(self) -> None:
        """Pause or resume reading, as filters and memory allow."""
        self._account()
        wait = self._chain.paused[self.direction] or (
            self._chain.mode[self.direction] == INSPECT and self._flow.memory.full
        )
        if wait and not self.pump.paused:
            self.pump.pause()
        elif not wait and self.pump.paused:
            self.pump.resume()

    def stop_reading(self) -> None:
        """Close the sender's end: nobody is there to take what it would say."""
        if not self.source_ended:
            self.source_ended = True
            self.pump.finish()

    def close(self) -> None:
        """Close both ends at once; what was not written is lost."""
        self.finished = True
        self.pump.close()
        for end in self._ends:
            if not end.closed:
                end.close()
        self._account()

    # --- what the pump tells ----------------------------------------------------------------------

    def _choose(self) -> None:
        """Let the pump inspect, leave the bytes to the kernel, or see that none gets on."""
        mode = self._chain.mode[self.direction]
        if mode == INSPECT:
            self.pump.inspect = self._inspect
        elif mode == SPLICE:
            self.pump.inspect = None
        else:
            self.pump.inspect = _nothing

    def _inspect(self, piece: memoryview) -> list[Bytes]:
        """Lead a piece through the chain and return what comes out of this direction."""
        self._chain.data(self.direction, piece)
        out = self._chain.out[self.direction]
        result = out[:]
        out.clear()
        self._flow.inspected(self)
        return result

    def _on_eof(self, _pump: Pump) -> None:
        self.source_ended = True
        if self._chain.state == OPEN:
            self._chain.eof(self.direction)
        self._flow.settle()

    def _on_end(self, _pump: Pump) -> None:
        self.finished = self.source_ended = True
        self._account()
        for end in self._ends:
            end.close()
        self._flow.settle()

    def _on_gone(self, _pump: Pump) -> None:
        self.gone = True
        self._flow.reader_gone(self)

    def _on_drained(self, _pump: Pump) -> None:
        self._account()
        self._chain.drained(self.direction)

    def _account(self) -> None:
        """Count what waits in the pump's memory among what the process holds."""
        held = 0 if self.finished else self.pump.held
        if held != self._counted:
            change, self._counted = held - self._counted, held
            self._flow.memory.add(change)


def _nothing(_piece: memoryview) -> tuple[()]:
    """Hand on nothing of a piece."""
    return ()
