"""An outside program as a filter."""

from __future__ import annotations

import os
from functools import partial

from sluice.proxy.options import DurationLimit, OptionError, either
from sluice.proxy.outside import Outside, command_line, confined, find_program, try_confinement
from sluice.proxy.units import show_duration
from sluice.proxy.verdicts import (
    CONTINUE,
    DST2SRC,
    HOLD,
    PASS,
    SRC2DST,
    Abort,
    Close,
    Direction,
    Emit,
    Pause,
    Replace,
    Resume,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.proxy.link import Call, Link
    from sluice.proxy.stage import Cause
    from sluice.proxy.verdicts import Answer

# Output is not read while so many bytes wait for a slow reader.
_BACKLOG = 256 << 10
_READ = 64 << 10


class Program:
    """Leads a direction through a program of its own, in any language: stdin to stdout.

    What the program writes passes in place of what it read. It is started for each call, and ended
    with it. If it fails (exits with another code than 0) or takes longer than ``timeout`` the call
    is aborted. One that ends early with 0 has closed the direction. Its stderr goes to the log.

    The program is confined: no network, no files but what the system installs and the paths named
    in ``read``, no signals to others, no new privileges. Where that cannot be set up the chain does
    not load. It has an almost empty environment: PATH, SLUICE_SOURCE, SLUICE_TARGET,
    SLUICE_SERVICE, SLUICE_ARGUMENT and SLUICE_DIRECTION.
    """

    name = "program"

    class Options:
        """What can be set.

        src2dst: the program for source to target: its path and arguments; empty for none
        dst2src: the program for target to source
        read: files and directories that the programs may read
        confine: false lets them do whatever the proxy may do
        timeout: the longest time that a program may take; -1 for no limit
        """

        src2dst: list[str] = []  # noqa: RUF012
        dst2src: list[str] = []  # noqa: RUF012
        read: list[str] = []  # noqa: RUF012
        confine: bool = True
        timeout: DurationLimit = -1

    @staticmethod
    def check(options: Options) -> None:
        """See that programs and paths are there, and that a program can be confined here."""
        either(options, "a program")
        for path in options.read:
            if not os.path.isabs(path) or not os.path.exists(path):
                raise OptionError("read", f"'{path}' is no absolute path of a file")
        for name in ("src2dst", "dst2src"):
            argv = getattr(options, name)
            if not argv:
                continue
            program = find_program(argv[0])
            if program is None:
                raise OptionError(name, f"'{argv[0]}' is no program")
            if options.confine:
                reason = try_confinement(program, options.read)
                if reason is not None:
                    raise OptionError("confine", reason)

    @staticmethod
    def inspects(options: Options) -> tuple[Direction, ...]:
        """Look at the directions that have a program."""
        return tuple(d for d in (SRC2DST, DST2SRC) if getattr(options, d.name))

    def __init__(self, options: Options, link: Link) -> None:
        """Take the options; the programs start when the call is opened."""
        self._options = options
        self._link = link
        self._running: dict[Direction, Outside] = {}
        self._input_ended = [False, False]

    def opened(self, call: Call) -> Answer:
        """Start the programs."""
        self._link.on_drained(self._drained)
        environment = {
            "PATH": "/usr/bin:/bin",
            "SLUICE_SOURCE": call.source,
            "SLUICE_TARGET": call.target,
            "SLUICE_SERVICE": call.service,
            "SLUICE_ARGUMENT": call.argument or "",
        }
        for direction in self.inspects(self._options):
            argv = command_line(getattr(self._options, direction.name))
            if self._options.confine:
                argv = confined(argv, self._options.read)
            self._running[direction] = Outside(
                self._link.loop,
                argv,
                {**environment, "SLUICE_DIRECTION": direction.name},
                on_output=partial(self._output, direction),
                on_input=partial(self._input, direction),
                on_end=partial(self._ended, direction),
                on_stderr=partial(self._stderr, direction),
            )
        if self._options.timeout >= 0:
            self._link.set_timer("timeout", self._options.timeout)
        return CONTINUE

    def data(self, direction: Direction, chunk: memoryview) -> Answer:
        """Give the bytes to the program; let the sender wait while it does not take them."""
        program = self._running[direction]
        if program.input_closed:
            return Replace()
        held = self._link.held(direction)
        taken = 0 if len(held) else program.write(chunk)
        if taken == len(chunk):
            return Replace()
        held.append(chunk[taken:])
        program.wait_for_input()
        return Replace(), Pause(direction)

    def eof(self, direction: Direction) -> Answer:
        """Let the program see the end; the direction ends when the program has ended."""
        program = self._running.get(direction)
        if program is None:
            return PASS
        self._input_ended[direction] = True
        if not len(self._link.held(direction)):
            program.close_input()
        return HOLD

    def timer(self, key: str) -> Answer:
        """A program took too long."""
        if all(program.ended for program in self._running.values()):
            return ()
        return Abort(f"the program has not ended after {show_duration(self._options.timeout)}")

    def closed(self, cause: Cause) -> None:
        """End the programs and what they started."""
        for program in self._running.values():
            program.destroy()

    def _input(self, direction: Direction) -> None:
        """The program takes input again, or takes no more."""
        program, held = self._running[direction], self._link.held(direction)
        if program.input_closed:
            held.take()
        else:
            waiting = held.take()
            taken = program.write(waiting)
            if taken < len(waiting):
                held.append(waiting[taken:])
                program.wait_for_input()
                return
            if self._input_ended[direction]:
                program.close_input()
        self._link.act(Resume(direction))

    def _output(self, direction: Direction, data: bytes) -> None:
        self._link.act(Emit(direction, data))
        if self._link.waiting(direction) > _BACKLOG:
            self._running[direction].pause_output()

    def _stderr(self, direction: Direction, line: str) -> None:
        self._link.log(f"{direction} program: {line}")

    def _drained(self, direction: Direction) -> None:
        if direction in self._running:
            self._running[direction].resume_output()

    def _ended(self, direction: Direction, status: int) -> None:
        if status != 0:
            how = f"exited with {status}" if status > 0 else f"was ended by signal {-status}"
            self._link.act(Abort(f"the program for {direction} {how}"))
        else:
            self._link.act(Close(direction))
