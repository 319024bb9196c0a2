"""Calling services from Python: ``await sluice.call("vault", "test.Add", input=b"1 2\\n")``.

Theory. A call is a pipe with an exit status. ``call`` is for short exchanges: everything in,
everything out, within bounds. ``open_call`` is the streaming form: both directions at the caller's
pace, with back-pressure both ways. Inside a domain the call is made in this very process, by the
agent's trigger socket and the data engine; in dom0 the program ``qrexec-client`` makes it. Leaving
the block, a time-out or a cancellation ends the call at once, and the other side sees it end.

For large processes: this module needs asyncio. docs/spec/wire-protocol.md 10 to 12.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sluice.agent.caller import AGENT_SOCKET
from sluice.callstream import (
    Call,
    CallError,
    CallFailed,
    CallLost,
    CallRefused,
    CallResult,
    Dom0Call,
    DomainCall,
)
from sluice.errors import LocalError, ResourceError
from sluice.wire.messages import EXIT_FAILURE, EXIT_NOT_FOUND

__all__ = [
    "Call",
    "CallError",
    "CallFailed",
    "CallLost",
    "CallRefused",
    "CallResult",
    "call",
    "open_call",
]

# How many bytes one ``call`` may bring back by default.
MAX_OUTPUT = 64 << 20
AGENT_VARIABLE = "SLUICE_AGENT_SOCKET"
# Statuses of a service that never ran.
STARTS = {
    EXIT_NOT_FOUND: ": the target has no such service",
    EXIT_FAILURE: ": it could not be started",
}


@asynccontextmanager
async def open_call(
    target: str,
    service: str,
    *,
    argument: str | None = None,
    source: str = "",
    agent_socket: str | None = None,
    daemon_directory: str | None = None,
) -> AsyncIterator[Call]:
    """Open a call for the time of an ``async with`` block.

    ``service`` may carry its argument (``"test.File+name"``) or take it separately. ``target`` is
    a domain's name, ``@default`` or ``@dispvm:...``. ``source`` asks as if from another domain.
    The agent is looked for at ``agent_socket``, $SLUICE_AGENT_SOCKET or the usual place; without
    an agent this is dom0, and ``daemon_directory`` may say where the daemons' sockets are. There
    is no time limit (a person may have to confirm): put ``asyncio.timeout`` around it.
    Raises CallRefused.
    """
    text = service if argument is None else f"{service}+{argument}"
    if not service or " " in text or "\0" in text:
        raise LocalError(f"not a service: {text!r}")
    name = f"{text} of {target}"
    path = agent_socket or os.environ.get(AGENT_VARIABLE) or AGENT_SOCKET
    call: DomainCall | Dom0Call
    if daemon_directory is None and (agent_socket is not None or os.path.exists(path)):
        call = DomainCall(name, text, target, source, path)
    else:
        call = Dom0Call(name, text, target, daemon_directory)
    try:
        await call.open()
        yield call
    finally:
        call.close()


async def call(
    target: str,
    service: str,
    *,
    input: bytes | memoryview = b"",
    argument: str | None = None,
    source: str = "",
    timeout: float | None = None,
    check: bool = True,
    limit: int = MAX_OUTPUT,
    agent_socket: str | None = None,
    daemon_directory: str | None = None,
) -> CallResult:
    """Make a whole call: send ``input``, return what came back and the exit status.

    ``timeout`` in seconds bounds all of it (TimeoutError); ``limit`` the bytes that may come back
    (ResourceError). Either ends the call, as does cancelling the task. Raises CallRefused where it
    was not allowed, CallLost where the other side went away, and with ``check`` CallFailed where
    the status is not 0. The other arguments are those of ``open_call``.
    """
    async with (
        asyncio.timeout(timeout),
        open_call(
            target,
            service,
            argument=argument,
            source=source,
            agent_socket=agent_socket,
            daemon_directory=daemon_directory,
        ) as opened,
    ):
        sending = asyncio.ensure_future(_send_all(opened, input))
        # Let it begin: ``wait`` lets finish what has begun.
        await asyncio.sleep(0)
        try:
            pieces = []
            size = 0
            async for piece in opened:
                size += len(piece)
                if size > limit:
                    raise ResourceError(f"{service} of {target}: more than {limit} bytes came back")
                pieces.append(piece)
            # The service may have more to read; or it ends before, and its status says why.
            status = await opened.wait()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        result = CallResult(b"".join(pieces), opened.errors, status)
    if check and status:
        raise CallFailed(f"{service} of {target} ended with status {_meaning(result)}", result)
    return result


def _meaning(result: CallResult) -> str:
    """Show a status, and what it means where the service had no part in it."""
    reason = STARTS.get(result.status, "") if not (result.output or result.errors) else ""
    return f"{result.status}{reason}"


async def _send_all(opened: Call, data: bytes | memoryview) -> None:
    try:
        await opened.send(data)
    except CallLost:
        return
    await opened.send_eof()
