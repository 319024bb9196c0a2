# ruff: noqa: E501  (what runs inside is written as it runs there)
"""A domain whose process 1 is hostile: whatever it does on its control channel, only it ends."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.sandbox import remove

from sluice.adminvm.system import AdminVM
from sluice.domains.model import DomainConfig
from sluice.domains.paths import Paths
from sluice.domains.registry import Registry
from sluice.domains.sandbox.bubblewrap import Bubblewrap
from sluice.errors import SluiceError
from sluice.policy.files import PolicyStore

pytestmark = [pytest.mark.sandbox, pytest.mark.timeout(120), pytest.mark.xdist_group("sandbox")]

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
    "ten thousand triggers": "\n    hello()\n    for n in range(10000): trigger(ident=b'%d' % n)",
}


class Hostile(Bubblewrap):
    """Runs a program of the test as process 1 of the domain ``bad``; others get their agent."""

    code = ""

    async def start(self, domain, control):  # type: ignore[no-untyped-def]
        usual = self.first_process
        if domain.name == "bad":
            program = BEGIN + "    " + self.code + END
            self.first_process = ("/usr/bin/python3", "-IS", "-c", program)
        try:
            return await super().start(domain, control)
        finally:
            self.first_process = usual


@contextlib.asynccontextmanager
async def system(code: str) -> AsyncIterator[AdminVM]:
    """A system with the domains ``good``, which runs, and ``bad``."""
    root = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    paths = Paths.find(str(root))
    paths.create()
    (paths.config / "policy.d").mkdir(parents=True)
    (paths.config / "policy.d/30-test.policy").write_text("* * @anyvm @anyvm deny\n")
    uuid = "11111111-1111-4111-8111-11111111111"
    domains = [
        DomainConfig("good", 1, uuid + "1", template="host", autostart=True),
        DomainConfig("bad", 2, uuid + "2", template="host", qrexec_timeout=2),
    ]
    sandbox = Hostile(paths)
    sandbox.code = code
    policy = PolicyStore([paths.config / "policy.d"], legacy_directory=root / "none")
    adminvm = AdminVM(Registry(domains), {"bubblewrap": sandbox}, policy, paths)
    await adminvm.start()
    try:
        yield adminvm
    finally:
        await adminvm.stop()
        sandbox.close()
        remove(root)


@pytest.mark.spec("CORE-169", "CORE-180")
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_first_process(what: str) -> None:
    """Whatever comes over a control channel, the AdminVM goes on and the other domain answers."""

    async def run() -> None:
        async with system(HOSTILE[what]) as adminvm:
            with contextlib.suppress(SluiceError):
                await adminvm.start_domain("bad")
            answered = await adminvm.run("good", "echo answered", timeout=60)
            assert answered.stdout == b"answered\n"
            if adminvm.state("bad") != "Halted":
                await adminvm.stop_domain("bad", kill=True)
            assert adminvm.state("bad") == "Halted"
            answered = await adminvm.run("good", "echo again", timeout=60)
            assert answered.stdout == b"again\n"
            size = sum(entry.stat().st_size for entry in adminvm.paths.log.iterdir())
            assert size < 200_000

    asyncio.run(run())


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
def test_who_breaks_the_protocol_is_ended(what: str) -> None:
    """A control channel that has broken the protocol is closed, and its domain ended by that."""

    async def run() -> None:
        async with system(HOSTILE[what]) as adminvm:
            with contextlib.suppress(SluiceError):
                await adminvm.start_domain("bad")
            async with asyncio.timeout(60):
                while adminvm.state("bad") != "Halted":
                    await asyncio.sleep(0.01)

    asyncio.run(run())
