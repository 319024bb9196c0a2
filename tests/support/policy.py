"""What the tests of policy share: the fixture of section 25.1, and the vectors, read from the spec.

The tables of docs/spec/policy.md are the data; nothing is copied, so nothing can be forgotten.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from sluice.policy.evaluation import Allow, Ask, Deny
from sluice.policy.memory import parse_text
from sluice.policy.response import direct
from sluice.policy.rules import Request
from sluice.policy.system_info import Domain, SystemInfo
from sluice.wire.names import NIL_UUID

SPEC = Path(__file__).resolve().parents[2] / "docs" / "spec" / "policy.md"


def uuid_of(number: int) -> str:
    """Return the UUID of domain number ``number`` of the fixture."""
    return f"{number:08x}-0000-4000-8000-000000000000"


@cache
def section(title: str) -> str:
    """Return the text of the section whose heading begins with ``title``."""
    text = SPEC.read_text()
    start = re.search(rf"^#+ {re.escape(title)}", text, re.MULTILINE)
    assert start, title
    level = text[start.start() : start.end()].count("#", 0, 4)
    end = re.compile(rf"^#{{1,{level}}} ", re.MULTILINE).search(text, start.end())
    return text[start.end() : end.start() if end else None]


def rows(text: str, number: int = 0) -> list[list[str]]:
    """Return the rows of the table of that number in ``text``, without its two heading lines."""
    tables: list[list[str]] = []
    previous = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                tables.append([])
            tables[-1].append(line)
        previous = line
    return [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in tables[number][2:]
    ]


def _fixture() -> list[Domain]:
    domains = []
    for number, name, kind, tags, base, default, power, other in rows(section("25.1 Fixture")):
        name = name.strip("`")
        extra: dict[str, str | None] = {"guivm": "dom0"}
        for key, value in re.findall(r"(\w+) (`[^`]*`|null)", other):
            extra[key] = None if value == "null" else value.strip('`"')
        domains.append(
            Domain(
                name=name,
                klass=kind,
                tags=frozenset(tag.strip() for tag in tags.split(",") if tag.strip()),
                uuid=NIL_UUID if name == "dom0" else uuid_of(int(number, 16)),
                template_for_dispvms=base == "yes",
                default_dispvm=None if default == "null" else default.strip("`"),
                power_state=power,
                icon="adminvm-black" if name == "dom0" else "appvm-red",
                label="0xcc0000",
                guivm=extra["guivm"],
                relayvm=extra.get("relayvm"),
                transport_rpc=extra.get("transport_rpc"),
                internal=bool(extra.get("internal")),
            )
        )
    return domains


FIXTURE = SystemInfo(_fixture())


def expand(text: str, info: SystemInfo = FIXTURE) -> str:
    """Replace the ``U(name)`` of the spec by ``uuid:`` and that domain's UUID."""

    def uuid(match: re.Match[str]) -> str:
        domain = info.get(match[1])
        assert domain and domain.uuid, match[1]
        return f"uuid:{domain.uuid}"

    return re.sub(r"U\(([\w-]+)\)", uuid, text)


class Vector(NamedTuple):
    """One row of section 25.2."""

    name: str
    rules: list[str]
    source: str
    target: str
    argument: str
    requested_source: str | None
    expected: str


def vectors() -> list[Vector]:
    """Return the rows of section 25.2."""
    found = []
    for name, policy, call, extra, expected in rows(section("25.2 Vectors")):
        source, _, target = call.partition("→")
        argument = re.search(r"argument `(\+[^`]*)`", extra)
        requested = re.search(r"requested_source `([^`]*)`", extra)
        target = target.strip()
        found.append(
            Vector(
                name,
                [] if policy == "(no rules)" else expand(policy.strip("`")).split(" // "),
                source.strip(" `"),
                "" if target == "(empty string)" else expand(target.strip("`")),
                argument[1] if argument else "+",
                requested[1] if requested else None,
                expand(expected),
            )
        )
    return found


def decide(
    rules: str,
    source: str,
    target: str,
    call: str = "t.S",
    *,
    requested: str | None = None,
    info: SystemInfo = FIXTURE,
) -> Allow | Ask | Deny:
    """Return what a policy of these rules answers; ``U(name)`` is expanded."""
    policy = parse_text(expand(rules, info))
    return policy.evaluate(Request.of(call, source, expand(target, info), requested), info)


def brief(resolution: Allow | Ask | Deny, info: SystemInfo = FIXTURE) -> str:
    """Return an answer in a line, as the tables of the tests spell it.

    ``allow TARGET [user=U] [no-autostart] [notify]``; ``ask {A,B} [default=D] ...``;
    ``deny CAUSE [silent]``.
    """
    settled: Allow | Ask | Deny = resolution
    if isinstance(resolution, Allow):
        directed = direct(resolution, info)
        if isinstance(directed, Deny):
            settled = directed
    if isinstance(settled, Deny):
        return f"deny {settled.cause}" + ("" if settled.notify else " silent")
    if isinstance(settled, Ask):
        words = ["ask {" + ",".join(settled.candidates) + "}"]
        if settled.default_target:
            words.append(f"default={settled.default_target}")
    else:
        words = [f"allow {settled.target}"]
    if settled.user:
        words.append(f"user={settled.user}")
    if not settled.autostart:
        words.append("no-autostart")
    if settled.notify:
        words.append("notify")
    return " ".join(words)


def spec_param(line: str, *values: object) -> object:
    """Return a parameter set of a test that shows a line (or several, by spaces) of the spec."""
    lines = [name if name.startswith("POL-") else f"POL-{name}" for name in line.split()]
    return pytest.param(*values, marks=pytest.mark.spec(*lines), id=f"{lines[0]}-{values[0]}"[:60])
