"""Hostile agents against the AdminVM of a whole system: any bytes, any timing, any order.

Two domains and dom0's own clients do what they like. The AdminVM may refuse, or end a domain; never
does a task of it fail, a descriptor leak, a call stay without its one record, or another domain
suffer. Every scenario follows from its seed, which a failure names.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import stat
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.adminvm import (
    EXEC_CMDLINE,
    JUST_EXEC,
    SERVICE_CONNECT,
    TERMINATED,
    Closed,
    PlayedJudge,
    PlayedRun,
    PlayedSandbox,
    adminvm,
    domain,
    exec_body,
    hello,
    message,
    open_descriptors,
    short_directory,
    trigger3,
    trigger4,
    until,
)

from sluice.adminvm.system import AdminVM
from sluice.errors import SluiceError
from sluice.flow import spare

TARGETS = [b"a", b"b", b"c", b"dom0", b"nobody", b"@adminvm", b""]
SERVICES = [b"test.Cat", b"test.Exit+3", b"test.None", b"s" * 64999, b"", b"+"]


class Agent:
    """One run of a hostile agent."""

    def __init__(self, chance: random.Random, run: PlayedRun) -> None:
        self.chance = chance
        self.run = run
        self.sock = run.wire.sock
        self.sock.setblocking(False)
        self.calls: list[tuple[int, int]] = []
        self.fds: list[int] = []
        self._heard = b""

    def send(self, data: bytes) -> None:
        """Send in pieces of any size, as much as is taken, now and then with descriptors."""
        with contextlib.suppress(OSError):
            while data:
                size = self.chance.choice([1, 8, 100, len(data), len(data)])
                if self.chance.random() < 0.05:
                    sent = socket.send_fds(self.sock, [data[:size]], [self.sock.fileno()] * 3)
                else:
                    sent = self.sock.send(data[:size])
                data = data[sent:]

    def valid(self) -> bytes:
        """A message that is allowed, with any content."""
        if self.chance.random() < 0.3 and self.calls:
            return message(TERMINATED, exec_body(*self.chance.choice(self.calls)))
        if self.chance.random() < 0.1:
            return message(TERMINATED, exec_body(self.chance.choice([0, 7, 8]), 1024))
        fields = (
            self.chance.choice(TARGETS),
            self.chance.choice(SERVICES),
            self.chance.randbytes(5),
        )
        ident = b"ID%d" % self.chance.randrange(20)
        if self.chance.random() < 0.8:
            return trigger4(fields[0], fields[1], ident)
        return trigger3(fields[0], fields[1], fields[2])

    def hostile(self) -> bytes:
        """Bytes that may mean anything."""
        data = bytearray(self.valid())
        kind = self.chance.random()
        if kind < 0.4:
            data[self.chance.randrange(len(data))] = self.chance.randrange(256)
        elif kind < 0.6:
            data = bytearray(
                struct.pack("<II", 0x213, self.chance.choice([0, 161, 65161, 1 << 31]))
            )
        elif kind < 0.8:
            data = bytearray(hello(self.chance.choice([0, 4])))
        else:
            data = bytearray(self.chance.randbytes(50))
        return bytes(data)

    def hear(self) -> None:
        """Read what is there; note calls, and do something to their descriptors."""
        with contextlib.suppress(OSError, Closed):
            data = self.run.wire._read(1 << 16)
            self._heard += data
        while len(self._heard) >= 8:
            kind, size = struct.unpack_from("<II", self._heard)
            if len(self._heard) < 8 + size:
                break
            if kind in (EXEC_CMDLINE, JUST_EXEC, SERVICE_CONNECT):
                self.calls.append(struct.unpack_from("<II", self._heard, 8))
            self._heard = self._heard[8 + size :]
        self.fds += self.run.wire.take_fds()
        for fd in list(self.fds):
            self.torment(fd)

    def torment(self, fd: int) -> None:
        """Write to one end of a pipe, read from it, close it, or leave it for later."""
        kind = self.chance.random()
        os.set_blocking(fd, False)
        with contextlib.suppress(OSError):
            if kind < 0.3:
                greeting = hello(4) if self.chance.random() < 0.8 else self.chance.randbytes(12)
                os.write(fd, greeting + self.data())
            elif kind < 0.5:
                os.read(fd, 70000)
        if kind > 0.7:
            self.fds.remove(fd)
            os.close(fd)

    def data(self) -> bytes:
        """What a caller or a service may say, and what not."""
        return self.chance.choice(
            [
                message(0x190, b"x" * 100) + message(0x190),
                message(0x191) + message(0x192) + message(0x193, bytes(4)),
                message(0x190, b"x" * 65536)[:1000],
                struct.pack("<II", 0x190, 65537),
                b"",
            ]
        )

    def leave(self) -> None:
        """Let go of everything."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


