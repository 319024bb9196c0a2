"""Full blocks after random delays, against timing channels."""

from __future__ import annotations

from sluice.proxy.options import Duration, OptionError, Size
from sluice.proxy.verdicts import (
    CONTINUE,
    DST2SRC,
    HOLD,
    SRC2DST,
    Close,
    Direction,
    Emit,
    Pause,
    Resume,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.proxy.link import Call, Link
    from sluice.proxy.verdicts import Answer

_SLACK = 1 << 20


class Streamline:
    """Buffers each direction and releases it in full blocks, after random delays.

    Before a block is read the filter waits a random time up to ``delay_read``, before it is written
    a random time up to ``delay_write``. The last block of a direction may be short. How the sender
    spread its bytes over time and over writes is not to be seen any more, but for the time that a
    full block takes. A dialogue of small messages cannot work through it: nothing passes before a
    block is full or its direction has ended.
    """

    name = "streamline"
    inspects = (SRC2DST, DST2SRC)

    class Options:
        """What can be set.

        buf_size: bytes of a block
        delay_read: longest time to wait before reading a block
        delay_write: longest time to wait before writing a block
        """

        buf_size: Size = 10 << 20
        delay_read: Duration = 0.5
        delay_write: Duration = 0.5

    @staticmethod
    def check(options: Options) -> None:
        """See that a block can be filled."""
        if options.buf_size < 1:
            raise OptionError("buf_size", "must be at least 1")

    def __init__(self, options: Options, link: Link) -> None:
        """Declare a block and what one reading may add to it, each way."""
        self._link = link
        self._size = options.buf_size
        self._delays = {"read": options.delay_read, "write": options.delay_write}
        self._ending = [False, False]
        self.max_held = 2 * (options.buf_size + _SLACK)

    def opened(self, call: Call) -> Answer:
        """Let both directions wait before the first block."""
        for direction in (SRC2DST, DST2SRC):
            self._wait("read", direction)
        return CONTINUE, Pause(SRC2DST), Pause(DST2SRC)

    def data(self, direction: Direction, chunk: memoryview) -> Answer:
        """Fill the block."""
        if len(self._link.held(direction)) + len(chunk) < self._size:
            return HOLD
        self._wait("write", direction)
        return HOLD, Pause(direction)

    def eof(self, direction: Direction) -> Answer:
        """Release what there is as a short block, in its time."""
        self._ending[direction] = True
        self._link.cancel_timer(f"read {direction}")
        self._wait("write", direction)
        return HOLD

    def timer(self, key: str) -> Answer:
        """Begin to read a block, or release one."""
        what, _, name = key.partition(" ")
        direction = SRC2DST if name == "src2dst" else DST2SRC
        if what == "read":
            return Resume(direction)
        held = self._link.held(direction)
        block = held.take(self._size)
        if len(held) >= self._size or (len(held) and self._ending[direction]):
            self._wait("write", direction)
        elif self._ending[direction]:
            return Emit(direction, block), Close(direction)
        else:
            self._wait("read", direction)
        return Emit(direction, block)

    def _wait(self, what: str, direction: Direction) -> None:
        delay = self._delays[what] * self._link.random()
        self._link.set_timer(f"{what} {direction}", delay)
