"""The domain's programs by themselves: start of the client, a call at the agent, its memory.

``python bench/programs.py``. The other side is a thread of this process that answers at once, so
that what is measured is the program and not its surroundings.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import Table, bare_python, spawn_true

BIN = Path(__file__).resolve().parents[1] / "src" / "sluice" / "bin"
HELLO = struct.pack("<III", 0x300, 4, 4)
ENDINGS = struct.pack("<IIIIIIi", 0x191, 0, 0x192, 0, 0x193, 4, 0)


def two_pipes() -> tuple[tuple[int, int], tuple[int, int]]:
    """Return our and their (read end, write end) of a data channel."""
    their_read, our_write = os.pipe()
    our_read, their_write = os.pipe()
    return (our_read, our_write), (their_read, their_write)


def send_pair(sock: socket.socket, data: bytes, pair: tuple[int, int]) -> None:
    """Send bytes with a pair of descriptors, which are closed."""
    socket.send_fds(sock, [data], list(pair))
    for fd in pair:
        os.close(fd)


class Answering:
    """An agent that allows every call and ends it at once."""

    def __init__(self, directory: str, transport: str) -> None:
        """Serve in a thread; ``transport`` is passed or socketdir."""
        self.path = f"{directory}/{transport}"
        self._directory = directory
        self._passed = transport == "passed"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(8)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            trigger = self._listener.accept()[0]
            trigger.recv(4096)
            if self._passed:
                (our_read, our_write), theirs = two_pipes()
                send_pair(trigger, struct.pack("<II", 1, 2), theirs)
                os.write(our_write, HELLO + ENDINGS)
                while os.read(our_read, 4096):
                    pass
                os.close(our_read)
                os.close(our_write)
            else:
                trigger.sendall(struct.pack("<II", 1, 2))
                self._join()
            trigger.close()

    def _join(self) -> None:
        path = f"{self._directory}/vchan.42.1.2.sock"
        while True:
            channel = socket.socket(socket.AF_UNIX)
            try:
                channel.connect(path)
                break
            except OSError:
                channel.close()
                time.sleep(0.0002)
        channel.sendall(HELLO + ENDINGS)
        while channel.recv(4096):
            pass
        channel.close()
        os.unlink(path)

    def client(self) -> float:
        """Return the seconds of one whole qrexec-client-vm."""
        program = str(BIN / "qrexec-client-vm")
        environment = {"VCHAN_DOMAIN": "42", "VCHAN_SOCKET_DIR": self._directory}
        null = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)]
        begun = time.perf_counter()
        pid = os.posix_spawn(
            program, [program, "-a", self.path, "vm", "s"], environment, file_actions=null
        )
        status = os.waitpid(pid, 0)[1]
        if status:
            raise RuntimeError(f"the client ended with {status}")
        return time.perf_counter() - begun


class RunningAgent:
    """A real agent over `passed`; this process is its AdminVM."""

    def __init__(self, directory: str) -> None:
        """Start it and shake hands."""
        self.socket, theirs = socket.socketpair()
        os.symlink("/bin/true", f"{directory}/bench.True")
        user = subprocess.run(["id", "-un"], capture_output=True, check=True).stdout.strip()
        self._text = user + b":QUBESRPC bench.True work\0"
        self.process = subprocess.Popen(
            [str(BIN / "qrexec-agent"), "-S", "-a", f"{directory}/agent"],
            env={
                "SLUICE_CONTROL_FD": str(theirs.fileno()),
                "SLUICE_PROCESS_DOMAIN": "1",
                "QREXEC_SERVICE_PATH": directory,
            },
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.socket.recv(12)
        self.socket.sendall(HELLO)
        self._number = 0

    def call(self) -> float:
        """Return the seconds of one call of /bin/true, to the report of its end."""
        self._number += 1
        (our_read, our_write), theirs = two_pipes()
        body = struct.pack("<II", 1, self._number) + self._text
        begun = time.perf_counter()
        send_pair(self.socket, struct.pack("<II", 0x200, len(body)) + body, theirs)
        os.write(our_write, HELLO)
        while os.read(our_read, 4096):
            pass
        os.close(our_read)
        os.close(our_write)
        self.socket.recv(16)
        return time.perf_counter() - begun

    def memory(self) -> float:
        """Return its proportional share of memory, in MiB."""
        return share_of_memory(self.process.pid)


def share_of_memory(pid: int) -> float:
    """Return the PSS of a process in MiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the kernel does not tell the share of memory")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    directory = tempfile.mkdtemp(prefix="s-", dir="/tmp")
    bare = subprocess.Popen(
        ["/usr/bin/python3", "-IS", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )
    agent = RunningAgent(directory)
    try:
        table = Table("Programs of a domain")
        table.add("python3 -I -S -c pass", "s", bare_python)
        for transport in ("passed", "socketdir"):
            table.add(
                f"qrexec-client-vm, {transport}",
                "s",
                Answering(directory, transport).client,
                reference="python3 -I -S -c pass",
                goal="<= 1.6 and the call",
            )
        table.add("spawn of /bin/true", "s", spawn_true)
        table.add("a call of it at the agent", "s", agent.call, reference="spawn of /bin/true")
        table.add("memory of an idle interpreter", "MiB", lambda: share_of_memory(bare.pid))
        table.add(
            "memory of the agent", "MiB", agent.memory, reference="memory of an idle interpreter"
        )
        table.run(rounds)
        print(table.render())
    finally:
        agent.socket.close()
        agent.process.wait(5)
        bare.communicate()
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
