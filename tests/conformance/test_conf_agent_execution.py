"""WIRE-129 to 144 and 239's kin: what the agent does with EXEC_CMDLINE and JUST_EXEC."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.agent import (
    SELF,
    STDERR,
    STDOUT,
    AgentUnderTest,
    Place,
    a_place,
    code,
    streams,
)

ME = SELF.encode()


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


@pytest.mark.spec("WIRE-130", "WIRE-131")
def test_a_shell_command_with_all_its_streams(place: Place) -> None:
    agent = AgentUnderTest(place)
    messages = agent.run(ME + b":echo hi; echo err >&2; exit 7")
    assert streams(messages, STDOUT) == b"hi\n"
    assert streams(messages, STDERR) == b"err\n"
    assert code(messages) == 7
