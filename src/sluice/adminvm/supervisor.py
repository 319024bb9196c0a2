"""Tasks that somebody looks after: none is forgotten, none outlives its owner.

Each call and each domain's run is one coroutine under a ``Supervisor``. What goes wrong in one is
logged and stops nothing else; at the end all are cancelled and waited for, with a deadline.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Coroutine
from typing import Any


class Supervisor:
    """A bounded set of running coroutines."""

    def __init__(self, log: Callable[[str], None]) -> None:
        """``log`` is told of every failure, one text with its traceback."""
        self._log = log
        self._tasks: set[asyncio.Task[Any]] = set()
        self.closed = False

    def spawn(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any] | None:
        """Run ``coroutine``; None (and it never begins) where the supervisor is closing."""
        if self.closed:
            coroutine.close()
            return None
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            lines = "".join(traceback.format_exception(error))
            self._log(f"{task.get_name()} failed: {lines}")

    def __len__(self) -> int:
        """Count what runs."""
        return len(self._tasks)

    async def close(self, seconds: float) -> bool:
        """Take nothing more, cancel everything, wait; tell whether all ended in time."""
        self.closed = True
        current = asyncio.current_task()
        waiting = {task for task in self._tasks if task is not current}
        for task in waiting:
            task.cancel()
        if not waiting:
            return True
        _, left = await asyncio.wait(waiting, timeout=seconds)
        return not left
