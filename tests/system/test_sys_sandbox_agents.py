# ruff: noqa: E501  (what runs inside is written as it runs there)
"""A domain whose process 1 is hostile: whatever it does on its control channel, only it ends.

In each of three modes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import hostile_agents
from tests.support.sandbox import MODES, Machine, machine, wait_for

from sluice.adminvm.api import request
from sluice.errors import LocalError

pytestmark = [pytest.mark.sandbox, pytest.mark.xdist_group("sandbox")]

SETTINGS = """
[domains.good]
[domains.bad]
autostart = false
qrexec_timeout = 2
"""
POLICY = "* * @anyvm @anyvm deny\n"
BEGIN = """
import _socket, os, struct, sys
s = _socket.socket(fileno=int(os.environ['SLUICE_CONTROL_FD']))
def send(kind, body): s.sendall(struct.pack('<II', kind, len(body)) + body)
def hello(version=4): send(0x300, struct.pack('<I', version))
def trigger(ident=b'x', service=b'test.Add' + bytes(1), target=b'good', kind=0x212):
    send(kind, target.ljust(64, bytes(1)) + ident.ljust(32, bytes(1)) + service)
try:
"""
END = """
    while s.recv(4096): pass
except OSError: pass
"""
HOSTILE = {
    "noise": "s.sendall(os.urandom(100000))",
    "zeros for ever": "\n    while True: s.sendall(bytes(65536))",
    "nothing": "pass",
    "half a header": "s.sendall(b'abc')",
    "an early end": "s.close(); os._exit(0)",
    "a trigger before the greeting": "trigger()",
    "a version of the past": "hello(1)",
    "a greeting of the wrong length": "send(0x300, b'12345678')",
    "a second greeting": "hello(); hello()",
    "four gibibytes announced": "hello(); s.sendall(struct.pack('<II', 0x212, 0xffffffff) + b'x' * 100)",
    "a message of the data channel": "hello(); send(0x190, b'data')",
    "a message of the AdminVM": "hello(); send(0x200, struct.pack('<II', 0, 0) + b'root:id' + bytes(1))",
    "the end of a call that is not there": "hello(); send(0x211, struct.pack('<II', 99, 99))",
    "an ident with an escape": "hello(); trigger(ident=bytes((27,)) + b'[2J')",
    "an ident without an end": "hello(); trigger(ident=b'x' * 32)",
    "a service without an end": "hello(); trigger(service=b'test.Add')",
    "a service with a NUL inside": "hello(); trigger(service=b'a' + bytes(1) + b'b' + bytes(1))",
    "a service of 64 KiB": "hello(); trigger(service=b'a' * 65400 + bytes(1))",
    "a target that is a path": "hello(); trigger(target=b'../../../etc/passwd')",
    "descriptors along with all it says": "\n    hello()\n    for n in range(500): s.sendmsg([struct.pack('<II', 0x211, 8), struct.pack('<II', 9, 9)], [(1, 1, struct.pack('250i', *[0] * 250))])",
    "ten thousand triggers": "\n    hello()\n    for n in range(10000): trigger(ident=b'%d' % n)",
}


class HostileMachine(Machine):
    """A system whose domain ``bad`` runs what ``play`` was given."""

    def sluice(self, *words: str) -> list[str]:
        """Return the command line of ``sluice``; what is up is our own."""
        if words != ("up",):
            return super().sluice(*words)
        return self.as_user([sys.executable, "-P", hostile_agents.__file__, str(self.root)])

    def ask(self, method: str, **fields: object) -> object:
        return request(self.root / "run/control.sock", method, **fields)

    def play(self, code: str) -> None:
        """Start ``bad`` with this program; its start fails where it does not greet."""
        (self.root / hostile_agents.CODE).write_text(BEGIN + "    " + code + END)
        with contextlib.suppress(LocalError):
            self.ask("start", name="bad")

    def logged(self) -> int:
        """Return how many bytes all logs have."""
        return sum(path.stat().st_size for path in (self.root / "state/log").iterdir())


@pytest.fixture(scope="module", params=MODES)
def system(request: pytest.FixtureRequest) -> Iterator[HostileMachine]:
    """A system with the domains ``good``, which runs, and ``bad``."""
    with machine(request.param, SETTINGS, POLICY, kind=HostileMachine) as made:
        assert isinstance(made, HostileMachine)
        yield made


def descriptors(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.spec("CORE-169", "CORE-180")
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_first_process(system: HostileMachine, what: str) -> None:
    """Whatever comes over a control channel, the AdminVM goes on and the other domain answers."""
    assert system.process is not None
    before, held = system.logged(), descriptors(system.process.pid)
    good = system.agent_pid("good")
    system.play(HOSTILE[what])
    assert system.shell("echo answered", "good").stdout == b"answered\n"
    with contextlib.suppress(LocalError):
        system.ask("kill", name="bad")
    assert system.ask("state", name="bad") == "Halted"
    assert system.shell("echo again", "good").stdout == b"again\n"
    assert system.agent_pid("good") == good
    assert system.process.poll() is None
    # The bucket of triggers lets 500 through at once, each of which has its record.
    assert system.logged() - before < 400_000
    # Nothing of what was sent stays with the AdminVM, descriptors least of all.
    wait_for(lambda: descriptors(system.process.pid) <= held + 2)


PROTOCOL_BREAKERS = [
    "noise",
    "a trigger before the greeting",
    "a version of the past",
    "a greeting of the wrong length",
    "a second greeting",
    "four gibibytes announced",
    "a message of the data channel",
    "a message of the AdminVM",
]


@pytest.mark.parametrize("what", PROTOCOL_BREAKERS)
def test_who_breaks_the_protocol_is_ended(system: HostileMachine, what: str) -> None:
    """A control channel that has broken the protocol is closed, and its domain ended by that."""
    system.play(HOSTILE[what])
    wait_for(lambda: system.ask("state", name="bad") == "Halted")
    assert system.shell("echo answered", "good").stdout == b"answered\n"
