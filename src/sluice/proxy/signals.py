"""Signals as events of a loop, without the module signal (it costs a small program 3 ms)."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import FrameType

    from sluice.flow.reactor import Loop
else:
    import _signal as signal

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def on_signals(
    loop: Loop, callback: Callable[[int], None], numbers: tuple[int, ...] = ENDING
) -> None:
    """Call ``callback(number)`` from the loop whenever one of the signals comes."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def arrived() -> None:
        try:
            for number in os.read(read_fd, 64):
                callback(number)
        except BlockingIOError:
            pass

    loop.add_reader(read_fd, arrived)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, _ignore)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """The byte in the pipe is what counts."""
