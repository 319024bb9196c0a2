"""Calls between sandboxed domains: throughput, set-up and idleness, direct and through the proxy.

``python bench/calls.py`` starts a system of three domains on this machine and prints one table.
Each row stands beside its reference, measured in the same rounds: a shell pipe for throughput, the
spawn of /bin/true for a call made through the API, a bare interpreter for one made by a program.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import Table, bare_python, shell_pipe, spawn_true
from bench.systems import running

from sluice import runtime
from sluice.adminvm.system import AdminVM

CALLS = 20
IDLE_SECONDS = 10.0

SYSTEM = """
[system]
kind = "{kind}"
[domains.source]
autostart = true
[domains.target]
autostart = true
[domains.target.files]
"/usr/local/etc/qubes-rpc/bench.Sink" = "sink"
"/usr/local/etc/qubes-rpc/bench.Source" = "source"
"/usr/local/etc/qubes-rpc/bench.True" = "true"
"/usr/local/etc/qubes-rpc/bench.Wait" = "sink"
[domains.proxy]
autostart = true
[domains.proxy.files]
"/rw/config/sluice/proxy.toml" = "proxy.toml"
"""

POLICY = """
bench.Sink   * @anyvm target allow
bench.Source * @anyvm target allow
bench.True   * @anyvm target allow
bench.Wait   * @anyvm target allow
qrexec-proxy * source proxy  allow
"""

PROXY = """
[chains.pass]
services = "any"
targets = "any"
filters = ["pass"]
[chains.one]
services = "any"
targets = "any"
filters = [{ use = "byte-limit", src2dst = "1000G", dst2src = "1000G" }]
[chains.three]
services = "any"
targets = "any"
filters = [
  { use = "byte-limit", src2dst = "1000G", dst2src = "1000G" },
  { use = "byte-limit", src2dst = "1000G", dst2src = "1000G" },
  { use = "byte-limit", src2dst = "1000G", dst2src = "1000G" },
]
"""


def files(size: int) -> dict[str, str]:
    """Return the files beside the system file; ``bench.Source`` gives ``size`` bytes."""
    return {
        "sink": "#!/bin/sh\nexec cat > /dev/null\n",
        "source": f"#!/bin/sh\nexec head -c {size} /dev/zero\n",
        "proxy.toml": PROXY,
    }


class Bench:
    """A running system and the things that are measured on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, adminvm: AdminVM, size: int) -> None:
        """Take the loop that the AdminVM lives on."""
        self.loop = loop
        self.adminvm = adminvm
        self.size = size

    def wait(self, work: Coroutine[object, object, float]) -> float:
        """Run one measurement to its end."""
        return self.loop.run_until_complete(work)

    async def inside(self, command: str) -> float:
        """Return the seconds that a shell command takes inside ``source``, as timed there."""
        timed = f"a=$(date +%s.%N); {{ {command}; }} >/dev/null || exit 9; date +%s.%N; echo $a"
        done = await self.adminvm.run("source", timed, timeout=120)
        if done.status != 0:
            raise RuntimeError(f"{command}: status {done.status}: {done.stderr!r}")
        end, begin = map(float, done.stdout.split())
        return end - begin

    async def throughput(self, command: str) -> float:
        """Return the bytes a second of a command inside ``source`` that moves ``size`` bytes."""
        return self.size / await self.inside(command)

    async def set_up(self, call: str) -> float:
        """Return the seconds of one short call made by ``qrexec-client-vm``, out of several."""
        loop = f"i=0; while [ $i -lt {CALLS} ]; do qrexec-client-vm {call} </dev/null || exit 9;"
        return await self.inside(f"{loop} i=$((i+1)); done") / CALLS

    async def api_call(self) -> float:
        """Return the seconds of one short call from dom0 through the API, out of several."""
        begun = time.perf_counter()
        for _ in range(CALLS):
            done = await self.adminvm.run("target", "QUBESRPC bench.True+ dom0", timeout=30)
            assert done.status == 0, done
        return (time.perf_counter() - begun) / CALLS


def several(measure: Callable[[], float]) -> Callable[[], float]:
    """Do a small measurement as often as the calls are made, and return the mean."""
    return lambda: sum(measure() for _ in range(CALLS)) / CALLS


