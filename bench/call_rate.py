"""Calls a second: through the AdminVM's API and through ``qrexec-client-vm``, 1 and 8 at once.

``python bench/call_rate.py`` starts two sandboxed domains. The reference, in the same rounds and
from the same process, is a bare asyncio server that starts /bin/true for each connection and closes
it when that has ended: what any service framework in Python costs at least.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import Table
from bench.systems import running

from sluice.adminvm.link import TRIGGER_RATE
from sluice.adminvm.system import AdminVM

SYSTEM = """
[system]
kind = "{kind}"
[domains.source]
autostart = true
[domains.target]
autostart = true
[domains.target.files]
"/usr/local/etc/qubes-rpc/bench.True" = "true"
"""


class Bare:
    """The reference: an asyncio server that starts /bin/true for each connection."""

    def __init__(self, path: str) -> None:
        """Serve on the Unix socket ``path`` once ``start`` was awaited."""
        self.path = path
        self.server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begin to serve."""
        self.server = await asyncio.start_unix_server(self._serve, self.path, backlog=64)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        process = await asyncio.create_subprocess_exec("/bin/true")
        await process.wait()
        writer.close()

    async def call(self) -> None:
        """Make one connection and wait for its end."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, self.path)
            assert await loop.sock_recv(sock, 1) == b""


class Bench:
    """A running system and the reference beside it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, adminvm: AdminVM, bare: Bare) -> None:
        """Take what is measured."""
        self.loop = loop
        self.adminvm = adminvm
        self.bare = bare

    async def _api(self) -> None:
        done = await self.adminvm.run("target", "QUBESRPC bench.True+ dom0", timeout=30)
        if done.status:
            raise RuntimeError(f"a call ended with {done.status}")

    def rate(self, kind: str, callers: int, calls: int) -> float:
        """Return the calls a second of ``callers`` that make ``calls`` each, by the API or bare."""
        make = self._api if kind == "api" else self.bare.call

        async def caller() -> None:
            for _ in range(calls):
                await make()

        async def all_of_them() -> float:
            begun = time.perf_counter()
            await asyncio.gather(*(caller() for _ in range(callers)))
            return callers * calls / (time.perf_counter() - begun)

        return self.loop.run_until_complete(all_of_them())

    def inside(self, callers: int, calls: int) -> float:
        """Return the calls a second that shells in a domain make by ``qrexec-client-vm``."""
        one = (
            f"(i=0; while [ $i -lt {calls} ]; do "
            "qrexec-client-vm target bench.True </dev/null || exit 9; i=$((i+1)); done) & "
        )
        command = f"a=$(date +%s.%N); {one * callers} wait; date +%s.%N; echo $a"

        async def measured() -> float:
            done = await self.adminvm.run("source", command, timeout=120)
            end, begin = map(float, done.stdout.split())
            # The bound on a domain's requests is not what is measured here: let it recover.
            await asyncio.sleep(callers * calls / TRIGGER_RATE)
            return callers * calls / (end - begin)

        return self.loop.run_until_complete(measured())


def fill(table: Table, bench: Bench) -> None:
    """Register all rows."""
    for callers, calls in ((1, 100), (8, 25)):
        bare = f"bare server, {callers} at once"
        table.add(bare, "calls/s", lambda c=callers, n=calls: bench.rate("bare", c, n))  # type: ignore[misc]
        table.add(
            f"API, {callers} at once", "calls/s",
            lambda c=callers, n=calls: bench.rate("api", c, n),  # type: ignore[misc]
            reference=bare, goal=">= 0.3",
        )  # fmt: skip
        table.add(
            f"qrexec-client-vm, {callers} at once", "calls/s",
            lambda c=callers, n=calls: bench.inside(c, min(n, 40)),  # type: ignore[misc]
            reference=bare,
        )  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kind", default="bubblewrap", choices=["bubblewrap", "process"])
    arguments = parser.parse_args()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    stack = contextlib.AsyncExitStack()
    toml = SYSTEM.format(kind=arguments.kind)
    system = running(toml, "bench.True * @anyvm target allow\n", {})
    adminvm = loop.run_until_complete(stack.enter_async_context(system))
    try:
        bare = Bare(os.fspath(adminvm.paths.runtime / "bare.sock"))
        loop.run_until_complete(bare.start())
        table = Table(f"calls a second, domains of kind {arguments.kind}")
        fill(table, Bench(loop, adminvm, bare))
        table.run(rounds=arguments.rounds)
    finally:
        loop.run_until_complete(stack.aclose())
    print(table.render())


if __name__ == "__main__":
    main()
