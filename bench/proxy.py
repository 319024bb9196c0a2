"""The proxy: set-up of a call in its three forms, memory of idle calls, a row for each filter.

``python bench/proxy.py [--rounds N] [--size BYTES] [--only set-up|memory|filters]``

Set-up is measured between domains of this machine, each form in a proxy domain of its own, beside a
direct call of the same service. Throughput of a filter stands beside the chain ``pass`` and beside
the direct pipe, with the same data. Memory is that of a server with idle calls of which the far end
is a stand-in, so that only the server's own is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import MIB, Table

if TYPE_CHECKING:
    from sluice.adminvm.system import AdminVM

ROOT = Path(__file__).resolve().parents[1]
CALLS = 20
IDLE = 256

# --- set-up -------------------------------------------------------------------------------------

SYSTEM = """
[system]
kind = "{kind}"
[domains.source]
autostart = true
[domains.target]
autostart = true
[domains.target.files]
"/usr/local/etc/qubes-rpc/bench.True" = "true"
"/usr/local/etc/qubes-rpc/bench.Word" = "word"
"""
PROXY_DOMAIN = """
[domains.{name}]
autostart = true
[domains.{name}.files]
"/rw/config/sluice/proxy.toml" = "proxy.toml"
"""
POLICY = """
bench.True   * @anyvm target allow
bench.Word   * @anyvm target allow
qrexec-proxy * source @anyvm allow
"""
CHAINS = """
[chains.pass]
services = "any"
targets = "any"
require_exit_code = false
filters = ["pass"]
"""
# Domain of each form, and what /etc/qubes-rpc/qrexec-proxy is there.
FORMS = {
    "program": "/usr/lib/sluice/bin/qrexec-proxy",
    "launcher": "/usr/lib/sluice/bin/qrexec-proxy-launcher",
    "raw": "$(ls {/run,/run/user/*,/tmp}/sluice-proxy*/raw.sock 2>/dev/null | head -n 1)",
}
SERVICE = "/usr/local/etc/qubes-rpc/qrexec-proxy"
SERVE = "exec /usr/lib/sluice/bin/sluice proxy serve"


async def set_up(kind: str, rounds: int) -> str:
    """Measure the set-up of a call, direct and in each form; return the table."""
    from bench.systems import running

    domains = "".join(PROXY_DOMAIN.format(name=f"p-{form}") for form in FORMS)
    files = {"proxy.toml": CHAINS, "word": "#!/bin/sh\nread word && echo $word there\n"}
    async with running(SYSTEM.format(kind=kind) + domains, POLICY, files) as adminvm:
        servers: list[asyncio.Future[object]] = []
        try:
            for form, target in FORMS.items():
                servers += await _install(adminvm, form, target)
            return await _set_up_table(adminvm, rounds)
        finally:
            for server in servers:
                server.cancel()
            await asyncio.gather(*servers, return_exceptions=True)


async def _install(adminvm: AdminVM, form: str, target: str) -> list[asyncio.Future[object]]:
    """Make the proxy of a domain be of one form; return the server that runs there, if any."""
    domain = f"p-{form}"
    servers: list[asyncio.Future[object]] = []
    if form != "program":
        servers.append(asyncio.ensure_future(adminvm.run(domain, SERVE, timeout=3600)))
    link = (
        f't={target}; for i in $(seq 100); do [ -e "$t" ] && break; sleep 0.1; t={target}; done;'
        f' mkdir -p {SERVICE.rpartition("/")[0]} && [ -e "$t" ] && ln -sf $t {SERVICE}'
    )
    done = await adminvm.run(domain, f"bash -c '{link}'", user="root", timeout=30)
    if done.status != 0:
        raise RuntimeError(f"{form}: {done.stderr!r}")
    return servers


async def _check(adminvm: AdminVM, call: str) -> None:
    """See that a form carries calls at all: a socket that refuses one looks like a success."""
    command = f"echo hello | qrexec-client-vm {call}"
    done = await adminvm.run("source", command, timeout=30)
    if done.stdout != b"hello there\n":
        raise RuntimeError(f"{call}: {done}")


async def _set_up_table(adminvm: AdminVM, rounds: int) -> str:
    table = Table("set-up of a call between domains, by qrexec-client-vm in the source")
    samples: dict[str, list[float]] = {"direct": []} | {form: [] for form in FORMS}
    for number in range(rounds + 1):
        for name, found in samples.items():
            call = "target bench.True"
            if name != "direct":
                call = f"p-{name} qrexec-proxy+pass+target+bench.True"
                await _check(adminvm, call.replace("True", "Word"))
            loop = (
                f"a=$(date +%s.%N); i=0; while [ $i -lt {CALLS} ]; do"
                f" qrexec-client-vm {call} </dev/null >/dev/null || exit 9;"
                " i=$((i+1)); done; date +%s.%N; echo $a"
            )
            done = await adminvm.run("source", loop, timeout=300)
            if done.status != 0:
                raise RuntimeError(f"{name}: {done.status}: {done.stderr!r}")
            end, begin = map(float, done.stdout.split())
            if number:
                found.append((end - begin) / CALLS)
    for name, found in samples.items():
        goal = {"launcher": "<= 3", "direct": ""}.get(name, "")
        table.add(name, "s", lambda: 0.0, reference="" if name == "direct" else "direct", goal=goal)
        table.rows[name].samples = found
    return table.render()


# --- memory -------------------------------------------------------------------------------------


def proportional(pid: int) -> int:
    """Return the proportional set size of a process, in bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0]) * 1024


