"""``sluice run`` and ``sluice shell``: what they began in a domain ends when they do."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.sandbox import wait_for
from tests.support.system import Running, System, descendants, make_system

pytestmark = [pytest.mark.sandbox]

DEADLINE = 30.0
SYSTEM = '[system]\nkind = "bubblewrap"\n[domains.a]\nautostart = true\n'


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with make_system(SYSTEM, "", {}) as system, system.up() as running:
        yield running


def sleepers(running: Running, seconds: str) -> list[int]:
    """Return the processes of the system's domains that sleep for so long."""
    wanted = f"sleep\0{seconds}\0".encode()
    return [pid for pid in descendants(running.pid) if command_line(pid) == wanted]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def until_there(running: Running, seconds: str, count: int = 1) -> None:
    end = time.monotonic() + DEADLINE
    while len(sleepers(running, seconds)) < count:
        assert time.monotonic() < end
        select.select([], [], [], 0.02)


def until_gone(running: Running, seconds: str) -> None:
    end = time.monotonic() + DEADLINE
    while left := sleepers(running, seconds):
        assert time.monotonic() < end, f"{left} are still there"
        select.select([], [], [], 0.02)


def begin(running: Running, seconds: str, first: str = "") -> subprocess.Popen[bytes]:
    """Run two sleeping processes in the domain, and return once they are there."""
    process = running.start("a", f"{first} sleep {seconds} & echo ready; sleep {seconds}")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    until_there(running, seconds, 2)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_an_interrupted_command_ends_in_the_domain_too(running: Running, number: int) -> None:
    process = begin(running, f"90{number}")
    process.send_signal(number)
    assert process.wait(DEADLINE) == -number
    until_gone(running, f"90{number}")


def test_also_while_its_input_is_not_read(running: Running) -> None:
    process = begin(running, "910")
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    for _ in range(20):
        _, writable, _ = select.select([], [process.stdin], [], 0.2)
        if not writable:
            break
        os.write(process.stdin.fileno(), bytes(65536))
    process.kill()
    process.wait(DEADLINE)
    until_gone(running, "910")


def test_the_end_of_its_input_ends_nothing(running: Running) -> None:
    done = running.system.sluice(
        "run", "a", "--", "sh", "-c", "cat; sleep 0.3; echo done", input="x\n"
    )
    assert (done.returncode, done.stdout) == (0, "x\ndone\n")


def test_what_made_a_session_of_its_own_stays(running: Running) -> None:
    process = begin(running, "920", "setsid sleep 921 </dev/null >/dev/null 2>&1 &")
    until_there(running, "921")  # which setsid executes when it has the session
    process.kill()
    process.wait(DEADLINE)
    until_gone(running, "920")
    assert sleepers(running, "921")


def test_output_that_nobody_takes_ends_it(running: Running) -> None:
    process = running.start("a", "sleep 930 & exec yes")
    assert process.stdout is not None
    assert process.stdout.readline() == b"y\n"
    until_there(running, "930")
    process.stdout.close()
    assert process.wait(DEADLINE) == -signal.SIGPIPE
    until_gone(running, "930")


def test_without_further_output_it_goes_on(running: Running) -> None:
    """As in a pipe of the host: only who writes learns that nobody reads."""
    process = running.start("a", "echo one; read line; echo $line > noted")
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"one\n"
    process.stdout.close()
    process.stdin.write(b"two\n")
    process.stdin.close()
    assert process.wait(DEADLINE) == 0
    assert running.run("a", "cat noted") == (0, "two\n")


