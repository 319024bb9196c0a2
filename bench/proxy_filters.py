"""What each filter costs: its throughput beside `pass`, and beside no proxy at all.

``python bench/proxy_filters.py``. The source is ``yes``, the far end ``cat`` into /dev/null,
started by a stand-in for qrexec-client-vm, as in a Qubes VM. A row is the time that one call takes
from start to end, as bytes a second. The last rows are parts of a call without moving bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import MIB, Table, bare_python, spawn_true
from tests.support.proxy import Vm, vm

TEXT = "GET /index/of/things?number=12345&color=blue HTTP/1.1 and some more of the same"
MESSAGE = json.dumps(
    {"op": "get", "keys": ["alpha", "beta"], "limit": 25, "nested": {"a": [1, 2, 3], "b": None}}
)
SCHEMA = {"type": "object", "required": ["op"], "properties": {"op": {"enum": ["get", "put"]}}}
LINES = "{ use = 'lines', src2dst = { allow = ['GET [^ ]+ HTTP/1[.]1.*', 'PUT .*'] } }"
FILTERS = {
    "pass": ("'pass'", TEXT),
    "pass, three times": ("'pass', 'pass', 'pass'", TEXT),
    "timeout, idle-timeout": ("{ use = 'timeout', src2dst = '1h' }, 'idle-timeout'", TEXT),
    "count, concurrent, metrics": (
        "{ use = 'count', limit = 9999, interval = '1s' }, { use = 'concurrent', limit = 9 },"
        " 'metrics'",
        TEXT,
    ),
    "stop-dst": ("'stop-dst'", TEXT),
    "content": ("{ use = 'content', allow = ['text'] }", TEXT),
    "byte-limit (looks at all)": ("{ use = 'byte-limit', src2dst = '1T' }", TEXT),
    "byte-limit, three times": (", ".join(["{ use = 'byte-limit', src2dst = '1T' }"] * 3), TEXT),
    "throttle, a rate not reached": ("{ use = 'throttle', src2dst = '1T', burst = '1T' }", TEXT),
    "streamline, 1 MiB, no delay": (
        "{ use = 'streamline', buf_size = '1M', delay_read = 0, delay_write = 0 }", TEXT),
    "sniff, the first 4 KiB": ("{ use = 'sniff', max_bytes = '4k' }", TEXT),
    "record": ("{ use = 'record', directory = '@', max_bytes = '4G', quota = '8G' }", TEXT),
    "lines, allow": (LINES, TEXT),
    "lines, allow and deny": (LINES.replace("] } }", "], deny = ['secret'] } }"), TEXT),
    "lines, rewriting": ("{ use = 'lines', src2dst = { replace = { blue = 'red' } } }", TEXT),
    "json, no schema": ("{ use = 'json', src2dst = 'any' }", MESSAGE),
    "json, schema": ("{ use = 'json', src2dst = '@/schema.json' }", MESSAGE),
    "program: cat": ("{ use = 'program', src2dst = ['cat'] }", TEXT),
}  # fmt: skip
SLOW = ("json", "lines, rewriting")


def moved(argv: list[str], line: str, size: int, **options: object) -> float:
    """Send ``size`` bytes of lines to a program; return bytes a second."""
    size -= size % (len(line) + 1)
    begun = time.perf_counter()
    source = subprocess.Popen(
        ["/bin/sh", "-c", f'yes "$1" | head -c {size}', "sh", line], stdout=subprocess.PIPE
    )
    sink = subprocess.Popen(argv, stdin=source.stdout, stdout=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    assert source.stdout is not None
    source.stdout.close()
    if sink.wait(300) != 0:
        raise SystemExit(f"{argv} failed")
    source.wait()
    return size / (time.perf_counter() - begun)


def through(qube: Vm, chain: str, line: str, size: int) -> Callable[[], float]:
    """Return what measures a chain."""
    name = f"{chain}+vault+sink"
    argv = [str(Path(__file__).resolve().parents[1] / "src/sluice/bin/qrexec-proxy"), name]

    def measure() -> float:
        try:
            return moved(argv, line, size, env=qube.environment())
        except SystemExit:
            print(qube.log()[-2000:], file=sys.stderr)
            raise

    return measure


def call(qube: Vm, words: list[str]) -> float:
    """Return the seconds that a call takes that moves nothing."""
    begun = time.perf_counter()
    subprocess.run(words, env=qube.environment(), stdin=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


def json_alone(size: int) -> float:
    """Return the bytes a second of ``json.loads`` alone, line by line."""
    data = (MESSAGE + "\n").encode() * (size // (len(MESSAGE) + 1))
    begun = time.perf_counter()
    for line in data.split(b"\n"):
        if line:
            json.loads(line)
    return len(data) / (time.perf_counter() - begun)


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mib", type=int, default=256, help="MiB that a fast chain moves")
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    size = given.mib * MIB
    table = Table("Filters of the proxy, program form")
    with vm() as qube, tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as folder:
        qube.service("sink", "#!/bin/sh\nexec cat >/dev/null\n")
        qube.service("true", "#!/bin/sh\nexit 0\n")
        Path(folder, "schema.json").write_text(json.dumps(SCHEMA))
        direct = [str(qube.client), "--", "vault", "sink"]
        table.add("direct: the client alone", "MiB/s", lambda: moved(direct, TEXT, size) / MIB)
        for number, (name, (filters, line)) in enumerate(FILTERS.items()):
            chain = f"chain{number}"
            qube.chain(chain, filters.replace("@", folder))
            amount = size // 4 if name.startswith(SLOW) else size
            measure = through(qube, chain, line, amount)
            reference = "direct: the client alone" if name == "pass" else "pass"
            goal = {"pass": "0.5", "content": "0.9", "lines, allow": "0.3"}.get(name, "")

            def sample(measure: Callable[[], float] = measure) -> float:
                rate = measure() / MIB
                for file in Path(folder).glob("*.rec"):
                    file.unlink()
                return rate

            table.add(name, "MiB/s", sample, reference=reference, goal=goal)
        table.add("json.loads alone", "MiB/s", lambda: json_alone(8 * MIB) / MIB)
        table.add("a bare interpreter", "s", bare_python)
        table.add("spawn of /bin/true", "s", spawn_true)
        client = [str(qube.client), "--", "vault", "true"]
        table.add("set-up, client alone", "s", lambda: call(qube, client))
        program = str(Path(__file__).resolve().parents[1] / "src/sluice/bin/qrexec-proxy")
        table.add(
            "set-up, program form", "s", lambda: call(qube, [program, "chain0+vault+true"]),
            reference="a bare interpreter",
        )  # fmt: skip
        table.run(given.rounds)
    print(table.render())


if __name__ == "__main__":
    main()
