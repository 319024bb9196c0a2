"""A hostile agent against the real qrexec-daemon: any bytes, any timing, any order.

Whatever it does may end only in refusals or in the end of that connection: the daemon exits with 1
and has removed its sockets, or it still serves local clients. Never does it fail in another way.
Every scenario follows from its seed, which a failure names.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading

import pytest
from tests.support.adminvm import (
    EXEC_CMDLINE,
    SERVICE_CONNECT,
    TERMINATED,
    Wire,
    exec_body,
    hello,
    message,
    trigger2,
    trigger3,
    trigger4,
    wait_until,
)
from tests.support.qrexec_daemon import DaemonHarness, allow, harness

REPLIES = [
    b"result=deny",
    b"",
    b"\0" * 10,
    b"result=allow",
    b"x" * 5000,
    allow(target="dom0"),
    allow(target="@adminvm", requested_target="@adminvm"),
    allow(target="nobody"),
    allow(target="../x"),
    allow(target="@dispvm:x", autostart="True"),
    allow(user="a\rb", service="s\x1b"),
]


class Policy:
    """A policy daemon that answers at random, sometimes late, sometimes not at all."""

    def __init__(self, daemon: DaemonHarness, chance: random.Random) -> None:
        self._listener = daemon.policy()
        self._chance = chance
        self._held: list[socket.socket] = []
        self._closing = False
        self._listener.settimeout(0.02)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closing:
            with contextlib.suppress(OSError):
                conn = self._listener.accept()[0]
                conn.settimeout(0.2)
                self._held.append(conn)
                conn.recv(70000)
                if self._chance.random() < 0.9:
                    conn.sendall(self._chance.choice(REPLIES))
                    conn.close()

    def close(self) -> None:
        self._closing = True
        self._thread.join(5)
        for conn in self._held:
            conn.close()


class Scenario:
    """One run of a hostile agent and of local clients that are no better."""

    def __init__(self, daemon: DaemonHarness, seed: int) -> None:
        self.daemon = daemon
        self.chance = random.Random(seed)
        self.version = self.chance.choice([2, 3, 4, 4, 4])
        self.agent: Wire | None = None

    def text(self, most: int) -> bytes:
        kind = self.chance.random()
        size = self.chance.randrange(most)
        if kind < 0.5:
            return bytes(self.chance.choices(b"abc.+-_@: $\0", k=size))
        return self.chance.randbytes(size)

    def valid(self) -> bytes:
        """A message that this version allows, with any content."""
        kind = self.chance.random()
        if kind < 0.25:
            port = self.chance.choice([513, 514, 515, 768, 600])
            return message(TERMINATED, exec_body(self.chance.choice([0, 42, 43]), port))
        fields = (self.text(70), self.text(40) or b"s", self.text(34))
        if self.version == 4:
            return trigger4(*fields, source=self.text(70))
        if self.version == 3:
            return trigger3(*fields)
        return trigger2(fields[0][:32], fields[1], fields[2][:32])

    def hostile(self) -> bytes:
        """Bytes that may mean anything."""
        kind = self.chance.random()
        data = bytearray(self.valid())
        if kind < 0.3:
            for _ in range(self.chance.randrange(1, 4)):
                data[self.chance.randrange(len(data))] = self.chance.randrange(256)
        elif kind < 0.5:
            data = data[: self.chance.randrange(len(data))]
        elif kind < 0.7:
            size = self.chance.choice([0, 4, 8, 161, 65160, 65161, 0xFFFFFFFF])
            data = bytearray(struct.pack("<II", self.chance.choice([0x210, 0x212, 0x213, 9]), size))
        elif kind < 0.85:
            data = bytearray(self.chance.choice([hello(4), hello(0), message(EXEC_CMDLINE, b"x")]))
        else:
            data = bytearray(self.chance.randbytes(self.chance.randrange(1, 300)))
        return bytes(data)

    def client(self) -> None:
        """A local client of any quality."""
        with contextlib.suppress(OSError):
            client = self.daemon.local(version=self.chance.choice([3, 3, 3, 2, 9]))
            client.send(
                self.chance.choice(
                    [
                        message(EXEC_CMDLINE, exec_body(0, 0, b"DEFAULT:x\0")),
                        message(EXEC_CMDLINE, exec_body(43, 0, b"u:x\0")),
                        message(SERVICE_CONNECT, exec_body(43, 514, b"SOCKET12\0")),
                        message(SERVICE_CONNECT, exec_body(0, 0, self.text(32) + b"\0")),
                        self.chance.randbytes(30),
                    ]
                )
            )

    def run(self) -> None:
        """Act; returns when the daemon has ended or the script is over."""
        daemon = self.daemon
        self.agent = daemon.start(self.version)
        for _ in range(self.chance.randrange(3, 25)):
            assert daemon.process is not None
            if daemon.process.poll() is not None:
                return
            kind = self.chance.random()
            with contextlib.suppress(OSError):
                if kind < 0.6:
                    self.send(self.valid())
                elif kind < 0.68:
                    self.send(self.hostile())
                elif kind < 0.95:
                    with contextlib.suppress(Exception):
                        self.client()
                else:
                    self.restart()

    def restart(self) -> None:
        """Close the control channel and be a new agent, if the daemon comes back for one."""
        daemon = self.daemon
        daemon.listen()
        assert daemon.control is not None
        assert daemon.process is not None
        assert self.agent is not None
        daemon.control.settimeout(0.02)
        self.agent.close()
        self.version = self.chance.choice([2, 3, 4])
        while daemon.process.poll() is None:
            with contextlib.suppress(TimeoutError):
                self.agent = daemon.greet(self.version)
                return

    def send(self, data: bytes) -> None:
        """Send in pieces of any size."""
        assert self.agent is not None
        while data:
            size = self.chance.choice([1, 7, 8, 50, len(data)])
            self.agent.send(data[:size])
            data = data[size:]

    def judge(self) -> None:
        """The daemon has ended properly, or it serves."""
        daemon = self.daemon
        assert daemon.process is not None
        assert self.agent is not None

        def outcome() -> str | None:
            if daemon.process is not None and daemon.process.poll() is not None:
                return "ended"
            try:
                client = daemon.request(b"user:still here\0", 0)
                client.expect(EXEC_CMDLINE)
            except Exception:
                return None
            return "serves"

        serves = wait_until(outcome, "the daemon to serve or to end") == "serves"
        if serves:
            daemon.process.terminate()
        status = daemon.ended()
        assert daemon.process.stderr is not None
        said = daemon.process.stderr.read()
        # What the agent had sent last may be read only after we were served.
        broken = b"the agent broke the protocol: " in said
        assert status == (1 if broken or not serves else 0), said.decode()
        assert not daemon.names()
        assert b"Traceback" not in said, said.decode()
        assert b"\x1b" not in said


def play(seed: int) -> None:
    with harness() as daemon:
        policy = Policy(daemon, random.Random(seed))
        try:
            scenario = Scenario(daemon, seed)
            scenario.run()
            scenario.judge()
        finally:
            policy.close()


@pytest.mark.parametrize("seed", range(40))
def test_a_hostile_agent_of_the_daemon(seed: int) -> None:
    play(seed)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_hostile_agents_of_the_daemon_for_a_long_time() -> None:
    for seed in range(1000, 4000):
        try:
            play(seed)
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
