"""Small things that starting programs needs: waiting for a descriptor, running one to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sluice.errors import LocalError, ResourceError

TIMEOUT = 20.0  # seconds for any step of a start
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


@dataclass
class Staged:
    """A started program: its process, a pidfd of it, and the reading end of its stderr."""

    process: subprocess.Popen[bytes]
    pidfd: int
    console: int

    def kill(self) -> None:
        """End it now; nothing happens if it has ended."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def wait(self) -> int:
        """Return its exit status, 128 + signal for a signal."""
        await readable(self.pidfd)
        code = self.process.wait()
        return 128 - code if code < 0 else code

    def said(self) -> str:
        """Return the first line of what it has written to stderr and nobody has read."""
        os.set_blocking(self.console, False)
        try:
            text = os.read(self.console, 4096).decode("utf-8", "replace").strip()
        except OSError:
            return ""
        return text.splitlines()[0] if text else ""

    def close(self) -> None:
        """Close the descriptors."""
        for name in ("pidfd", "console"):
            descriptor = getattr(self, name)
            if descriptor >= 0:
                os.close(descriptor)
                setattr(self, name, -1)


def spawn(
    argv: Sequence[str],
    *,
    name: str | None = None,
    descriptors: Sequence[int] = (),
    directory: str = "/",
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> Staged:
    """Start a program of the host with nothing inherited but ``descriptors``.

    ``name`` is what it finds as its own name, if that is not to be the program's.
    Its stderr is a pipe of ours. Raises ResourceError. Main thread only, where the program binds
    its life to ours.
    """
    console, console_write = os.pipe2(os.O_CLOEXEC)
    try:
        process = subprocess.Popen(
            [name or argv[0], *argv[1:]],
            executable=argv[0],
            env=environment,
            cwd=directory,
            stdin=stdin,
            stdout=stdout,
            stderr=console_write,
            pass_fds=descriptors,
        )
    except OSError as error:
        os.close(console)
        raise ResourceError(f"cannot start {argv[0]}: {error.strerror}") from error
    finally:
        os.close(console_write)
    return Staged(process, os.pidfd_open(process.pid), console)


async def run(
    argv: Sequence[str], *, descriptors: Sequence[int] = (), directory: str = "/"
) -> None:
    """Run a program of the host to its end. Raises LocalError with what it said if it fails."""
    staged = spawn(argv, descriptors=descriptors, directory=directory)
    try:
        status = await staged.wait()
        if status != 0:
            raise LocalError(f"{argv[0]}: {staged.said() or f'ended with {status}'}")
    except BaseException:
        staged.kill()
        staged.process.wait()
        raise
    finally:
        staged.close()


async def readable(descriptor: int) -> None:
    """Wait until a descriptor is readable; a pidfd is when its process has ended."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    # asyncio knows a descriptor once only, and several may wait for the same pidfd.
    own = os.dup(descriptor)
    loop.add_reader(own, _mark, done)
    try:
        await done
    finally:
        loop.remove_reader(own)
        os.close(own)


def _mark(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


async def write_all(descriptor: int, data: bytes) -> None:
    """Write everything to a pipe of ours, without blocking the loop. Raises OSError."""
    os.set_blocking(descriptor, False)
    loop = asyncio.get_running_loop()
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            done: asyncio.Future[None] = loop.create_future()
            loop.add_writer(descriptor, _mark, done)
            try:
                await done
            finally:
                loop.remove_writer(descriptor)
