# ruff: noqa: E501  (what runs inside is written as it runs there)
"""Attempts to misuse calls and terminals: each one fails, in each of three modes.

Each test says in a sentence what it tries. Numbers of system calls are those of x86-64; on other
machines those tests are skipped.
"""

from __future__ import annotations

import os
import platform
import pty
import select
import subprocess
import time
from collections.abc import Iterator

import pytest
from tests.support.sandbox import MODES, Machine, hostile_machine

pytestmark = [pytest.mark.sandbox, pytest.mark.xdist_group("sandbox")]

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86-64")


@pytest.fixture(scope="module", params=MODES)
def inside(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A system with the domains ``work``, which is hostile, and ``peer``."""
    with hostile_machine(request.param) as made:
        yield made


# --- calls -----------------------------------------------------------------------------------


@pytest.mark.spec("CORE-170")
def test_a_forged_source(inside: Machine) -> None:
    """Sends a trigger with another domain's name as its source."""
    code = """
body = b'peer'.ljust(64, bytes(1)) + b'peer'.ljust(64, bytes(1)) + b'SOCKET'.ljust(32, bytes(1)) + b'test.Who' + bytes(1)
s = socket.socket(socket.AF_UNIX); s.connect('/run/qubes/qrexec-agent')
s.send(struct.pack('<II', 0x213, len(body)) + body)
s.settimeout(60)
print(s.recv(8) != b'')
"""
    inside.python(code)
    assert inside.shell("qrexec-client-vm peer test.Who").stdout == b"work\n"
    records = (inside.root / "state/log/audit.jsonl").read_text()
    assert '"source":"peer"' not in records.replace('": "', '":"')


@pytest.mark.spec("CORE-166")
def test_a_descriptor_sent_to_a_peer(inside: Machine) -> None:
    """Sends a descriptor along with the data of a call, hoping that the other side gets it."""
    assert inside.shell("echo | qrexec-client-vm peer test.Descriptors").stdout == b"4\n"
    client = """
import array, os, socket, subprocess
a, b = socket.socketpair()
p = subprocess.Popen(['qrexec-client-vm', 'peer', 'test.Descriptors'], stdin=b, stdout=subprocess.PIPE)
d = os.open('/home/user', os.O_RDONLY)
a.sendmsg([b'x' + bytes((10,))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [d] * 10))])
a.close(); b.close()
print(p.stdout.read().decode().strip())
"""
    assert inside.python(client) == "4"


def test_a_descriptor_sent_to_the_agent(inside: Machine) -> None:
    """Sends descriptors with a request to the agent, which must not keep or forward them."""
    code = """
import array
body = b'peer'.ljust(64, bytes(1)) + b'SOCKET'.ljust(32, bytes(1)) + b'test.Who' + bytes(1)
for _ in range(300):
    s = socket.socket(socket.AF_UNIX); s.connect('/run/qubes/qrexec-agent')
    s.sendmsg([struct.pack('<II', 0x212, len(body))], [(1, 1, array.array('i', [0, 1, 2]))])
    s.close()
print('done')
"""
    assert inside.python(code) == "done"
    assert inside.shell("qrexec-client-vm peer test.Who").stdout == b"work\n"


def test_escape_sequences_to_the_terminal(inside: Machine) -> None:
    """Sends escape sequences that make a terminal answer, set its title or its clipboard."""
    text = r"printf 'a\033]52;c;ZXZpbA==\007b\033[6nc\033]0;title\033\\d\302\233\063\061\155e\033[31mred\033[0m\n'"
    output = on_a_terminal(inside.sluice("run", "work", "--", "sh", "-c", text), inside)
    assert b"ab" in output
    assert b"\x1b]" not in output
    assert b"\x1b[6n" not in output
    assert b"\xc2\x9b" not in output
    assert b"\x1b[31mred\x1b[0m" in output
    raw = on_a_terminal(inside.sluice("run", "--raw", "work", "--", "sh", "-c", text), inside)
    assert b"\x1b]52;" in raw


def on_a_terminal(command: list[str], inside: Machine) -> bytes:
    """Run a program on a terminal of the test's own and return all that it showed."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=inside.environment, cwd="/"
    )
    os.close(slave)
    shown = b""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([master], [], [], 0.2)[0]:
            try:
                data = os.read(master, 65536)
            except OSError:
                break
            if not data:
                break
            shown += data
    os.close(master)
    assert process.wait(60) is not None
    return shown


def test_a_shell_without_a_terminal_reads_its_commands(inside: Machine) -> None:
    """Pipes commands into a shell: they are carried out, and its status comes back."""
    done = subprocess.run(
        inside.sluice("shell", "work"),
        input=b"echo is-$((40+2)); tty; exit 3\n",
        capture_output=True,
        env=inside.environment,
        cwd="/",
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, b"is-42\nnot a tty\n"), done


def test_a_shell_has_a_terminal_of_its_own(inside: Machine) -> None:
    """Opens a shell and asks it for its terminal: not the user's, and gone with the shell."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        inside.sluice("shell", "work"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=inside.environment | {"TERM": "xterm"},
        cwd="/",
    )
    os.close(slave)
    shown = read_until(master, b"$ ")
    os.write(master, b"tty; stty size; echo is-$((40+2)); exit 7\n")
    shown += read_until(master, b"is-42")
    assert b"is-42" in shown, shown
    assert b"/dev/pts/0" in shown
    read_until(master, b"never", 0.5)
    assert process.wait(60) == 7
    os.close(master)


def read_until(master: int, word: bytes, seconds: float = 60.0) -> bytes:
    """Return what a terminal shows until ``word`` comes, it closes, or time is up."""
    shown = b""
    end = time.monotonic() + seconds
    while word not in shown and time.monotonic() < end:
        if select.select([master], [], [], 0.05)[0]:
            try:
                shown += os.read(master, 65536)
            except OSError:
                break
    return shown
