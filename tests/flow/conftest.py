"""Loops for the tests of the data path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.flow import Driver


@pytest.fixture
def driver() -> Iterator[Driver]:
    """A Reactor that the test turns."""
    made = Driver()
    yield made
    made.close()


@pytest.fixture(params=["reactor", "asyncio"])
def each_driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """The Reactor, then an asyncio loop."""
    made = Driver(request.param)
    yield made
    made.close()