def memory() -> str:
    """Return what a server takes without a call and with IDLE of them, and what a launcher does."""
    root = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    client = root / "qrexec-client-vm"
    client.write_text("#!/bin/sh\nexec cat\n")
    client.chmod(0o755)
    (root / "proxy.toml").write_text(
        f'[proxy]\nclient = "{client}"\naudit = "none"\nlog = "{root}/log"\n'
        f'state = "{root}/state"\nmax_calls_source = {IDLE}\n{CHAINS}'
    )
    command = [sys.executable, "-m", "sluice", "proxy", "serve", "--config", f"{root}/proxy.toml"]
    server = subprocess.Popen([*command, "--sockets", str(root)])
    try:
        path = root / "raw.sock"
        _until(path.exists)
        before = proportional(server.pid)
        socks = []
        for _ in range(IDLE):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(path))
            sock.sendall(b"qrexec-proxy+pass+target+x work\0x")
            socks.append(sock)
        for sock in socks:
            assert sock.recv(1) == b"x"
        after = proportional(server.pid)
        for sock in socks:
            sock.close()
        launcher = _launcher_memory(root)
        each = (after - before) / IDLE
        return (
            f"memory (proportional set size): server {before / MIB:.1f} MiB, with {IDLE} idle"
            f" calls {after / MIB:.1f} MiB ({each / 1024:.1f} KiB a call);"
            f" a launcher {launcher / MIB:.1f} MiB"
        )
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(root, ignore_errors=True)


