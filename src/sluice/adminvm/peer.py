"""What a daemon asks of others, on asyncio: policy, other daemons, qubesd.

Nobody here is a domain: they are trusted, and checked all the same. Only asking policy has no
deadline, because a person may have to answer (docs/spec/wire-protocol.md 6.9, 15).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import time

from sluice.adminvm.ask import MAX_PATH, NotRunning, Reply
from sluice.adminvm.decision import MAX_REPLY, Decision, parse_reply
from sluice.adminvm.dom0 import watch_exit
from sluice.adminvm.qubesd import MAX_REPLY as MAX_QUBESD_REPLY
from sluice.adminvm.qubesd import decode_reply, encode_request
from sluice.errors import LocalError, RemoteError
from sluice.service.start import RESET_SIGNALS
from sluice.wire import messages as wire
from sluice.wire.names import Trigger

PATIENCE = 10.0
RETRY = 0.002  # seconds between two attempts to connect, doubled each time up to MAX_RETRY
MAX_RETRY = 0.1
# Starting a domain takes as long as its property qrexec_timeout says, which may be much.
QUBESD_PATIENCE = 1800.0

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _connect(path: str) -> Streams:
    """Connect, waiting ``PATIENCE`` seconds at most where others are still to be accepted.

    asyncio takes that state (EAGAIN) for a connection, so it gets the socket when it is connected.
    """
    if len(os.fsencode(path)) > MAX_PATH:
        raise LocalError(f"the path of a socket is longer than {MAX_PATH} bytes: {path}")
    loop = asyncio.get_running_loop()
    until, pause = loop.time() + PATIENCE, RETRY
    sock = None
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        while (code := sock.connect_ex(path)) == errno.EAGAIN and loop.time() < until:
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_RETRY)
        if code:
            raise OSError(code, os.strerror(code))
        return await asyncio.open_unix_connection(sock=sock)
    except BaseException as error:
        if sock is not None:
            sock.close()
        if not isinstance(error, OSError):
            raise
        kind = NotRunning if error.errno in (errno.ENOENT, errno.ECONNREFUSED) else LocalError
        raise kind(f"cannot connect to {path}: {error.strerror}") from error


async def _read_to_end(reader: asyncio.StreamReader, limit: int) -> bytes:
    """Read until end-of-file, but no more than one byte over ``limit``."""
    data = b""
    try:
        while len(data) <= limit and (piece := await reader.read(limit + 1 - len(data))):
            data += piece
    except ConnectionError:
        pass
    return data


# --- policy -----------------------------------------------------------------------------------


def policy_request(name: str, trigger: Trigger) -> bytes:
    """Return what the policy daemon is sent about a request of the domain ``name`` (6.9.1)."""
    lines = [f"source={name}"]
    if trigger.source is not None:
        lines.append(f"requested_source={trigger.source}")
    lines += [f"intended_target={trigger.target}", f"service_and_arg={trigger.service}"]
    text = "".join(line + "\n" for line in [*lines, ""])
    return text.encode("utf-8", "surrogateescape")


async def ask_policy_daemon(path: str, name: str, trigger: Trigger) -> Decision:
    """Ask the policy daemon. Raises LocalError or RemoteError where the program must be asked."""
    reader, writer = await _connect(path)
    try:
        writer.write(policy_request(name, trigger))
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        return parse_reply(await _read_to_end(reader, MAX_REPLY))
    finally:
        writer.close()


async def ask_policy_program(program: str, name: str, trigger: Trigger) -> Decision:
    """Run the policy program; it must end with 0 and print a valid reply (6.9.3).

    Raises LocalError where it cannot be run or fails, RemoteError where its answer is malformed.
    Cancelling ends it.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    argv = ["qrexec-policy-exec", "--", name, trigger.target, trigger.service]
    fd = theirs.fileno()
    try:
        pid = os.posix_spawn(
            program,
            argv,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, 0), (os.POSIX_SPAWN_DUP2, fd, 1)],
            setsid=True,
            setsigmask=(),
            setsigdef=RESET_SIGNALS,
        )
    except OSError as error:
        ours.close()
        raise LocalError(f"cannot run {program}: {error.strerror}") from error
    finally:
        theirs.close()
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def note(status: int) -> None:
        if not ended.done():
            ended.set_result(status)

    watch_exit(loop, pid, note)
    try:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            reply = await _read_to_end(reader, MAX_REPLY)
        finally:
            writer.close()
        status = await asyncio.shield(ended)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, 9)
        raise
    if status:
        raise LocalError(f"the policy program exited with {status}")
    return parse_reply(reply)


# --- other daemons ----------------------------------------------------------------------------


class PeerSession:
    """A session with another daemon, after its request was answered."""

    def __init__(self, reply: Reply, streams: Streams) -> None:
        """Made by ``request_execution``."""
        self.reply = reply
        self._reader, self._writer = streams

    async def wait_for_end(self) -> None:
        """Wait until the daemon says, by closing, that the connection has ended."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(4096):
                pass

    def close(self) -> None:
        """End the session."""
        self._writer.close()


async def request_execution(path: str, source: int, text: bytes) -> PeerSession:
    """Ask the daemon at ``path`` to execute ``text`` for the domain number ``source`` (6.9.6).

    Raises NotRunning, LocalError, or RemoteError where the daemon does not follow the protocol.
    """
    reader, writer = await _connect(path)
    try:
        async with asyncio.timeout(PATIENCE):
            kind, body = await _message(reader, 4)
            version = wire.decode_hello(kind, body)
            wire.negotiate(version, own=wire.LOCAL_VERSION, minimum=wire.LOCAL_MINIMUM)
            writer.write(wire.encode_hello(wire.LOCAL_VERSION))
            writer.write(wire.encode_exec(wire.EXEC_CMDLINE, source, 0, text))
            await writer.drain()
            kind, body = await _message(reader, 8)
        if kind != wire.EXEC_CMDLINE:
            raise RemoteError(f"a daemon replied {wire.type_name(kind)}")
        domain, port, _ = wire.decode_exec(body)
        if not wire.FIRST_DATA_PORT <= port <= wire.LAST_DATA_PORT:
            raise RemoteError(f"a daemon gave us port {port}")
    except (OSError, EOFError) as error:
        writer.close()
        raise RemoteError("a daemon closed the connection or does not answer") from error
    except BaseException:
        writer.close()
        raise
    return PeerSession(Reply(domain, port, []), (reader, writer))


async def _message(reader: asyncio.StreamReader, size: int) -> tuple[int, bytes]:
    kind, got = wire.HEADER.unpack(await reader.readexactly(8))
    if got != size:
        raise RemoteError(f"a daemon sent {wire.type_name(kind)} of {got} bytes")
    return kind, await reader.readexactly(size)


# --- qubesd -----------------------------------------------------------------------------------


async def call_qubesd(path: str, method: str, destination: str, payload: str = "") -> bytes:
    """Call qubesd; returns the content of its answer.

    Raises LocalError, or RemoteError (QubesdError for an exception) as ``decode_reply`` does.
    """
    reader, writer = await _connect(path)
    began = time.monotonic()
    try:
        async with asyncio.timeout(QUBESD_PATIENCE):
            writer.write(encode_request(method, destination, payload=payload))
            writer.write_eof()
            return decode_reply(await _read_to_end(reader, MAX_QUBESD_REPLY))
    except TimeoutError:
        seconds = time.monotonic() - began
        raise LocalError(f"qubesd did not answer {method} within {seconds:.0f} s") from None
    except OSError as error:
        raise LocalError(f"qubesd cannot be asked: {error}") from error
    finally:
        writer.close()
