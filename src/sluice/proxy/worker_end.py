"""A chain that runs in a process of its own, seen from the process that has the call.

Chains with plugins of the earlier proxy, and in the resident form chains with a filter that blocks,
are run by ``sluice-proxy-worker`` (worker.py): what blocks or spins there hurts its own call only.
For the flow such a chain is a far end: the bytes go there untouched, and what comes back was judged
there. On exit the worker reports why the call ended and what its filters said.
docs/spec/proxy.md 7.
"""

from __future__ import annotations

import os
import sys

from sluice.proxy.far import ProgramEnd
from sluice.proxy.stage import Cause

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from sluice.flow.reactor import Loop
    from sluice.proxy.link import Call
    from sluice.proxy.model import ChainConfig, ProxySettings
    from sluice.proxy.stage import FilterUse

PROGRAM = "sluice-proxy-worker"
# Descriptors of the worker: where it reports, and what it is to do.
REPORT, JOB = 3, 4
_MAX_REPORT = 65536
_SETTINGS = ("client", "far_timeout", "state", "max_memory")
_CAUSES = ("filter", "filter-error", "far", "memory", "source-gone", "closed-reader", "killed")


def needs_process(chain: ChainConfig, form: str) -> bool:
    """Tell whether a chain needs a process of its own, where calls come in a form (section 2)."""
    if chain.legacy is not None:
        return True
    shared = form in ("launcher", "raw")
    return shared and any(getattr(use.cls, "blocking", False) for use in chain.uses)


class WorkerEnd(ProgramEnd):
    """A chain with its far end in a process of its own.

    ``cause`` and ``filters`` are what the worker reported, None before its end.
    """

    def __init__(
        self,
        loop: Loop,
        call: Call,
        chain: ChainConfig,
        settings: ProxySettings,
        log: Callable[[str], None],
        *,
        command: Sequence[str | bytes] | None = None,
    ) -> None:
        """Take the call and its chain; the worker gets all that it needs of the configuration.

        ``command`` is the program that is the far end, None for the ordinary one.
        """
        from sluice.runtime import program

        super().__init__(loop, program(PROGRAM), log=log, label="")
        self.cause: Cause | None = None
        self.filters: list[dict[str, Any]] | None = None
        self._job = describe_job(call, chain, settings)
        self._job["command"] = command and [os.fsdecode(word) for word in command]
        self._report = -1

    def start(self, on_exit: Callable[[int], None]) -> None:
        """Start the worker. Raises LocalError where it cannot be started."""
        import json

        self._report, report = os.pipe2(os.O_CLOEXEC)
        job = os.memfd_create("job", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(job), "wb") as stream:
                stream.write(json.dumps(self._job).encode())
            os.lseek(job, 0, os.SEEK_SET)
            self._extra = (report, job)
            super().start(lambda code: self._ended(code, on_exit))
        except BaseException:
            os.close(self._report)
            raise
        finally:
            os.close(report)
            os.close(job)

    def _before_reaping(self) -> None:
        """End what the worker has left behind in its group, whose number is still its own."""
        try:  # noqa: SIM105
            os.killpg(self.pid, 9)
        except ProcessLookupError:
            pass

    def _ended(self, code: int, on_exit: Callable[[int], None]) -> None:
        import json

        try:
            os.set_blocking(self._report, False)
            report = json.loads(os.read(self._report, _MAX_REPORT))
            self.filters = report["filters"]
            if report["kind"] in _CAUSES:
                self.cause = Cause(
                    report["kind"], report["reason"], filter=report["filter"],
                    exit_code=report["exit_code"],
                )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError):
            text = f"the process of the chain ended without a word, with {code}"
            self.cause = Cause("filter-error", text, exit_code=125)
        os.close(self._report)
        on_exit(self.cause.exit_code if self.cause is not None else code)


def describe_job(call: Call, chain: ChainConfig, settings: ProxySettings) -> dict[str, Any]:
    """Return what the worker must know, as plain values."""
    if chain.legacy is not None:
        legacy = chain.legacy
        elements = [
            _describe_use(chain.uses[part["use"]]) if "use" in part else part
            for part in legacy["elements"]
        ]
        ends = {"src": legacy["src"], "dst": legacy["dst"]}
        directories = legacy["directories"]
    else:
        elements = [_describe_use(use) for use in chain.uses]
        ends, directories = {"src": None, "dst": None}, []
    return {
        "call": {name: getattr(call, name) for name in call.__slots__},
        "elements": elements,
        **ends,
        "directories": directories,
        "settings": {
            **{name: getattr(settings, name) for name in _SETTINGS},
            "on_closed_reader": chain.on_closed_reader or settings.on_closed_reader,
        },
    }


def _describe_use(use: FilterUse) -> dict[str, Any]:
    """Return where a filter's class is found, and its options."""
    module = sys.modules[use.cls.__module__]
    return {
        "module": module.__name__,
        "file": module.__file__,
        "class": use.cls.__qualname__,
        "name": use.name,
        "values": use.values,
    }