def _launcher_memory(root: Path) -> int:
    """Return what one of several launchers takes; they share the interpreter's pages."""
    environment = {"SLUICE_PROXY_SOCKETS": str(root), "QREXEC_REMOTE_DOMAIN": "work"}
    program = str(ROOT / "src/sluice/bin/qrexec-proxy-launcher")
    running = [
        subprocess.Popen(
            [program, "pass+target+x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment,
        )
        for _ in range(8)
    ]  # fmt: skip
    for process in running:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"x"
    size = proportional(running[0].pid)
    for process in running:
        process.kill()
        process.wait()
    return size


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


# --- filters ------------------------------------------------------------------------------------

# What rows with less data are compared to.
LIKE = {"few lines": "text", "few messages": "json"}
# name -> (words of `sluice proxy run --filter`, kind of data, goal as a ratio to pass).
FILTERS: dict[str, tuple[list[str], str, str]] = {
    "pass": ([], "zero", ""),
    "byte-limit": (['src2dst="1000G"'], "zero", ""),
    "stop-dst": ([], "zero", ""),
    "timeout": (['src2dst="1h"'], "zero", ""),
    "idle-timeout": (['both="1h"'], "zero", ""),
    "count": (["limit=1000", 'interval="1s"'], "zero", ""),
    "concurrent": (["limit=100"], "zero", ""),
    "throttle": (['src2dst="1000G"', 'burst="1G"'], "zero", ""),
    "metrics": ([], "zero", ""),
    "content": (['allow=["text"]'], "text", ">= 0.9"),
    "lines": (['src2dst={allow=["[a-z0-9 .-]*"]}'], "text", ">= 0.3"),
    "lines, rewriting": (['src2dst={replace={quick="slow"}}'], "few lines", ""),
    "json": (['src2dst="any"'], "few messages", "150 MiB/s-class"),
    "streamline": (['buf_size="1M"', "delay_read=0", "delay_write=0"], "zero", ""),
    "program": (['src2dst=["/bin/cat"]'], "zero", ""),
    "record": (['directory="{state}/records"', 'max_bytes="10G"', 'quota="100G"'], "zero", ""),
    "sniff": (["max_bytes=4096"], "zero", ""),
}


def child(words: list[str]) -> None:
    """Lead stdin through one filter to a reader, and print the seconds that it took."""
    import tomllib

    from sluice.proxy.command import configuration_of, run_command
    from sluice.proxy.loader import Filters
    from sluice.proxy.log import Log
    from sluice.proxy.schema import use_filter
    from sluice.proxy.stage import FilterUse

    name, *options = words
    given = {}
    for option in options:
        given |= tomllib.loads(option)
    uses: list[FilterUse] = [use_filter(Filters().get(name), given)]
    log = Log("/dev/null")
    begun = time.perf_counter()
    sink = ["/bin/sh", "-c", "exec cat > /dev/null"]
    code = run_command(configuration_of(uses), "tried", sink, log=log)
    print(time.perf_counter() - begun, code, file=sys.stderr)


class Data:
    """What is sent: zeros from /dev/zero, or files of text and JSON in memory."""

    def __init__(self, root: Path, size: int) -> None:
        """Write the files, ``size`` bytes each."""
        self.root = root
        self.size = size
        self.sizes = {"zero": size}
        line = b"the quick brown fox jumps over the lazy dog and does it again 0123456789\n"
        record = {"id": 12345, "name": "a name", "tags": ["one", "two"], "value": 1.5, "ok": True}
        message = json.dumps(record).encode() + b"\n"
        # Less for what takes its time.
        for kind, piece, part in (
            ("text", line, 1), ("few lines", line, 32), ("json", message, 1),
            ("few messages", message, 8),
        ):  # fmt: skip
            count = size // part // len(piece)
            (root / kind).write_bytes(piece * count)
            self.sizes[kind] = count * len(piece)

    def command(self, kind: str) -> list[str]:
        """Return the program that writes it."""
        if kind == "zero":
            return ["/usr/bin/head", "-c", str(self.size), "/dev/zero"]
        return ["/bin/cat", str(self.root / kind)]

    def direct(self, kind: str) -> float:
        """Return the bytes a second of the data through a pipe of its own."""
        begun = time.perf_counter()
        with subprocess.Popen(self.command(kind), stdout=subprocess.PIPE) as writer:
            subprocess.run(["/bin/cat"], stdin=writer.stdout, stdout=subprocess.DEVNULL, check=True)
        return self.sizes[kind] / (time.perf_counter() - begun)

    def through(self, name: str, options: list[str], kind: str) -> float:
        """Return the bytes a second of the data through a filter."""
        words = [option.replace("{state}", str(self.root)) for option in options]
        with subprocess.Popen(self.command(kind), stdout=subprocess.PIPE) as writer:
            done = subprocess.run(
                [sys.executable, __file__, "--child", name, *words],
                stdin=writer.stdout, stderr=subprocess.PIPE, check=True,
                env={**os.environ, "XDG_STATE_HOME": str(self.root)},
            )  # fmt: skip
            writer.stdout.close()  # type: ignore[union-attr]
        seconds, code = done.stderr.split()[-2:]
        if code != b"0":
            raise RuntimeError(f"{name}: exit code {code!r}: {done.stderr!r}")
        for path in (self.root / "records").glob("*"):
            path.unlink()
        return self.sizes[kind] / float(seconds)

    def parsed(self) -> float:
        """Return the bytes a second of ``json.loads`` alone, line by line."""
        lines = (self.root / "json").read_bytes()[: 16 * MIB].splitlines()[:-1]
        begun = time.perf_counter()
        for line in lines:
            json.loads(line)
        return sum(map(len, lines)) / (time.perf_counter() - begun)


def filters(size: int, rounds: int) -> str:
    """Measure every filter; return the table."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
    root = Path(tempfile.mkdtemp(prefix="s-", dir=base))
    try:
        (root / "records").mkdir(mode=0o700)
        data = Data(root, size)
        table = Table("throughput from source to target through one filter")
        for kind in ("zero", "text", "json"):
            table.add(f"pipe, {kind}", "B/s", lambda kind=kind: data.direct(kind))  # type: ignore[misc]
        for kind in ("zero", "text", "json"):
            table.add(
                f"pass, {kind}", "B/s", lambda kind=kind: data.through("pass", [], kind),  # type: ignore[misc]
                reference=f"pipe, {kind}",
            )  # fmt: skip
        table.add("json.loads alone", "B/s", data.parsed)
        for name, (options, kind, goal) in FILTERS.items():
            if name == "pass":
                continue
            table.add(
                name, "B/s",
                lambda name=name, options=options, kind=kind: data.through(  # type: ignore[misc]
                    name.split(",")[0], options, kind
                ),
                reference=f"pass, {LIKE.get(kind, kind)}", goal=goal,
            )  # fmt: skip
        table.run(rounds=rounds)
        ratio = table.rows["json"].median / table.rows["json.loads alone"].median
        return f"{table.render()}\njson without schema to json.loads alone: {ratio:.2f}"
    finally:
        shutil.rmtree(root, ignore_errors=True)


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256 * MIB, help="bytes moved for a throughput")
    parser.add_argument("--kind", default="bubblewrap", choices=["bubblewrap", "process"])
    parser.add_argument("--only", choices=["set-up", "memory", "filters"])
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], str]] = {
        "set-up": lambda: asyncio.run(set_up(arguments.kind, arguments.rounds)),
        "memory": memory,
        "filters": lambda: filters(arguments.size, arguments.rounds),
    }
    for name, part in parts.items():
        if arguments.only in (None, name):
            with contextlib.suppress(KeyboardInterrupt):
                print(part(), flush=True)


if __name__ == "__main__":
    main()
