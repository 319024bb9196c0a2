"""The services that dom0 runs for calls of domains: how many for each, and their common end.

Counted is what really runs, not what an agent reports: a domain may say that a call has ended, and
so get its number or port back, while the service goes on.
"""

from __future__ import annotations

from sluice.adminvm.dom0 import Dom0Call
from sluice.errors import ResourceError


class Served:
    """The services that run now, each with the domain whose call it answers."""

    def __init__(self) -> None:
        """Begin with none."""
        self._running: dict[Dom0Call, str] = {}

    def check(self, source: str, limit: int) -> None:
        """Refuse one more service for ``source`` over ``limit``. Raises ResourceError."""
        if sum(name == source for name in self._running.values()) >= limit:
            raise ResourceError(f"dom0 answers {limit} calls of the domain already")

    def add(self, service: Dom0Call, source: str) -> None:
        """Count a service until ``discard``, which its ``on_gone`` should call."""
        self._running[service] = source

    def discard(self, service: Dom0Call) -> None:
        """Forget a service of which nothing is left."""
        self._running.pop(service, None)

    def close(self) -> None:
        """End all of them."""
        for service in list(self._running):
            service.close()
        self._running.clear()

    def __len__(self) -> int:
        """Count them."""
        return len(self._running)