class Terminal:
    """A command of ``sluice`` on a terminal of the test's own."""

    def __init__(self, system: System, *words: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            system.command(*words),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=system.environment,
            start_new_session=True,
        )
        os.close(slave)
        self.shown = b""

    def until(self, text: bytes) -> None:
        """Read what is shown until ``text`` is there."""
        end = time.monotonic() + DEADLINE
        while text not in self.shown:
            readable, _, _ = select.select([self.master], [], [], max(end - time.monotonic(), 0))
            assert readable, self.shown
            self.shown += os.read(self.master, 65536)

    def close(self) -> None:
        """Hang up, and end the command where that did not."""
        os.close(self.master)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_on_a_terminal_too(running: Running, number: int) -> None:
    seconds = f"94{number}"
    script = f"printf '\\033[8m'; echo ready; exec sleep {seconds}"
    terminal = Terminal(running.system, "run", "a", "--", "sh", "-c", script)
    try:
        terminal.until(b"ready")
        until_there(running, seconds)
        terminal.process.send_signal(number)
        assert terminal.process.wait(DEADLINE) == -number
        if number != signal.SIGKILL:
            terminal.until(b"\x1b[0m")  # what the domain hid is shown again
        until_gone(running, seconds)
    finally:
        terminal.close()


@pytest.mark.parametrize("flood", ["", "yes &"])
def test_a_shell_ends_with_its_terminal(running: Running, flood: str) -> None:
    seconds = f"95{len(flood)}"
    terminal = Terminal(running.system, "shell", "a")
    try:
        os.write(terminal.master, f"{flood} echo rea''dy; sleep {seconds}\n".encode())
        terminal.until(b"ready")
        until_there(running, seconds)
        terminal.process.kill()
        terminal.process.wait(DEADLINE)
        until_gone(running, seconds)
    finally:
        terminal.close()


def test_a_terminated_shell_gives_the_terminal_back(running: Running) -> None:
    import termios

    terminal = Terminal(running.system, "shell", "a")
    try:
        os.write(terminal.master, b"echo rea''dy; sleep 960\n")
        terminal.until(b"ready")
        until_there(running, "960")
        assert not termios.tcgetattr(terminal.master)[3] & termios.ICANON
        terminal.process.terminate()
        assert terminal.process.wait(DEADLINE) == -signal.SIGTERM
        assert termios.tcgetattr(terminal.master)[3] & termios.ICANON
        until_gone(running, "960")
    finally:
        terminal.close()


def test_the_record_has_the_command_as_it_was_typed(running: Running) -> None:
    assert running.system.sluice("run", "a", "--", "echo", "as typed").stdout == "as typed\n"

    def commands() -> list[str]:
        log = running.system.sluice("log", "--json", "--calls", "-n", "9").stdout
        return [json.loads(line)["command"] for line in log.splitlines()]

    # Written when both sides have told of the end, which those who called do not wait for.
    wait_for(lambda: "echo 'as typed'" in commands())


def test_a_person_is_told_where_to_look_when_nothing_was_started(running: Running) -> None:
    terminal = Terminal(running.system, "run", "-u", "nobody-there", "a", "--", "id")
    try:
        assert terminal.process.wait(DEADLINE) == 125
        terminal.until(b"`sluice log --domain a` says why")
        text = "a command: there is no user 'nobody-there' here"
        wait_for(lambda: text in running.system.sluice("log", "--domain", "a").stdout)
    finally:
        terminal.close()


def test_what_is_typed_and_not_read_does_not_stop_the_output(running: Running) -> None:
    terminal = Terminal(running.system, "shell", "--raw", "a")
    try:
        terminal.until(b"$ ")
        os.write(terminal.master, b"stty -echo; echo rea''dy; yes\n")
        terminal.until(b"ready")
        os.set_blocking(terminal.master, False)
        typed = came = 0
        end = time.monotonic() + DEADLINE
        while (typed < 1 << 20 or came < 1 << 24) and time.monotonic() < end:
            if not select.select([terminal.master], [], [], 10)[0]:
                break
            writable = select.select([], [terminal.master], [], 0)[1]
            came += len(os.read(terminal.master, 65536))
            typed += os.write(terminal.master, b"x" * 4095 + b"\n") if writable else 0
            if came > typed + (1 << 24):
                break  # it takes no more, and shows as much as before
        assert came >= 1 << 24, f"{came} bytes came, {typed} were taken"
        assert typed > 1 << 18
    finally:
        terminal.close()
