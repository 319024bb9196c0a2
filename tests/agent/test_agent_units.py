"""Parts of the agent by themselves: link, options, logs, processes, address of connect-tcp."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sluice.agent.connect_tcp import parse_binding
from sluice.agent.forwarding import fork_server_path
from sluice.agent.link import AgentLink, Connect, Execute, Opened, Refuse
from sluice.agent.log import LineSink, Log, LoggerSink
from sluice.agent.options import UsageError, parse_options
from sluice.agent.planning import plan
from sluice.agent.processes import exit_status, parents
from sluice.errors import RemoteError
from sluice.flow.reactor import Reactor

# --- link -----------------------------------------------------------------------------------------


def opened() -> AgentLink:
    link = AgentLink()
    event = link.receive(0x300, struct.pack("<I", 4))
    assert isinstance(event, Opened) and event.version == 4
    return link


def test_the_greeting_is_hello_4() -> None:
    assert AgentLink().greeting() == struct.pack("<III", 0x300, 4, 4)


@pytest.mark.parametrize(("offered", "effective"), [(2, 2), (3, 3), (4, 4), (9, 4)])
def test_negotiation(offered: int, effective: int) -> None:
    event = AgentLink().receive(0x300, struct.pack("<I", offered))
    assert isinstance(event, Opened) and event.version == effective


def test_nothing_but_hello_first_and_only_once() -> None:
    for message in ((0x200, bytes(20)), (0x300, struct.pack("<I", 1)), (0x203, bytes(32))):
        with pytest.raises(RemoteError):
            AgentLink().receive(*message)
    with pytest.raises(RemoteError):
        opened().receive(0x300, struct.pack("<I", 4))


def test_commands_end_at_the_first_nul_and_before_the_last_byte() -> None:
    for raw, text in ((b"a\0b\0", b"a"), (b"abX", b"ab"), (b"\0", b"")):
        event = opened().receive(0x201, struct.pack("<II", 43, 514) + raw)
        assert isinstance(event, Execute)
        assert (event.kind, event.domain, event.port, event.text) == (0x201, 43, 514, text)


def test_answers_find_their_clients_once() -> None:
    link = opened()
    idents = []
    for client in ("one", "two", "three"):
        message = link.trigger(client, bytes(170))
        assert message is not None
        idents.append(message[8 + 128 : 8 + 160])
    event = link.receive(0x202, struct.pack("<II", 43, 514) + idents[1])
    assert isinstance(event, Connect) and (event.client, event.port) == ("two", 514)
    event = link.receive(0x203, idents[0])
    assert isinstance(event, Refuse) and event.client == "one"
    event = link.receive(0x203, idents[0])
    assert isinstance(event, Refuse) and event.client is None
    assert link.abandon() == ["three"] and link.abandon() == []
    assert link.terminated(43, 514) == struct.pack("<IIII", 0x211, 8, 43, 514)


def test_idents_are_not_given_twice_while_they_are_out() -> None:
    link = opened()
    link._next_ident = 0x7FFFFFFF - 1
    seen = {link.trigger(n, bytes(170))[136:168] for n in range(5)}  # type: ignore[index]
    assert len(seen) == 5


# --- options --------------------------------------------------------------------------------------

SHORT = {"a": ("agent", True), "t": ("t", False), "T": ("T", False)}
LONG = {"agent-socket": ("agent", True), "tea": ("t", False), "team": ("T", False)}


@pytest.mark.parametrize(
    ("words", "options", "rest"),
    [
        (["-tT", "x"], [("t", ""), ("T", "")], ["x"]),
        (["-taX"], [("t", ""), ("agent", "X")], []),
        (["-a", "X", "y"], [("agent", "X")], ["y"]),
        (["--agent-socket", "X"], [("agent", "X")], []),
        (["--ag=X=Y"], [("agent", "X=Y")], []),
        (["--tea"], [("t", "")], []),
        (["x", "-t", "y"], [("t", "")], ["x", "y"]),
        (["-t", "--", "-T"], [("t", "")], ["-T"]),
        (["-", "-t"], [("t", "")], ["-"]),
    ],
)
def test_options(words: list[str], options: list[tuple[str, str]], rest: list[str]) -> None:
    assert parse_options(words, SHORT, LONG) == (options, rest)


def test_options_that_stop_early() -> None:
    assert parse_options(["-t", "x", "-T"], SHORT, LONG, stop_early=True) == (
        [("t", "")],
        ["x", "-T"],
    )


@pytest.mark.parametrize(
    "words", [["-x"], ["--x"], ["--te"], ["-a"], ["--agent-socket"], ["--tea=1"], ["--=1"]]
)
def test_bad_options(words: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_options(words, SHORT, LONG)


# --- logs -----------------------------------------------------------------------------------------


class Clock(Reactor):
    """A loop whose time stands still until it is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now


