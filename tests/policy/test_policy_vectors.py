"""Every vector of docs/spec/policy.md section 25.2, run from the document itself."""

from __future__ import annotations

import re

import pytest
from tests.support.policy import FIXTURE, Vector, vectors

from sluice.policy.evaluation import Allow, Ask, Deny
from sluice.policy.memory import parse_text
from sluice.policy.response import direct, encode
from sluice.policy.rules import Request

VECTORS = vectors()


def test_no_vector_is_lost() -> None:
    """The document has 106 vectors, and all of them are found."""
    assert [vector.name for vector in VECTORS] == [f"V{n}" for n in range(1, 107)]


@pytest.mark.spec("POL-246")
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_vector(vector: Vector) -> None:
    """The policy of the row gives the answer of the row."""
    policy = parse_text("\n".join(vector.rules))
    request = Request("t.S", vector.argument, vector.source, vector.target, vector.requested_source)
    resolution = policy.evaluate(request, FIXTURE)
    kind, _, rest = vector.expected.partition(" ")
    if kind == "ask":
        _check_ask(resolution, rest)
        return
    assert not isinstance(resolution, Ask)
    settled = direct(resolution, FIXTURE) if isinstance(resolution, Allow) else resolution
    text = encode(resolution, FIXTURE)
    if kind == "allow:":
        assert text == _response(rest)
        return
    assert text == "result=deny"
    assert isinstance(settled, Deny)
    _check_deny(settled, vector.expected)


def _check_ask(resolution: Allow | Ask | Deny, rest: str) -> None:
    match = re.fullmatch(r"\{(.*)\} default (\S+)", rest)
    assert match
    assert isinstance(resolution, Ask)
    assert set(resolution.candidates) == set(match[1].split(", "))
    assert resolution.default_target == (None if match[2] == "none" else match[2])


def _response(rest: str) -> str:
    """Build the text of section 14 from the abbreviations of the row."""
    long = {"uuid": "target_uuid", "req": "requested_target"}
    given = dict(part.split("=", 1) for part in rest.split("; "))
    fields = {"user": "DEFAULT", "result": "allow", "autostart": "True"}
    fields |= {long.get(key, key): value for key, value in given.items()}
    order = ("user", "result", "target", "target_uuid", "autostart", "requested_target")
    return "\n".join(
        f"{key}={fields[key]}" for key in (*order, "service", "policy_source") if key in fields
    )


def _check_deny(deny: Deny, expected: str) -> None:
    match = re.match(r"deny(?:, (notify|silent))?: ([A-Z-]+)(?: \(line (\d+)\))?", expected)
    assert match, expected
    assert deny.cause == match[2]
    if match[1]:
        assert deny.notify == (match[1] == "notify")
    if match[3]:
        assert f"policy:{match[3]}" in deny.message
        assert deny.place == ("policy", int(match[3]))
