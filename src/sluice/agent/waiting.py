"""Requests that wait until the session of a user is there.

Theory. There is at most one waiter (``qubes.WaitForSession``) at a time. The first request that
needs a session starts it; requests that need one while it runs are parked with it, whatever their
user. When it ends, however it ends, all of them proceed. What cannot wait (no waiter could be
started, too many parked) proceeds at once. docs/spec/wire-protocol.md 7.4.4.
"""

from __future__ import annotations

import os

from sluice.service.command import ServiceError
from sluice.service.lookup import find_program
from sluice.service.start import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sluice.agent.processes import ProcessTable

WAITER = b"qubes.WaitForSession"
MAX_PARKED = 256


class SessionWaiter:
    """Parks requests; see the module's theory."""

    def __init__(
        self,
        processes: ProcessTable,
        environment: Mapping[bytes, bytes],
        log: Callable[[str], None],
    ) -> None:
        """Take where processes are waited for, and the waiter's base environment."""
        self._processes = processes
        self._environment = environment
        self._log = log
        self._running = False
        self._parked: list[Callable[[], None]] = []

    def wait(self, user: bytes, source: bytes, proceed: Callable[[], None]) -> None:
        """Call ``proceed()`` when the session is there; maybe before this returns."""
        if len(self._parked) >= MAX_PARKED:
            self._log("too many requests wait for a session: one proceeds without")
            proceed()
            return
        if not self._running and not self._start(user, source):
            proceed()
            return
        self._parked.append(proceed)

    def _start(self, user: bytes, source: bytes) -> bool:
        """Start the waiter; False where that is not possible."""
        try:
            program = find_program(WAITER)
            if program is None:
                self._log("there is no qubes.WaitForSession: nothing to wait for")
                return False
            reading, writing = os.pipe2(os.O_CLOEXEC)
        except (ServiceError, OSError) as error:
            self._log(f"cannot wait for a session: {error}")
            return False
        try:
            environment = {**self._environment, b"QREXEC_REMOTE_DOMAIN": source}
            pid = spawn([WAITER], environment, reading, 1, 2, path=program)
            os.write(writing, user + b"\n")
        except ServiceError as error:
            self._log(f"cannot wait for a session: {error}")
            return False
        finally:
            os.close(reading)
            os.close(writing)
        self._running = True
        self._processes.watch(pid, self._ended)
        return True

    def _ended(self, status: int) -> None:
        if status:
            self._log(f"qubes.WaitForSession ended with {status}")
        self._running = False
        parked, self._parked = self._parked, []
        for proceed in parked:
            proceed()