def test_lines_are_put_together_and_escaped() -> None:
    written: list[str] = []
    sink = LineSink(Clock(), b"test.S-work", written.append)
    for piece in (b"on", b"e\ntwo\x1b[0m\n", b"", b"rest"):
        sink.feed(piece)
    assert written == ["test.S-work: one", "test.S-work: two\\x1b[0m"]
    sink.close()
    assert written[-1] == "test.S-work: rest"


def test_a_line_without_end_is_cut() -> None:
    written: list[str] = []
    sink = LineSink(Clock(), b"t", written.append)
    sink.feed(b"x" * 5000)
    assert [len(line) for line in written] == [1027] * 4
    assert len(sink._partial) < 1024


def test_a_flood_is_folded_until_it_ebbs() -> None:
    written: list[str] = []
    clock = Clock()
    sink = LineSink(clock, b"t", written.append)
    sink.feed(b"line\n" * 1000)
    assert len(written) == 200
    clock.now = 1.0
    sink.feed(b"line\n" * 10)
    assert written[200] == "t: (800 lines left out)" and len(written) == 211


def test_the_agents_own_log_is_folded_too() -> None:
    written: list[str] = []
    now = [0.0]
    log = Log("agent", written.append, lambda: now[0])
    for number in range(300):
        log(f"line {number}")
    assert written[-1] == "agent: line 199" and len(written) == 200
    now[0] = 10.0
    log("later")
    assert written[200:] == ["agent: (100 lines left out)", "agent: later"]