def fill(table: Table, bench: Bench) -> None:
    """Register all rows."""
    size = bench.size
    direct, proxied = "target", "proxy qrexec-proxy+{chain}+target+"
    zeros = f"head -c {size} /dev/zero | qrexec-client-vm"
    pipe, call = "shell pipe", "direct, source to target"
    table.add(pipe, "B/s", lambda: shell_pipe(size))
    table.add(
        call, "B/s", lambda: bench.wait(bench.throughput(f"{zeros} {direct} bench.Sink")),
        reference=pipe, goal=">= 0.5 (aim 0.6)",
    )  # fmt: skip
    table.add(
        "direct, target to source", "B/s",
        lambda: bench.wait(bench.throughput(f"qrexec-client-vm {direct} bench.Source </dev/null")),
        reference=pipe, goal=">= 0.5 (aim 0.6)",
    )  # fmt: skip
    for chain, name, goal in (
        ("pass", "proxied, pass", ">= 0.5 (aim 0.6)"),
        ("one", "proxied, one filter that inspects", ">= 0.4"),
        ("three", "proxied, three that inspect", ">= 0.4"),
    ):
        via = proxied.format(chain=chain)
        table.add(
            name, "B/s",
            lambda via=via: bench.wait(bench.throughput(f"{zeros} {via}bench.Sink")),  # type: ignore[misc]
            reference=call, goal=goal,
        )  # fmt: skip
    table.add("spawn of /bin/true", "s", several(spawn_true))
    table.add(
        "set-up by the API", "s", lambda: bench.wait(bench.api_call()),
        reference="spawn of /bin/true", goal="<= 4",
    )  # fmt: skip
    table.add("python3 -I -S -c pass", "s", several(bare_python))
    client = "set-up by qrexec-client-vm"
    table.add(
        client, "s", lambda: bench.wait(bench.set_up(f"{direct} bench.True")),
        reference="python3 -I -S -c pass", goal="<= 2",
    )  # fmt: skip
    table.add(
        "set-up through the proxy", "s",
        lambda: bench.wait(bench.set_up(f"{proxied.format(chain='pass')}bench.True")),
        reference=client,
    )  # fmt: skip


def processes_below(pid: int) -> list[int]:
    """Return ``pid`` and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        found.append(queue.pop())
        queue += children.get(found[-1], [])
    return found


def activity(pids: list[int]) -> tuple[int, int]:
    """Return the wake-ups and clock ticks of CPU of some processes so far."""
    wakeups = ticks = 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        wakeups += int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])
        ticks += int(stat[11]) + int(stat[12])
    return wakeups, ticks


async def idle(adminvm: AdminVM) -> tuple[int, int]:
    """Hold a proxied call open without a byte; return wake-ups and ticks of all three domains."""
    command = "sleep 1000 | qrexec-client-vm proxy qrexec-proxy+pass+target+bench.Wait"
    call = asyncio.ensure_future(adminvm.run("source", command))
    await asyncio.sleep(2)
    roots = [int(str(d["pid"])) for d in adminvm.describe() if d["name"] != "dom0"]
    pids = [pid for root in roots if root > 0 for pid in processes_below(root)]
    before = activity(pids)
    await asyncio.sleep(IDLE_SECONDS)
    after = activity(pids)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    return after[0] - before[0], after[1] - before[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes moved for a throughput")
    parser.add_argument("--kind", default="bubblewrap", choices=["bubblewrap", "process"])
    arguments = parser.parse_args()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    stack = contextlib.AsyncExitStack()
    toml = SYSTEM.format(kind=arguments.kind)
    proxy = {"qrexec-proxy": runtime.INSIDE_BIN + "/qrexec-proxy"}
    system = running(toml, POLICY, files(arguments.size), proxy)
    adminvm = loop.run_until_complete(stack.enter_async_context(system))
    try:
        table = Table(f"calls between domains of kind {arguments.kind}")
        fill(table, Bench(loop, adminvm, arguments.size))
        table.run(rounds=arguments.rounds)
        wakeups, ticks = loop.run_until_complete(idle(adminvm))
    finally:
        loop.run_until_complete(stack.aclose())
    print(table.render())
    print(
        f"idle proxied call, {IDLE_SECONDS:.0f} s, all processes of three domains: "
        f"{wakeups} wake-ups, {ticks} ticks of CPU  (to reach: 0)"
    )


if __name__ == "__main__":
    main()
