"""Plugins of the earlier proxy as parts of a chain (docs/spec/proxy.md 7).

A chain with plugins is built from its far end backwards: each part is a far end (far.py) for the
part before it. ``PluginEnd`` is one plugin before a far end, ``FlowEnd`` a run of filters before
one, ``DestinationEnd`` a plugin that is the far end, ``SourceRun`` a plugin that is the source. All
of this runs in a process of its own (worker.py), on an asyncio loop.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sluice.errors import SluiceError
from sluice.proxy.flow import GONE_GRACE, KILL_AFTER, Flow, Settings
from sluice.proxy.link import Call, Memory, Tools
from sluice.proxy.plugins_package import AbortException, PipeReader, PipeWriter
from sluice.proxy.stage import Cause, FilterUse

if TYPE_CHECKING:
    from sluice.proxy.far import FarEnd

Log = Callable[[str], None]


def _pipe() -> tuple[int, int]:
    return os.pipe2(os.O_CLOEXEC)


def describe(error: BaseException) -> str:
    """Return an exception with the place in the plugin where it was raised."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        if not trace.tb_frame.f_globals.get("__name__", "").startswith(("sluice.", "asyncio.")):
            place = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{place}"


def cause_of(name: str, error: BaseException) -> Cause:
    """Return the cause of a call that a plugin's exception ends: its wish, or its defect."""
    if isinstance(error, AbortException):
        return Cause("filter", str(error) or "aborted", filter=name, exit_code=126)
    return Cause("filter-error", describe(error), filter=name, exit_code=125)


class _Running:
    """A plugin's coroutine. ``on_done(cause)`` comes once: None where it simply returned."""

    def __init__(self, name: str, log: Log, on_done: Callable[[Cause | None], None]) -> None:
        self.name = name
        self.done = False
        self.result: Any = None
        self._log = log
        self._on_done = on_done
        self._task: asyncio.Task[Any] | None = None

    def start(self, coroutine: Callable[[], Any]) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(coroutine))

    async def _run(self, coroutine: Callable[[], Any]) -> None:
        cause = None
        try:
            self.result = await coroutine()
        except asyncio.CancelledError:
            cause = Cause("killed", "ended", filter=self.name)
        except (Exception, SystemExit) as error:
            cause = cause_of(self.name, error)
            self._log(f"{self.name}: {cause.reason}")
        self._end(cause)

    def _end(self, cause: Cause | None) -> None:
        if not self.done:
            self.done = True
            self._on_done(cause)

    def cancel(self) -> None:
        """End it; one that does not heed that is not waited for."""
        if self._task is not None and not self.done:
            self._task.cancel()
            self._end(Cause("killed", "ended", filter=self.name))


class PluginEnd:
    """A proxy plugin with the rest of the chain behind it."""

    def __init__(self, name: str, plugin: Any, far: FarEnd, log: Log) -> None:
        """Take the plugin's object and the far end that it speaks to."""
        self.in_fd = self.out_fd = -1
        self.cause: Cause | None = None
        self._far = far
        self._plugin = plugin
        self._running = _Running(name, log, self._returned)
        self._files: tuple[Any, ...] = ()
        self._code: int | None = None
        self._on_exit: Callable[[int], None] | None = None
        self._kill: asyncio.TimerHandle | None = None

    def start(self, on_exit: Callable[[int], None]) -> None:
        """Start the far end, then the plugin. Raises what the far end raises."""
        self._far.start(self._far_exited)
        self._on_exit = on_exit
        read_src, self.in_fd = _pipe()
        self.out_fd, write_src = _pipe()
        self._files = (
            PipeReader(read_src),
            PipeWriter(write_src),
            PipeReader(self._far.out_fd),
            PipeWriter(self._far.in_fd),
        )
        if self._code is not None:
            self._files[0].finish()
        self._running.start(lambda: self._plugin.proxy(*self._files))

    def terminate(self) -> None:
        """End the plugin and what is behind it."""
        self._running.cancel()
        self._far.terminate()

    def kill(self) -> None:
        """End what is behind the plugin."""
        self._far.kill()

    def _returned(self, cause: Cause | None) -> None:
        """The plugin is through: close its files, see that the far end ends too."""
        self.cause = cause
        natural = cause is None and _at_end(self._files[2])
        for file in self._files:
            file.close()
        if self._code is not None:
            self._over()
            return
        loop = asyncio.get_running_loop()
        if cause is not None:
            self._far.terminate()
            self._kill = loop.call_later(KILL_AFTER, self._far.kill)
        elif not natural:
            # Nobody reads it any more: a moment to end by itself.
            self._kill = loop.call_later(GONE_GRACE, self._hurry)

    def _hurry(self) -> None:
        self._far.terminate()
        self._kill = asyncio.get_running_loop().call_later(KILL_AFTER, self._far.kill)

    def _far_exited(self, code: int) -> None:
        self._code = code
        if self._running.done:
            self._over()
        elif self._files:
            # What the source still says is for nobody.
            self._files[0].finish()

    def _over(self) -> None:
        if self._kill is not None:
            self._kill.cancel()
        if self.cause is None:
            self.cause = getattr(self._far, "cause", None)
        assert self._code is not None
        on_exit, self._on_exit = self._on_exit, None
        if on_exit is not None:
            on_exit(self.cause.exit_code if self.cause is not None else self._code)


