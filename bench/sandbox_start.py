"""How long a domain takes to start, what an idle one costs, and fifty at once.

The reference is a bare bubblewrap of ``/bin/true`` with the same namespaces, started beside each
start of a domain in the same run. A domain is ready when its agent has greeted over the control
channel. Memory is the proportional set size (PSS) of all its processes, bubblewrap's included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

from sluice.domains.model import DomainConfig
from sluice.domains.paths import Paths
from sluice.domains.sandbox.bubblewrap import Bubblewrap, RunningBubblewrap

BARE = [
    "bwrap", "--unshare-all", "--unshare-user", "--as-pid-1", "--die-with-parent", "--new-session",
    "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64",
    "--symlink", "usr/bin", "/bin", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp",
    "--", "/bin/true",
]  # fmt: skip


def bare() -> float:
    """Return the milliseconds that a bare bubblewrap takes, from start to end."""
    begun = time.perf_counter()
    subprocess.run(BARE, check=True)
    return (time.perf_counter() - begun) * 1000


async def ready(
    sandbox: Bubblewrap, domain: DomainConfig
) -> tuple[RunningBubblewrap, socket.socket]:
    """Start a domain and wait for the greeting of its agent."""
    ours, theirs = socket.socketpair()
    try:
        running = await sandbox.start(domain, theirs)
    finally:
        theirs.close()
    ours.setblocking(False)
    async with asyncio.timeout(30):
        assert await asyncio.get_running_loop().sock_recv(ours, 12)
    return running, ours


async def end(running: RunningBubblewrap, ours: socket.socket) -> None:
    """End a domain and wait until nothing of it is left."""
    ours.close()
    running.kill()
    await running.wait()
    os.close(running.stderr_fd)
    await running.clean()


def pss(pid: int) -> int:
    """Return the KiB that belong to a process and those below it, shared ones divided."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        total += sum(pss(int(child)) for child in children)
    return total


def memory(running: RunningBubblewrap) -> int:
    """Return the KiB of a domain, with the bubblewrap that waits for it."""
    parent = Path(f"/proc/{running.pid}/stat").read_text().rsplit(")", 1)[1].split()[1]
    return pss(int(parent))


def domains(count: int) -> list[DomainConfig]:
    return [
        DomainConfig(f"bench{number}", number, str(uuid.uuid4()), template="host")
        for number in range(1, count + 1)
    ]


async def measure(paths: Paths, rounds: int, count: int) -> None:
    sandbox = Bubblewrap(paths)
    print(f"{sandbox.ids.mode}: {sandbox.privilege()}")
    every = domains(count)
    try:
        first, again, reference = [], [], []
        for number in range(rounds):
            reference.append(bare())
            begun = time.perf_counter()
            running, ours = await ready(sandbox, every[number % count])
            taken = (time.perf_counter() - begun) * 1000
            (first if number < count else again).append(taken)
            await end(running, ours)
        reference.append(bare())
        for number in range(rounds):
            begun = time.perf_counter()
            running, ours = await ready(sandbox, every[number % count])
            again.append((time.perf_counter() - begun) * 1000)
            await end(running, ours)
            reference.append(bare())
        bar = statistics.median(reference)
        print(f"bare bubblewrap, /bin/true        {bar:8.1f} ms")
        for what, values in (("first start (makes its tree)", first), ("start", again)):
            middle = statistics.median(values)
            print(f"{what:32}  {middle:8.1f} ms  {middle / bar:5.1f} x bare   (to reach: 6)")
        await many(sandbox, every, bar)
    finally:
        # As an ordinary user we cannot remove what is theirs in any other way.
        for domain in every:
            if (paths.appvms / domain.name).exists():
                await sandbox.wipe(domain.name)
        sandbox.close()


async def many(sandbox: Bubblewrap, every: list[DomainConfig], bar: float) -> None:
    begun = time.perf_counter()
    running = await asyncio.gather(*(ready(sandbox, domain) for domain in every))
    taken = time.perf_counter() - begun
    each = sum(memory(one) for one, _ in running) / len(every) / 1024
    count = len(every)
    print(
        f"{count} at once                        {taken * 1000:8.0f} ms"
        f"  {taken * 1000 / count / bar:5.1f} x bare, each"
    )
    print(f"memory of an idle domain (PSS)    {each:8.1f} MB               (to reach: 8)")
    begun = time.perf_counter()
    await asyncio.gather(*(end(one, ours) for one, ours in running))
    print(f"{count} ended                          {(time.perf_counter() - begun) * 1000:8.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--domains", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as root:
        paths = Paths.find(root)
        paths.create()
        asyncio.run(measure(paths, options.rounds, options.domains))


if __name__ == "__main__":
    main()
