"""``sluice down``: end the AdminVM of a system and all its domains."""

from __future__ import annotations

import fcntl
import os
import time

import click

from sluice.cli.common import ask, places, root_option, tell_errors
from sluice.domains.paths import Paths
from sluice.errors import ResourceError

WITHIN = 10.0  # seconds


@click.command()
@root_option
@tell_errors
def command(root: str | None) -> None:
    """End the system: its domains, then the AdminVM."""
    paths = places(root)
    ask(paths, "shutdown")
    wait_until_gone(paths)


def wait_until_gone(paths: Paths, within: float = WITHIN) -> None:
    """Wait until the AdminVM has let go of its lock. Raises ResourceError if it does not."""
    deadline = time.monotonic() + within
    descriptor = os.open(paths.lock_file, os.O_RDWR | os.O_CLOEXEC)
    try:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.02)
    finally:
        os.close(descriptor)
    raise ResourceError(f"the AdminVM did not end within {within:g} seconds")
