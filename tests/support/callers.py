"""Many calls at once from one process: callers that speak to an agent's trigger socket."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from sluice.adminvm.memory import Completed, run_to_end
from sluice.agent.caller import CallRequest


@dataclass
class Opened:
    """A call that was allowed: its request (to be closed at the end) and its descriptors."""

    request: CallRequest
    read_fd: int
    write_fd: int

    async def finish(self, data: bytes = b"") -> Completed:
        """Send ``data`` and its end, and collect the rest."""
        try:
            return await run_to_end(self.read_fd, self.write_fd, data)
        finally:
            self.request.close()


class CallRefused(Exception):
    """The call was refused."""


async def ask(agent_socket: Path, target: str, service: str) -> Opened:
    """Ask for a call. Raises CallRefused, or OSError for anything else."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[tuple[int, int]] = loop.create_future()

    def refused() -> None:
        if not answer.done():
            answer.set_exception(CallRefused())

    def failed(text: str) -> None:
        if not answer.done():
            answer.set_exception(OSError(text))

    request = CallRequest(
        loop,
        target.encode(),
        service.encode(),
        agent_socket=str(agent_socket),
        on_open=lambda read_fd, write_fd: answer.set_result((read_fd, write_fd)),
        on_refused=refused,
        on_error=failed,
    )
    try:
        return Opened(request, *await answer)
    except BaseException:
        request.close()
        raise


async def call(agent_socket: Path, target: str, service: str, data: bytes) -> Completed | None:
    """Make one call to its end; None where it was refused."""
    try:
        opened = await ask(agent_socket, target, service)
    except CallRefused:
        return None
    return await opened.finish(data)
