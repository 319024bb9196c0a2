"""Policies and registries of any size for the benchmarks of policy. Run alone it prints one."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sluice.policy.system_info import Domain, SystemInfo

DOMAINS = 60
_LABELS = ("0xcc0000", "0x3465a4", "0x73d216", "0xedd400")
_TARGETS = ("@anyvm", "@default", "@dispvm", "@adminvm")
_ACTIONS = (
    "deny",
    "deny notify=no",
    "allow target=dom7x",
    "allow target=@dispvm user=user",
    "ask",
    "ask default_target=dom3x",
)


def registry() -> SystemInfo:
    """Return 60 domains: five tags, five bases, four labels; and dom0."""
    domains = [Domain("dom0", klass="AdminVM", power_state="Running")]
    for number in range(DOMAINS):
        domains.append(
            Domain(
                f"dom{number}x",
                uuid=f"{number + 1:08x}-0000-4000-8000-000000000000",
                tags=frozenset({f"tag{number % 5}", "created-by-dom0", "guivm-dom0"}),
                default_dispvm=f"dom{number % 5}x",
                template_for_dispvms=number < 5,
                power_state="Running" if number % 2 else "Halted",
                label=_LABELS[number % 4],
                guivm="dom0",
            )
        )
    return SystemInfo(domains)


def policy_text(count: int, seed: int = 1) -> str:
    """Return ``count`` rules about ``count / 20`` services, as people and programs write them."""
    chance = random.Random(seed)
    lines = []
    for _ in range(count):
        service = f"qubes.Service{chance.randrange(max(1, count // 20))}"
        argument = chance.choice(("*", "*", "+", f"+argument{chance.randrange(9)}"))
        source = chance.choice((_name(chance), _tag(chance), "@anyvm"))
        target = chance.choice((_name(chance), _name(chance), _tag(chance), *_TARGETS))
        action = chance.choice(_ACTIONS)
        lines.append(f"{service:24} {argument:10} {source:10} {target:10} {action}\n")
    return "".join(lines)


def changed(text: str, seed: int = 2) -> str:
    """Return the policy with one rule in twenty removed, and one in twenty replaced."""
    chance = random.Random(seed)
    lines = text.splitlines(keepends=True)
    fresh = iter(policy_text(len(lines), seed).splitlines(keepends=True))
    kept = []
    for line in lines:
        what = chance.randrange(20)
        if what == 0:
            continue
        kept.append(next(fresh) if what == 1 else line)
    return "".join(kept)


def requests(count: int, rules: int, seed: int = 3) -> list[tuple[str, str, str]]:
    """Return calls of such a policy: service with argument, source, target."""
    chance = random.Random(seed)
    return [
        (
            f"qubes.Service{chance.randrange(max(1, rules // 20))}",
            _name(chance),
            chance.choice((_name(chance), _name(chance), "@dispvm", "")),
        )
        for _ in range(count)
    ]


def _name(chance: random.Random) -> str:
    return f"dom{chance.randrange(DOMAINS)}x"


def _tag(chance: random.Random) -> str:
    return f"@tag:tag{chance.randrange(5)}"


if __name__ == "__main__":
    sys.stdout.write(policy_text(20))
