"""Sockets of programs under test: when they are there to be connected to."""

from __future__ import annotations

import socket
from pathlib import Path


def listens(path: Path) -> bool:
    """Tell whether somebody listens at ``path``, by connecting and leaving at once.

    That the file is there says less: it appears when the socket is bound, a moment before.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True
