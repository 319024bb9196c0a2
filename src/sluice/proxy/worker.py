"""The process of one call's chain: plugins of the earlier proxy, and filters that block.

Started by ``WorkerEnd`` (worker_end.py) with the call on stdin and stdout, the log on stderr, what
to do on descriptor 4, and a pipe for its report on 3. When the other end of that pipe is closed,
who started us is gone: the call is aborted, and if that does not help within seconds (a plugin that
spins) a thread ends the whole process group. docs/spec/proxy.md 7.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sluice.errors import ConfigError, SluiceError
from sluice.flow import hangup
from sluice.flow.selector import run
from sluice.proxy.far import ProgramEnd
from sluice.proxy.flow import KILL_AFTER, Flow, Settings
from sluice.proxy.link import Call, Memory, Tools
from sluice.proxy.model import ProxySettings
from sluice.proxy.options import with_values
from sluice.proxy.paths import state_directory
from sluice.proxy.plugin_end import DestinationEnd, FlowEnd, PluginEnd, SourceRun, describe
from sluice.proxy.plugin_files import CLASSES
from sluice.proxy.plugins_package import Meta, get_logger, install
from sluice.proxy.session import ordinary_end
from sluice.proxy.stage import Cause, FilterUse
from sluice.proxy.worker_end import JOB, REPORT
from sluice.wire.names import escape

if TYPE_CHECKING:
    from sluice.proxy.far import FarEnd

TROUBLE = 125


def main() -> int:
    """Run the chain of one call; return the exit code for the source."""
    # Not for what a plugin starts.
    for fd in (REPORT, JOB):
        os.set_inheritable(fd, False)
    with os.fdopen(JOB, "rb") as stream:
        job = json.loads(stream.read())
    if job["src"] is None:
        # Standard output is the call's: what a plugin prints belongs into the log.
        sys.stdout = sys.stderr
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
    threading.Thread(target=_guard, args=(REPORT,), daemon=True).start()
    try:
        cause, filters = run(Worker(job).run())
    except Exception as error:
        cause, filters = Cause("filter-error", describe(error), exit_code=TROUBLE), []
        _log(str(cause))
    report = {
        "kind": cause.kind,
        "reason": cause.reason,
        "filter": cause.filter,
        "exit_code": cause.exit_code,
        "filters": filters,
    }
    os.write(REPORT, json.dumps(report).encode()[:65536])
    return cause.exit_code


def _guard(fd: int) -> None:
    """Wait until nobody reads our report; then give the call a moment and end everything."""
    poll = select.poll()
    poll.register(fd, 0)
    poll.poll()
    time.sleep(KILL_AFTER + 1)
    os.killpg(0, signal.SIGKILL)


def _log(text: str) -> None:
    """Write a line to the log, which is standard error here."""
    os.write(2, escape(text, 2000).encode() + b"\n")


class Worker:
    """One call: builds its chain from the far end backwards and runs it."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Take the job as ``worker_end.describe_job`` made it."""
        self._job = job
        self._call = Call(**job["call"])
        self._settings: ProxySettings = with_values(ProxySettings, job["settings"])
        self._memory = Memory(self._settings.max_memory)
        self._state = state_directory(self._settings.state)
        self._meta = Meta(
            chain=self._call.chain,
            src=self._call.source,
            dst=self._call.target,
            qrexec=self._call.descriptor,
        )
        self._flow_settings = Settings(
            abort_on_closed_reader=self._settings.on_closed_reader == "abort"
        )
        self._flows: list[Flow] = []
        self._plugins: list[str] = []
        self._cause: Cause | None = None

    async def run(self) -> tuple[Cause, list[dict[str, Any]]]:
        """Run the call to its end; return why it ended, and what its filters said."""
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        install(self._job["directories"])

        def ended(cause: Cause) -> None:
            self._cause = cause
            over.set()

        uses, far = self._build(loop)
        abort = self._start(loop, uses, far, ended)
        killed = Cause("killed", "ended by who started it")
        loop.add_signal_handler(signal.SIGTERM, abort, killed)
        hangup.of(loop).add_hangup(REPORT, lambda: abort(killed))
        await over.wait()
        hangup.of(loop).remove_hangup(REPORT)
        assert self._cause is not None
        return self._cause, self._said()

    def _start(
        self,
        loop: asyncio.AbstractEventLoop,
        uses: list[FilterUse],
        far: FarEnd,
        ended: Callable[[Cause], None],
    ) -> Callable[[Cause], None]:
        """Start the call; return what aborts it."""
        if self._job["src"] is not None:
            behind = FlowEnd(uses, **self._flow_arguments(far)) if uses else far
            part = self._job["src"]
            run = SourceRun(part["plugin"], self._plugin(part, "src"), behind, _log)
            run.start(ended)
            return run.abort

        def flow_ended(flow: Flow) -> None:
            assert flow.cause is not None
            ended(flow.cause)

        flow = Flow(
            loop, uses, self._call, far, in_fd=0, out_fd=1, on_end=flow_ended, log=_log,
            memory=self._memory, settings=self._flow_settings,
            tools=Tools(log=_log, state_directory=self._state, loop=loop),
        )  # fmt: skip
        self._flows.append(flow)
        flow.start()
        return flow.abort

    def _build(self, loop: asyncio.AbstractEventLoop) -> tuple[list[FilterUse], FarEnd]:
        """Return the filters that come first, and the far end that all the rest is."""
        far: FarEnd
        if self._job["dst"] is not None:
            part = self._job["dst"]
            far = DestinationEnd(part["plugin"], self._plugin(part, "dst"), _log)
        elif self._job["command"] is not None:
            far = ProgramEnd(loop, self._job["command"], log=_log, stderr_fd=2, group=False)
        else:
            # In our own group: who ends that ends all of the call, even if a plugin spins.
            far = ordinary_end(loop, self._call, self._settings, _log, group=False)
        uses: list[FilterUse] = []
        for part in reversed(self._job["elements"]):
            if "plugin" not in part:
                uses.insert(0, load_use(part))
                continue
            if uses:
                far = FlowEnd(uses, **self._flow_arguments(far))
                uses = []
            far = PluginEnd(part["plugin"], self._plugin(part, "proxy"), far, _log)
        return uses, far

    def _flow_arguments(self, far: FarEnd) -> dict[str, Any]:
        return {
            "call": self._call,
            "far": far,
            "log": _log,
            "memory": self._memory,
            "settings": self._flow_settings,
            "state_directory": self._state,
            "on_flow": self._flows.append,
        }

    def _plugin(self, part: dict[str, Any], kind: str) -> Any:
        """Return a plugin's object. Raises ConfigError where its class is not to be had."""
        name = part["plugin"]
        try:
            module = importlib.import_module(f"plugins.{name}")
            cls = getattr(module, CLASSES[kind] + name, None)
            if cls is None:
                raise ConfigError(f"no class {CLASSES[kind]}{name}", file=part["file"])
            made = cls(get_logger(name), self._meta, config=part["config"])
        except SluiceError:
            raise
        except (Exception, SystemExit) as error:
            raise ConfigError(describe(error), file=part["file"]) from error
        self._plugins.insert(0, name)
        return made

    def _said(self) -> list[dict[str, Any]]:
        """Return what audit records say of filters; of plugins nothing but the name is known."""
        said: list[dict[str, Any]] = [{"name": name, "plugin": True} for name in self._plugins]
        said += [
            {"name": stage.name, "verdicts": stage.verdicts}
            for flow in self._flows
            for stage in flow.chain.stages
        ]
        return said


def load_use(part: dict[str, Any]) -> FilterUse:
    """Return a filter with its options, as ``worker_end`` described it. Raises ConfigError."""
    from sluice.proxy.loader import load_file
    from sluice.proxy.schema import make_options

    try:
        module = importlib.import_module(part["module"])
    except ImportError:
        module = load_file(part["file"])
    cls: Any = module
    for name in part["class"].split("."):
        cls = getattr(cls, name)
    use = FilterUse(cls, make_options(cls.Options, part["values"]), part["name"])
    use.values = part["values"]
    return use
