"""Ports that a program under test is told to listen on."""

from __future__ import annotations

import os
import socket

# Below what the kernel gives out by itself, so that nobody gets the port meanwhile, and so that a
# connection to it while nobody listens cannot be a connection to itself.
_FIRST, _LAST = 10_000, 30_000
_next = _FIRST + os.getpid() * 97 % (_LAST - _FIRST)


def free_port() -> int:
    """Return a TCP port of the loopback on which nobody listens, another one each time."""
    global _next
    while True:
        port, _next = _next, _next + 1 if _next < _LAST else _FIRST
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
