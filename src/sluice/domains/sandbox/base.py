"""The one interface in front of everything that can run a domain.

A sandbox starts the agent of a domain as the first process of an environment of its own and hands
it one end of the control channel. Everything else (handshake, calls, timeouts) is the AdminVM's.
docs/spec/core-stack.md 12.4, 12.4.1.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

from sluice.domains.model import DomainConfig

CONTROL_ENVIRONMENT = "SLUICE_CONTROL_FD"
"""Tells the agent the number of the descriptor of its control channel."""


@dataclass(frozen=True)
class Limit:
    """One limit of a running domain: what holds it (``cgroup2``, ``cgroup1``, ``rlimit``,
    ``tmpfs`` or ``none``) and its value in the unit of ``name``."""

    name: str
    value: str
    by: str


class RunningSandbox(Protocol):
    """A domain that runs. ``pid`` and ``pidfd`` are those of the agent, as the host sees it."""

    pid: int
    pidfd: int

    def kill(self) -> None:
        """End every process of the domain now. Does nothing if it has ended already."""

    async def wait(self) -> int:
        """Return the exit status (0..255, or 128 + signal) once every process has ended."""

    async def clean(self) -> None:
        """Remove what the run left: run directory, control groups. After ``wait`` only."""

    def limits(self) -> list[Limit]:
        """Return the limits in force, those that nothing holds included (12.5)."""

    def change_limits(
        self, *, memory: int | None = None, processes: int | None = None, cpus: int | None = None
    ) -> None:
        """Set other limits now; ``memory`` is MiB. Raises LocalError where nothing can hold one."""


class Sandbox(Protocol):
    """A kind of sandbox: ``bubblewrap``, ``process``."""

    kind: str

    async def start(self, domain: DomainConfig, control: socket.socket) -> RunningSandbox:
        """Start the domain's agent with ``control`` as its inherited control channel.

        The caller keeps ``control`` and closes it after the return. Raises ResourceError or
        LocalError when the domain cannot be started; nothing is left running then.
        """

    async def sweep(self) -> list[str]:
        """Remove what the domains of an AdminVM that was killed have left and nobody is to keep.

        Before anything is started. Returns what could not be removed, one text each.
        """

    def close(self) -> None:
        """Let go of what the kind keeps between starts; at the end of the AdminVM."""

    def privilege(self) -> str:
        """Say in one sentence which user ids the domains have on the host, and what it means."""
