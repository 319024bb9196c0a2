"""What all tests share: the path, and the groups of tests that are not run by default."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--soak``, which runs the long tests too."""
    parser.addoption("--soak", action="store_true", help="run the tests marked soak as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests out unless they were asked for (by --soak or by -m soak)."""
    if config.getoption("--soak") or "soak" in (config.getoption("-m") or ""):
        return
    deselected = [item for item in items if item.get_closest_marker("soak")]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


# Tests are deterministic; the soak group looks for new examples.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=2000)


def hear_signals() -> None:
    """Have signals mean what they mean in the foreground, here and in all that tests start.

    A shell ignores SIGINT for what it starts in the background, nohup ignores SIGHUP, and every
    program under test would inherit that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Open a way to the checkout for the users that root's tests run programs as.

    And choose how hypothesis searches: the same examples each time, but for the soak group.
    """
    hear_signals()
    if os.geteuid() == 0:
        from tests.support import reach

        try:
            reach.open_way(ROOT)
        except OSError as error:
            raise pytest.UsageError(
                f"{reach.closed(ROOT)}: others than root cannot enter it, and tests that run as "
                f"others need the checkout ({error.strerror}); please put it elsewhere"
            ) from error
    # The modes of what tests make are those that most people's files have.
    os.umask(0o022)
    hypothesis.settings.load_profile("soak" if config.getoption("--soak") else "steady")