def drive(loop: Reactor, condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        loop._run_due()
        loop.run_once(0.01)


@pytest.fixture
def logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A logger program that writes to a file; yields the file."""
    out = tmp_path / "out"
    program = tmp_path / "logger"
    program.write_text(f'#!/bin/sh\n(echo "$@"; cat) >{out}.new; mv {out}.new {out}\n')
    program.chmod(0o755)
    monkeypatch.setitem(os.environ, "PATH", f"{tmp_path}:{os.environ['PATH']}")
    yield out


def test_stderr_goes_to_a_logger_process(logger: Path) -> None:
    loop = Reactor()
    pids: list[int] = []
    sink = LoggerSink(loop, b"test.S+x-work", pids.append)
    sink.feed(b"one\n")
    sink.feed(memoryview(b"two\n"))
    sink.close()
    os.waitpid(pids[0], 0)
    assert logger.read_text() == "-t test.S+x-work\none\ntwo\n"


def test_what_a_slow_logger_does_not_take_is_held_and_then_dropped(logger: Path) -> None:
    loop = Reactor()
    pids: list[int] = []
    sink = LoggerSink(loop, b"t", pids.append)
    for _ in range(100):
        sink.feed(b"x" * 65536)
    assert len(sink._held) <= 65536
    sink.close()
    drive(loop, lambda: sink._fd < 0)
    os.waitpid(pids[0], 0)
    assert logger.stat().st_size > 65536


def test_a_flood_to_the_system_log_is_folded(logger: Path) -> None:
    clock = Clock()
    pids: list[int] = []
    sink = LoggerSink(clock, b"t", pids.append)
    sink.feed(b"line\n" * 1000)
    clock.now = 1.0
    sink.feed(b"later\n" * 2 + b"flood\n" * 100 + b"no end")
    sink.close()
    os.waitpid(pids[0], 0)
    lines = logger.read_text().splitlines()
    assert lines[:201] == ["-t t", *["line"] * 200]
    assert lines[201:] == ["(800 lines left out)", "later", "later", *["flood"] * 48,
                           "(53 lines left out)"]  # fmt: skip


def test_bytes_of_any_kind_reach_the_system_log_as_they_are(logger: Path) -> None:
    pids: list[int] = []
    sink = LoggerSink(Reactor(), b"t", pids.append)
    raw = bytes(b for b in range(256) if b != 10)
    sink.feed(raw[:100])
    sink.feed(raw[100:] + b"\n\nx")
    sink.close()
    os.waitpid(pids[0], 0)
    assert logger.read_bytes() == b"-t t\n" + raw + b"\n\nx\n"


def test_a_logger_that_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logger").write_text("#!/bin/sh\nexec <&-\n")
    (tmp_path / "logger").chmod(0o755)
    monkeypatch.setitem(os.environ, "PATH", f"{tmp_path}:{os.environ['PATH']}")
    pids: list[int] = []
    sink = LoggerSink(Reactor(), b"t", pids.append)
    os.waitpid(pids[0], 0)
    sink.feed(b"no end")
    sink.close()
    assert sink._fd == -1
    sink.close()


def test_a_logger_that_cannot_be_started_or_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "PATH", "/nowhere")
    loop = Reactor()
    sink = LoggerSink(loop, b"t", lambda _pid: None)
    sink.feed(b"x")
    fd = sink.take_stderr()
    os.write(fd, b"x")
    os.close(fd)
    sink.close()


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_exit_statuses(script: str, status: int) -> None:
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", script], os.environ)
    assert exit_status(os.waitpid(pid, 0)[1]) == status


def test_the_chain_of_parents(tmp_path: Path) -> None:
    assert parents(os.getpid())[0] == os.getppid()
    assert parents(0) == [] and parents(1 << 22) == []
    # A name with blanks and parentheses does not confuse it.
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "1000"])
    try:
        assert parents(process.pid)[0] == os.getpid()
    finally:
        process.kill()
        process.wait()


# --- smaller things -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "binding"),
    [
        ("8000:vault:22", (8000, "vault", 22)),
        (":vault:22", (22, "vault", 22)),
        ("8000::22", (8000, "@default", 22)),
        ("vault:22", (22, "vault", 22)),
        (":22", (22, "@default", 22)),
        ("8000:@dispvm:22", (8000, "@dispvm", 22)),
    ],
)
def test_bindings(text: str, binding: tuple[int, str, int]) -> None:
    assert parse_binding(text) == binding


@pytest.mark.parametrize(
    ("text", "pattern", "path"),
    [
        (b"u:id", "/run/%s.sock", b"/run/u.sock"),
        (b"u:QUBESRPC s d", "/run/%s/%s%d", b"/run/u/u%d"),
        (b"u:nogui:id", "/run/%s", None),
        (b"u:id", "", None),
        (b":id", "/run/%s", None),
        (b"../u:id", "/run/%s", None),
        (b"nocolon", "/run/%s", None),
        (b"u" * 200 + b":id", "/run/%s", None),
        (b"u:" + b"x" * 65535, "/run/%s", None),
    ],
)
def test_which_fork_server(text: bytes, pattern: str, path: bytes | None) -> None:
    planned = plan(text, lambda _text: None, with_user=True, configured=False)
    assert fork_server_path(planned, pattern) == path
