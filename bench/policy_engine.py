"""The policy engine: parsing, deciding among ever more rules, reloading under decisions.

``python bench/policy_engine.py``. Parsing is measured against ``str.split`` of the same text, a
decision against the smallest policy and against one round trip over an asyncio Unix socket.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import Table
from bench.policy_worlds import policy_text, registry, requests

from sluice.policy.evaluation import Policy
from sluice.policy.files import PolicyStore
from sluice.policy.parser import parse_policy
from sluice.policy.rules import Request, Rule, Verb

SIZES = (10, 1_000, 10_000)


def timed(work: Callable[[], object], times: int = 1) -> float:
    """Return the microseconds that ``work`` takes, the mean of ``times``."""
    begun = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begun) / times * 1e6


def parsing() -> Table:
    """Compare the parser with a split of the file into words."""
    table = Table("parsing 10,000 rules")
    text = policy_text(10_000)
    distinct = "".join(
        f"svc.S{n} +a{n} dom{n % 60}x @anyvm allow user=u{n} notify=yes\n" for n in range(10_000)
    )
    table.add("str.split", "us", lambda: timed(text.split))
    table.add(
        "parse", "us", lambda: timed(lambda: parse_policy(text, "f")), reference="str.split",
        goal="at most 25",
    )  # fmt: skip
    table.add("str.split, no two lines alike", "us", lambda: timed(distinct.split))
    table.add(
        "parse, no two lines alike", "us", lambda: timed(lambda: parse_policy(distinct, "f")),
        reference="str.split, no two lines alike", goal="at most 25",
    )  # fmt: skip
    rules = [item for item in parse_policy(text, "f").items if isinstance(item, Rule)]
    table.add("index", "us", lambda: timed(lambda: Policy(rules)), reference="str.split")
    return table


def deciding() -> Table:
    """Compare decisions among more and more rules, the same calls and registry."""
    table = Table("a decision, by number of rules")
    info = registry()
    for size in SIZES:
        items = parse_policy(policy_text(size), "f").items
        policy = Policy(item for item in items if isinstance(item, Rule))
        # A question costs what the domains cost that it may offer; decisions are found alike.
        calls = [Request.of(*call) for call in requests(400, size)]
        rules = {call: policy.evaluate(call, info).rule for call in calls}
        asking = {c for c, rule in rules.items() if rule and rule.action.verb is Verb.ASK}
        direct = [call for call in calls if call not in asking][:200]

        def decide(policy: Policy = policy, calls: list[Request] = direct) -> float:
            return timed(lambda: [policy.evaluate(call, info) for call in calls], 3) / len(calls)

        first = f"allow or deny, {SIZES[0]} rules"
        name = f"allow or deny, {size} rules"
        table.add(
            name, "us", decide, reference="" if size == SIZES[0] else first,
            goal="" if size == SIZES[0] else "at most 3",
        )  # fmt: skip
        asked = [call for call in calls if call in asking][:50]
        if asked:

            def ask(policy: Policy = policy, calls: list[Request] = asked) -> float:
                return timed(lambda: [policy.evaluate(call, info) for call in calls]) / len(calls)

            table.add(f"ask with its candidates, {size} rules", "us", ask)
    table.add("asyncio round trip, Unix socket", "us", round_trip)
    return table


def round_trip(count: int = 300) -> float:
    """Return the microseconds of one request and answer over an asyncio Unix socket."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    async def run() -> float:
        with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as place:
            server = await asyncio.start_unix_server(serve, f"{place}/s")
            reader, writer = await asyncio.open_unix_connection(f"{place}/s")
            begun = time.perf_counter()
            for _ in range(count):
                writer.write(b"qubes.Filecopy work vault\n")
                await reader.readline()
            taken = time.perf_counter() - begun
            writer.close()
            await writer.wait_closed()
            server.close()
            return taken / count * 1e6

    return asyncio.run(run())


def reloading(rules: int = 10_000) -> str:
    """Change a big policy under a ticking loop; tell how long the loop was ever held."""

    async def run() -> tuple[float, float, float]:
        with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as place:
            path = Path(place) / "10-a.policy"
            path.write_text(policy_text(rules))
            store = PolicyStore([place])
            await store.current_async()
            text = policy_text(rules, seed=9)
            stopped = False
            longest = 0.0

            async def tick() -> None:
                nonlocal longest
                while not stopped:
                    begun = time.perf_counter()
                    await asyncio.sleep(0.001)
                    longest = max(longest, time.perf_counter() - begun - 0.001)

            ticking = asyncio.ensure_future(tick())
            await asyncio.sleep(0.2)
            idle, longest = longest, 0.0
            path.write_text(text)
            begun = time.perf_counter()
            await store.current_async()
            taken = time.perf_counter() - begun
            stopped = True
            await ticking
            return idle, longest, taken

    idle, held, taken = asyncio.run(run())
    return (
        f"reload of {rules} rules: {taken * 1000:.0f} ms until the new policy decides (100 of them "
        f"rest);\n  the loop was never held longer than {held * 1000:.1f} ms "
        f"(idle: {idle * 1000:.1f} ms)"
    )


def main() -> None:
    """Measure and print."""
    for table in (parsing(), deciding()):
        table.run()
        print(table.render(), end="\n\n")
    print(reloading())


if __name__ == "__main__":
    main()