class Scenario:
    """One run of two hostile agents and of dom0's clients."""

    def __init__(self, directory: Path, system: AdminVM, box: PlayedSandbox, seed: int) -> None:
        self.chance = random.Random(seed)
        self.directory = directory
        self.system = system
        self.box = box
        self.agents: dict[str, Agent] = {}
        self.clients: list[socket.socket] = []
        self.tasks: list[asyncio.Task[Any]] = []

    async def agent(self) -> Agent:
        """One of the two, started (again) if need be."""
        name = self.chance.choice("ab")
        if self.system.state(name) != "Running":
            await self.system.start_domain(name)
        run, agent = self.box.runs[name], self.agents.get(name)
        if agent is None or agent.run is not run:
            if agent is not None:
                agent.leave()
            agent = self.agents[name] = Agent(self.chance, run)
        return agent

    def name_of(self, agent: Agent) -> str:
        """Which of the two it is."""
        return next(name for name, one in self.agents.items() if one is agent)

    async def act(self) -> None:
        """Do one thing."""
        agent = await self.agent()
        kind = self.chance.random()
        if kind < 0.45:
            agent.send(agent.valid())
        elif kind < 0.5:
            agent.send(b"".join(agent.valid() for _ in range(self.chance.randrange(300))))
        elif kind < 0.53:
            agent.send(agent.hostile())
        elif kind < 0.8:
            agent.hear()
        elif kind < 0.84:
            self.client()
        elif kind < 0.88:
            self.call()
        elif kind < 0.9:
            with contextlib.suppress(OSError):
                agent.sock.shutdown(self.chance.choice([socket.SHUT_RD, socket.SHUT_WR]))
        elif kind < 0.92:
            agent.run.end()
        elif kind < 0.93:
            with contextlib.suppress(SluiceError):
                await self.system.stop_domain(self.name_of(agent), kill=self.chance.random() < 0.5)
        for _ in range(self.chance.randrange(4)):
            await asyncio.sleep(0)

    def client(self) -> None:
        """A local client of dom0's, of any quality."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.clients.append(sock)
        kind = self.chance.choice([EXEC_CMDLINE, JUST_EXEC, SERVICE_CONNECT, 9])
        body = exec_body(self.chance.choice([0, 0, 7]), self.chance.choice([0, 0, 513]), b"u:x\0")
        with contextlib.suppress(OSError):
            sock.connect(str(self.system.paths.daemon_dir / f"qrexec.{self.chance.choice('ab')}"))
            sock.send(hello(3) + message(kind, body))
            if self.chance.random() < 0.5:
                sock.close()

    def call(self) -> None:
        """A call from within this process, given up some time later."""

        async def one() -> None:
            with contextlib.suppress(SluiceError, TimeoutError):
                await self.system.run(self.chance.choice("ab"), "x", timeout=0.2)

        self.tasks.append(asyncio.ensure_future(one()))

    async def finish(self) -> None:
        """Let go of everything, and see that the third domain is served."""
        for agent in self.agents.values():
            agent.leave()
        for sock in self.clients:
            sock.close()
        call = self.system.dispatcher.open(self.system.run_of("c"), b"u:still here")  # type: ignore[arg-type]
        os.close(call.read_fd)
        os.close(call.write_fd)
        body = b""
        while b"still here" not in body:
            _, body, fds = await self.box.runs["c"].receive()
            for fd in fds:
                os.close(fd)
        await asyncio.gather(*self.tasks)


def streams() -> set[int]:
    """The pipes and sockets of this process; but for those that are kept for the next call."""
    kinds = (stat.S_IFIFO, stat.S_IFSOCK)
    kept = {fd for pipe in spare._pipes for fd in pipe}
    return {fd for fd in open_descriptors() - kept if stat.S_IFMT(os.fstat(fd).st_mode) in kinds}


async def scenario(seed: int, directory: Path) -> None:
    wrong: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: wrong.append(context))
    judge, box = PlayedJudge(), PlayedSandbox()
    for name in ("a", "b", "c", "dom0"):
        judge.allow(name, autostart=name != "b")
    judge.allow("@adminvm", to="dom0")
    domains = [domain(name, 7 + n, "played") for n, name in enumerate("abc")]
    before = streams()
    async with adminvm(directory, domains, box, judge) as system:
        for name, script in (("test.Cat", "exec cat"), ("test.Exit", "exit $1")):
            path = directory / "config/rpc" / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        await system.start_domain("c")
        it = Scenario(directory, system, box, seed)
        for _ in range(it.chance.randrange(20, 150)):
            await it.act()
        await it.finish()
    assert len(system.dispatcher.numbers) == 0
    assert system._audit is not None
    assert not system._audit._journal._begun  # each call that began has its record
    await until(lambda: streams() <= before, "all pipes and sockets to be closed")
    assert not wrong, wrong
    lines = (directory / "state/log/audit.jsonl").read_text().splitlines()
    records = Counter(json.loads(line)["id"] for line in lines)
    del records[0]
    assert set(records.values()) <= {1}


def play(seed: int, said: Callable[[], str]) -> None:
    async def main() -> None:
        with short_directory() as directory:
            async with asyncio.timeout(60):
                await scenario(seed, directory)

    asyncio.run(main())
    text = said()
    assert "Traceback" not in text, text
    assert "\x1b" not in text


@pytest.mark.parametrize("seed", range(30))
def test_hostile_agents_of_a_system(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    play(seed, lambda: capfd.readouterr().err)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_hostile_agents_of_a_system_for_a_long_time(capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(1000, 4000):
        try:
            play(seed, lambda: capfd.readouterr().err)
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
