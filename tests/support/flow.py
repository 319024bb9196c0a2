"""What the tests of the data path share: loops to drive, and ends of pipes that a test plays."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sluice.flow import hangup
from sluice.flow.channel import DataChannel
from sluice.flow.reactor import Reactor
from sluice.vchan.passed import make_pair
from sluice.wire import messages as m

DEADLINE = 20.0


class Driver:
    """A loop that a test turns until something is true."""

    def __init__(self, kind: str = "reactor") -> None:
        self.kind = kind
        self.loop: Any = Reactor() if kind == "reactor" else asyncio.new_event_loop()

    def until(self, condition: Callable[[], object], seconds: float = DEADLINE) -> None:
        """Serve events until ``condition()``; fail the test after ``seconds``."""
        end = time.monotonic() + seconds
        while not condition():
            left = end - time.monotonic()
            assert left > 0, "nothing happened in time"
            self.turn(left)

    def turn(self, limit: float) -> int:
        """Serve one round of events, waiting at most ``limit`` seconds for them."""
        if self.kind == "reactor":
            return self.loop.run_once(limit)
        handle = self.loop.call_later(min(limit, 0.002), self.loop.stop)
        self.loop.run_forever()
        handle.cancel()
        return 1

    def quiet(self) -> None:
        """Serve events until there are none."""
        if self.kind == "reactor":
            # A callback may have asked for the next round (call_soon), so twice nothing.
            idle = 0
            while idle < 2:
                idle = 0 if self.loop.run_once(0) else idle + 1
        else:
            for _ in range(6):
                self.loop.call_soon(self.loop.stop)
                self.loop.run_forever()

    def close(self) -> None:
        """Close the loop, and the epoll beside an asyncio one, which would go with the garbage."""
        if self.kind == "asyncio":
            hangup.of(self.loop)._epoll.close()
        self.loop.close()


class End:
    """A descriptor (or two) that the test plays: collects what comes, writes what it is told."""

    def __init__(self, driver: Driver, read_fd: int = -1, write_fd: int = -1) -> None:
        self.driver = driver
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.received = bytearray()
        self.eof = False
        self.reading = False
        self.unsent = bytearray()
        self.broken = False
        self.closing = False
        for fd in {read_fd, write_fd} - {-1}:
            os.set_blocking(fd, False)
        if read_fd >= 0:
            self.listen()

    def listen(self) -> None:
        """Read from now on."""
        if not self.reading and self.read_fd >= 0 and not self.eof:
            self.reading = True
            self.driver.loop.add_reader(self.read_fd, self._read)

    def deafen(self) -> None:
        """Stop reading."""
        if self.reading:
            self.reading = False
            self.driver.loop.remove_reader(self.read_fd)

    def _read(self) -> None:
        try:
            data = os.read(self.read_fd, 1 << 20)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if data:
            self.received += data
        else:
            self.eof = True
            self.deafen()

    def write(self, data: bytes) -> None:
        """Write all of it, as the other side takes it."""
        self.unsent += data
        self._write()

    def _write(self) -> None:
        while self.unsent and self.write_fd >= 0:
            try:
                count = os.write(self.write_fd, self.unsent[: 1 << 20])
            except BlockingIOError:
                self.driver.loop.add_writer(self.write_fd, self._write)
                return
            except OSError:
                self.broken = True
                self.unsent.clear()
                break
            del self.unsent[:count]
        if self.write_fd >= 0:
            self.driver.loop.remove_writer(self.write_fd)
            if self.closing:
                self.close_write()

    def end(self) -> None:
        """Close the writing side once all is written."""
        self.closing = True
        self._write()

    def close_write(self) -> None:
        """End writing at once."""
        if self.write_fd < 0:
            return
        self.driver.loop.remove_writer(self.write_fd)
        if self.write_fd == self.read_fd:
            with socket.socket(fileno=os.dup(self.write_fd)) as sock:
                sock.shutdown(socket.SHUT_WR)
        else:
            os.close(self.write_fd)
        self.write_fd = -1

    def close_read(self) -> None:
        """End reading at once."""
        self.deafen()
        if self.read_fd >= 0 and self.read_fd != self.write_fd:
            os.close(self.read_fd)
        self.read_fd = -1

    def close(self) -> None:
        """Go away."""
        self.deafen()
        if self.write_fd >= 0:
            self.driver.loop.remove_writer(self.write_fd)
        for fd in {self.read_fd, self.write_fd} - {-1}:
            os.close(fd)
        self.read_fd = self.write_fd = -1


class Peer(End):
    """The other side of a data channel, played message by message."""

    def __init__(self, driver: Driver, read_fd: int, write_fd: int) -> None:
        super().__init__(driver, read_fd, write_fd)

    @property
    def messages(self) -> list[tuple[int, bytes]]:
        """The whole messages that came so far."""
        found, at = [], 0
        while len(self.received) - at >= 8:
            kind, size = m.HEADER.unpack_from(self.received, at)
            if len(self.received) - at - 8 < size:
                break
            found.append((kind, bytes(self.received[at + 8 : at + 8 + size])))
            at += 8 + size
        return found

    def kinds(self) -> list[int]:
        """The types of the messages that came, payload messages of one stream folded into one."""
        folded: list[tuple[int, bool]] = []
        for kind, body in self.messages:
            entry = (kind, bool(body))
            if not folded or folded[-1] != entry or not body:
                folded.append(entry)
        return [kind for kind, _ in folded]

    def stream(self, kind: int) -> bytes:
        """The payload of one stream."""
        return b"".join(body for number, body in self.messages if number == kind)

    def ended(self, kind: int) -> bool:
        """Whether the end-of-file of a stream came."""
        return (kind, b"") in self.messages

    def send(self, kind: int, body: bytes = b"") -> None:
        """Send a message."""
        self.write(m.encode(kind, body))

    def hello(self, version: int = 4) -> None:
        """Send HELLO."""
        self.write(m.encode_hello(version))

    def exit_code(self) -> int | None:
        """The exit code that came, if one did."""
        for kind, body in self.messages:
            if kind == m.DATA_EXIT_CODE:
                return m.I32.unpack(body)[0]
        return None


class Call:
    """One end under test, with everything around it played by the test."""

    def __init__(
        self,
        driver: Driver,
        *,
        caller: bool,
        transport: str = "passed",
        stdin: str = "pipe",
        stdout: str = "pipe",
        stderr: bool = True,
        version: int | None = 4,
        late: bool = False,
        err_fd: int = -1,
        **options: Any,
    ) -> None:
        self.driver = driver
        self.results: list[int] = []
        self.fatals: list[str] = []
        self.warnings: list[str] = []
        if transport == "passed":
            (own_r, own_w), (peer_r, peer_w) = make_pair()
        else:
            ours, theirs = socket.socketpair()
            own_r = own_w = ours.detach()
            peer_r = peer_w = theirs.detach()
        self.peer = Peer(driver, peer_r, peer_w)
        self.stdin, in_fd = self._taking(stdin)
        if stdout == "same":
            out_fd = in_fd
            self.stdout = self.stdin
        else:
            self.stdout, out_fd = self._giving(stdout)
        self.stderr = End(driver)
        if stderr and not caller:
            self.stderr, err_fd = self._giving("pipe")
        self.streams = (in_fd, out_fd, err_fd)
        given = {"in_fd": in_fd, "out_fd": out_fd, "err_fd": err_fd} if not late else {}
        if late and "on_open" not in options:
            process = options.pop("has_process", False)
            options["on_open"] = lambda: self.channel.attach(*self.streams, has_process=process)
        options.setdefault("on_warning", self.warnings.append)
        self.channel = DataChannel(
            driver.loop,
            own_r,
            own_w,
            caller=caller,
            on_done=self.results.append,
            on_fatal=self.fatals.append,
            **given,
            **options,
        )
        if version is not None:
            self.peer.hello(version)
            self.channel.start()
            driver.until(lambda: self.channel.opened or self.fatals)

    def _taking(self, kind: str) -> tuple[End, int]:
        """Make a descriptor that takes what the other side sends, and the test's end of it."""
        if kind == "pipe":
            read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
            return End(self.driver, read_fd), write_fd
        ours, theirs = socket.socketpair()
        fd = theirs.detach()
        return End(self.driver, fd, fd), ours.detach()

    def _giving(self, kind: str) -> tuple[End, int]:
        """Make a descriptor out of which the channel reads, and the test's end of it."""
        if kind == "pipe":
            read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
            return End(self.driver, -1, write_fd), read_fd
        ours, theirs = socket.socketpair()
        fd = theirs.detach()
        return End(self.driver, fd, fd), ours.detach()

    @property
    def over(self) -> bool:
        """Whether the end under test has told its result."""
        return bool(self.results or self.fatals)

    def finish(self, seconds: float = DEADLINE) -> int:
        """Wait for the result; fail when it is a fatal error."""
        self.driver.until(lambda: self.over, seconds)
        self.driver.quiet()
        assert not self.fatals
        assert len(self.results) == 1
        return self.results[0]

    def fatal(self, seconds: float = DEADLINE) -> str:
        """Wait for a fatal error and return it."""
        self.driver.until(lambda: self.over, seconds)
        self.driver.quiet()
        assert not self.results
        assert len(self.fatals) == 1
        return self.fatals[0]

    def close(self) -> None:
        """Close what the test played, and the end under test."""
        self.channel.close()
        for end in {self.peer, self.stdin, self.stdout, self.stderr}:
            end.close()


def open_fds() -> set[str]:
    """Return this process's open descriptors, with what they are."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name}:{os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue
    return found


def count_fds(*, collect: bool = False) -> int:
    """Return the number of open descriptors, without those that the engines keep to reuse.

    collect: first let go of what earlier tests left to the collector.
    """
    from sluice.flow import spare

    if collect:
        gc.collect()
    return len(os.listdir("/proc/self/fd")) - 2 * len(spare._pipes)


@contextmanager
def no_leak() -> Iterator[None]:
    """Check that as many descriptors are open afterwards as before."""
    before = count_fds(collect=True)
    yield
    assert count_fds() == before


def pattern(size: int, seed: int = 0) -> bytes:
    """Return bytes that show where they were cut or swapped."""
    word = b"".join((number + seed).to_bytes(4, "big") for number in range(4096))
    return (word * (size // len(word) + 1))[:size]
