"""A system whose domain ``bad`` has a program of the test as its process 1.

Run as a program of its own, so that it can be another user: ``python hostile_agents.py ROOT`` is
``sluice up`` there. The program is read from ``config/code`` at each start of the domain; the
others get their agent.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from sluice.cli.up import serve
from sluice.domains.model import DomainConfig
from sluice.domains.paths import Paths
from sluice.domains.sandbox.bubblewrap import Bubblewrap, RunningBubblewrap
from sluice.flow.selector import run

CODE = "config/code"


def main(root: str) -> int:
    """Run the system below ``root`` until it is stopped."""
    start = Bubblewrap.start

    async def hostile(
        self: Bubblewrap, domain: DomainConfig, control: socket.socket
    ) -> RunningBubblewrap:
        usual = Bubblewrap.first_process
        if domain.name == "bad":
            program = (Path(root) / CODE).read_text()
            self.first_process = ("/usr/bin/python3", "-IS", "-c", program)
        try:
            return await start(self, domain, control)
        finally:
            self.first_process = usual

    Bubblewrap.start = hostile  # type: ignore[method-assign]
    paths = Paths.find(root)
    return run(serve(paths, paths.system_file))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