class DestinationEnd:
    """A destination plugin: the far end of the call."""

    def __init__(self, name: str, plugin: Any, log: Log) -> None:
        """Take the plugin's object."""
        self.in_fd = self.out_fd = -1
        self.cause: Cause | None = None
        self._plugin = plugin
        self._running = _Running(name, log, self._returned)
        self._files: tuple[Any, ...] = ()
        self._on_exit: Callable[[int], None] | None = None

    def start(self, on_exit: Callable[[int], None]) -> None:
        """Start the plugin."""
        self._on_exit = on_exit
        read_fd, self.in_fd = _pipe()
        self.out_fd, write_fd = _pipe()
        self._files = (PipeReader(read_fd), PipeWriter(write_fd))
        self._running.start(lambda: self._plugin.communicate_dst(*self._files))

    def terminate(self) -> None:
        """End the plugin."""
        self._running.cancel()

    kill = terminate

    def _returned(self, cause: Cause | None) -> None:
        self.cause = cause
        for file in self._files:
            file.close()
        assert self._on_exit is not None
        self._on_exit(_code(cause, self._running.result))


class FlowEnd:
    """A run of our own filters before a far end."""

    def __init__(
        self,
        uses: Sequence[FilterUse],
        call: Call,
        far: FarEnd,
        *,
        log: Log,
        memory: Memory,
        settings: Settings,
        state_directory: str,
        on_flow: Callable[[Flow], None],
    ) -> None:
        """Take the filters; ``on_flow`` is told of the flow when it begins."""
        self.in_fd = self.out_fd = -1
        self.cause: Cause | None = None
        self._make = (uses, call, far, log, memory, state_directory)
        self._settings = settings
        self._on_flow = on_flow
        self._flow: Flow | None = None

    def start(self, on_exit: Callable[[int], None]) -> None:
        """Start the flow."""
        uses, call, far, log, memory, state = self._make
        in_fd, self.in_fd = _pipe()
        self.out_fd, out_fd = _pipe()
        loop = asyncio.get_running_loop()

        def ended(flow: Flow) -> None:
            assert flow.cause is not None
            if flow.cause.kind != "done":
                self.cause = flow.cause
            on_exit(flow.exit_code)

        self._flow = Flow(
            loop, uses, call, far, in_fd=in_fd, out_fd=out_fd, on_end=ended, log=log,
            memory=memory, settings=self._settings,
            tools=Tools(log=log, state_directory=state, loop=loop),
        )  # fmt: skip
        self._on_flow(self._flow)
        self._flow.start()

    def terminate(self) -> None:
        """Abort the flow, which ends its far end."""
        if self._flow is not None:
            self._flow.abort(Cause("killed", "ended"))

    def kill(self) -> None:
        """End the far end."""
        self._make[2].kill()


class SourceRun:
    """A source plugin and the chain behind it: a whole call, without a flow around it."""

    def __init__(self, name: str, plugin: Any, far: FarEnd, log: Log) -> None:
        """Take the plugin's object and the far end that it speaks to."""
        self.cause: Cause | None = None
        self._end = PluginEnd(name, _AsProxy(plugin), far, log)

    def start(self, on_end: Callable[[Cause], None]) -> None:
        """Begin; ``on_end(cause)`` is called once."""

        def ended(code: int) -> None:
            on_end(self.cause or self._end.cause or Cause("done", exit_code=code))

        try:
            self._end.start(ended)
        except SluiceError as error:
            on_end(Cause("far", str(error)))
            return
        # Only the plugin speaks to the chain: nothing comes from before it, or goes there.
        os.close(self._end.in_fd)
        os.close(self._end.out_fd)

    def abort(self, cause: Cause) -> None:
        """End the call."""
        self.cause = self.cause or cause
        self._end.terminate()
        asyncio.get_running_loop().call_later(KILL_AFTER, self._end.kill)


class _AsProxy:
    """A source plugin seen as a proxy plugin whose own source side is not used."""

    def __init__(self, plugin: Any) -> None:
        self._plugin = plugin

    async def proxy(self, _src_r: Any, _src_w: Any, dst_r: Any, dst_w: Any) -> Any:
        return await self._plugin.communicate_src(dst_r, dst_w)


def _code(cause: Cause | None, result: Any) -> int:
    """Return the exit code of a plugin: its cause's, the number that it returned, or 0."""
    if cause is not None:
        return cause.exit_code
    return result & 255 if isinstance(result, int) else 0


def _at_end(reader: PipeReader) -> bool:
    """Tell whether all of a pipe was read and nobody can write to it any more."""
    if reader.closed:
        return True
    poll = select.poll()
    poll.register(reader.fileno(), select.POLLIN)
    events = dict(poll.poll(0)).get(reader.fileno(), 0)
    return bool(events & select.POLLHUP) and not events & select.POLLIN
