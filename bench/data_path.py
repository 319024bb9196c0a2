"""The data path of a call: writer | caller | service | reader over `passed`, against a plain pipe.

Each end is a process of its own, as in a real call between two domains. The clock begins when both
have shaken hands: what an interpreter costs to start is measured elsewhere. The reference is the
shell's ``head -c N /dev/zero | cat > /dev/null`` of the same size, taken in the same round.

    python bench/data_path.py [MIB] [ROUNDS]
"""

from __future__ import annotations

import os
import socket
import sys
import time

# The descriptor on which a child says that it is ready.
READY = 190

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = "/usr/bin/python3"


def ready() -> None:
    """Tell the parent that this child is ready."""
    os.write(READY, b"x")
    os.close(READY)


def end_of_call(kind: str, numbers: list[int]) -> int:
    """Run one end of a call on descriptors (read end, write end, IN, OUT); the child process."""
    from sluice.flow.channel import DataChannel
    from sluice.flow.reactor import Reactor

    loop = Reactor()
    results: list[int] = []

    def done(status: int) -> None:
        results.append(status)
        loop.stop()

    def fatal(reason: str) -> None:
        print(kind, reason, file=sys.stderr)
        done(1)

    read_fd, write_fd, in_fd, out_fd = numbers
    channel = DataChannel(
        loop,
        read_fd,
        write_fd,
        caller=kind == "caller",
        in_fd=in_fd,
        out_fd=out_fd,
        on_done=done,
        on_fatal=fatal,
        on_open=ready,
    )
    channel.start()
    loop.run()
    return results[0]


def relay(kind: str, numbers: list[int]) -> int:
    """Run one pump between two descriptors; the child process."""
    from sluice.flow.pump import Pump
    from sluice.flow.reactor import Reactor

    loop = Reactor()
    ready()
    look = {"splice": None, "inspect": lambda piece: None}[kind]
    Pump(loop, numbers[0], numbers[1], on_end=lambda pump: loop.stop(), inspect=look).start()
    loop.run()
    return 0


class Pipeline:
    """Processes joined by descriptors, started together and waited for together."""

    def __init__(self) -> None:
        """Begin empty."""
        self.pids: list[int] = []
        self.fds: list[int] = []
        self.ready, self._ready_write = self.pipe()
        self._children = 0

    def pipe(self) -> tuple[int, int]:
        """Make a pipe that the next processes may inherit."""
        pair = os.pipe2(os.O_CLOEXEC)
        self.fds += pair
        return pair

    def socketpair(self) -> tuple[int, int]:
        """Make a pair of sockets in the place of a pipe."""
        one, other = socket.socketpair()
        pair = (one.detach(), other.detach())
        self.fds += pair
        return pair

    def spawn(self, arguments: list[str], stdin: int, stdout: int) -> None:
        """Start a program with these as its standard descriptors."""
        actions = [
            (os.POSIX_SPAWN_DUP2, stdin, 0),
            (os.POSIX_SPAWN_DUP2, stdout, 1),
        ]
        self.pids.append(os.posix_spawnp(arguments[0], arguments, os.environ, file_actions=actions))

    def python(self, what: str, kind: str, numbers: list[int]) -> None:
        """Start this file as a child that works on ``numbers``."""
        actions = [(os.POSIX_SPAWN_DUP2, self._ready_write, READY)]
        self._children += 1
        # Passed under numbers above everything that this process has open.
        for index, number in enumerate(numbers):
            actions.append((os.POSIX_SPAWN_DUP2, number, 200 + index))
        arguments = [PYTHON, "-IS", os.path.abspath(__file__), what, kind]
        arguments += [str(200 + index) for index in range(len(numbers))]
        self.pids.append(os.posix_spawn(PYTHON, arguments, os.environ, file_actions=actions))

    def until_ready(self) -> float:
        """Wait until every child said that it is ready; return the time."""
        os.close(self._ready_write)
        self.fds.remove(self._ready_write)
        for _ in range(self._children):
            os.read(self.ready, 1)
        return time.perf_counter()

    def wait(self, begin: float) -> float:
        """Wait for all; return the seconds since ``begin``. Raises where one failed."""
        for fd in self.fds:
            os.close(fd)
        for pid in self.pids:
            _, status = os.waitpid(pid, 0)
            if status:
                raise RuntimeError(f"a process of the pipeline ended with {status}")
        return time.perf_counter() - begin


def writer(size: int, block: int) -> list[str]:
    """Return a program that writes ``size`` bytes in blocks of ``block``."""
    if block >= 65536:
        return ["head", "-c", str(size), "/dev/zero"]
    return ["dd", "if=/dev/zero", f"bs={block}", f"count={size // block}", "status=none"]


def plain(size: int, block: int, relays: int = 0) -> float:
    """Bytes a second of writer | [cat ...] | cat."""
    line = Pipeline()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    line.fds.append(null)
    begin = time.perf_counter()
    read_fd, write_fd = line.pipe()
    line.spawn(writer(size, block), null, write_fd)
    for _ in range(relays):
        following = line.pipe()
        line.spawn(["cat"], read_fd, following[1])
        read_fd = following[0]
    line.spawn(["cat"], read_fd, null)
    return size / line.wait(begin)


def framed(size: int, block: int, direction: str, *, sockets: bool = False) -> float:
    """Bytes a second through caller and service in one direction.

    sockets: the command's streams are socket pairs, as an agent makes them; else pipes.
    """
    from sluice.vchan.passed import make_pair

    line = Pipeline()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    line.fds.append(null)
    source = line.socketpair() if sockets and direction == "down" else line.pipe()
    sink = line.socketpair() if sockets and direction == "up" else line.pipe()
    first, second = make_pair()
    line.fds += [*first, *second]
    if direction == "up":
        line.python("end", "caller", [*first, null, source[0]])
        line.python("end", "service", [*second, sink[1], null])
    else:
        line.python("end", "caller", [*first, sink[1], null])
        line.python("end", "service", [*second, null, source[0]])
    begin = line.until_ready()
    line.spawn(writer(size, block), null, source[1])
    line.spawn(["cat"], sink[0], null)
    return size / line.wait(begin)


def pumped(size: int, kind: str) -> float:
    """Bytes a second through one pump: writer | pump | reader."""
    line = Pipeline()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    line.fds.append(null)
    source, sink = line.pipe(), line.pipe()
    line.python("relay", kind, [source[0], sink[1]])
    begin = line.until_ready()
    line.spawn(writer(size, 65536), null, source[1])
    line.spawn(["cat"], sink[0], null)
    return size / line.wait(begin)


def main() -> None:
    """Measure and print."""
    from bench.measure import MIB, Table

    size = (int(sys.argv[1]) if len(sys.argv) > 1 else 1024) * MIB
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    table = Table(f"data path, {size // MIB} MiB")
    table.add("head | cat", "B/s", lambda: plain(size, 65536))
    table.add("head | cat | cat | cat", "B/s", lambda: plain(size, 65536, 2))
    for direction, words in (("up", "caller to service"), ("down", "service to caller")):
        table.add(
            f"framed, {words}",
            "B/s",
            lambda d=direction: framed(size, 65536, d),
            reference="head | cat",
            goal="0.5",
        )
        table.add(
            f"framed on sockets, {words}",
            "B/s",
            lambda d=direction: framed(size, 65536, d, sockets=True),
            reference="head | cat",
            goal="0.5",
        )
    table.add("pump, splice", "B/s", lambda: pumped(size, "splice"), reference="head | cat")
    table.add("pump, inspect", "B/s", lambda: pumped(size, "inspect"), reference="head | cat")
    small = size // 16
    table.add("dd bs=512 | cat", "B/s", lambda: plain(small, 512))
    for direction in ("up", "down"):
        table.add(
            f"framed, 512 bytes a write, {direction}",
            "B/s",
            lambda d=direction: framed(small, 512, d),
            reference="dd bs=512 | cat",
            goal="0.33",
        )
    table.run(rounds)
    print(table.render())


if __name__ == "__main__":
    sys.path.insert(0, os.path.join(ROOT, "src"))
    if len(sys.argv) > 2 and sys.argv[1] in ("end", "relay"):
        run = end_of_call if sys.argv[1] == "end" else relay
        sys.exit(run(sys.argv[2], [int(number) for number in sys.argv[3:]]))
    sys.path.insert(0, ROOT)
    main()
