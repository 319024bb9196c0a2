"""``sluice proxy log``, ``top``, ``show``, ``replay``, ``metrics``."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.proxy import Vm, eventually, vm

from sluice.proxy.audit import MAX_LINE, Audit, encode
from sluice.proxy.metrics_file import parse
from sluice.proxy.viewing import Follower, record_line, tail

CODE = "from sluice.cli.main import main; main()"


@pytest.fixture
def qube() -> Iterator[Vm]:
    with vm() as made:
        made.service("mirror", "#!/bin/sh\nexec cat\n")
        made.chain("pass", '"pass"')
        yield made


def sluice(qube: Vm, *words: str, data: bytes = b"") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, "proxy", *words],
        input=data.decode(),
        capture_output=True,
        text=True,
        env={**os.environ, **qube.environment()},
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


# --- log ------------------------------------------------------------------------------------------


@pytest.mark.spec("PROXY-056")
def test_log_shows_one_line_a_call(qube: Vm) -> None:
    qube.chain("no", "{ use = 'byte-limit', src2dst = 1, over = 'abort' }")
    qube.call("pass+vault+mirror+arg", b"hello")
    qube.call("no+vault+mirror", b"xx")
    qube.call("nochain+vault+mirror")
    lines = sluice(qube, "log").stdout.splitlines()
    assert len(lines) == 3
    assert "work -> vault mirror+arg [pass] ->5 <-5 exit 0" in lines[0]
    assert "exit 126 filter: byte-limit: more than 1 bytes src2dst" in lines[1]
    assert "exit 125 configuration: unknown chain" in lines[2]
    assert sluice(qube, "log", "-n", "1").stdout.splitlines() == lines[-1:]
    assert json.loads(sluice(qube, "log", "-n", "1", "--json").stdout)["chain"] == "nochain"


@pytest.mark.spec("PROXY-056")
def test_log_without_records_says_so(qube: Vm) -> None:
    done = sluice(qube, "log")
    assert done.returncode == 125 and "no audit records yet" in done.stderr


@pytest.mark.spec("PROXY-056")
def test_log_follows_through_a_rotation(tmp_path: Path) -> None:
    audit = Audit(str(tmp_path / "a.jsonl"), max_bytes=1000, keep=3)
    audit.write({"n": 0})
    follower = Follower(str(tmp_path / "a.jsonl"))
    seen = []
    for number in range(1, 60):
        audit.write({"n": number, "fill": "x" * 50})
        seen += follower.poll()
    assert [json.loads(line)["n"] for line in seen] == list(range(1, 60))
    assert len(list(tmp_path.glob("a.jsonl.[0-9]"))) == 3
    assert [json.loads(line)["n"] for line in tail(str(tmp_path / "a.jsonl"), 20)] == list(
        range(40, 60)
    )


@pytest.mark.spec("PROXY-053")
def test_what_a_record_holds_is_shown_escaped() -> None:
    line = record_line(json.dumps({"source": "a\x1b[2J", "reason": "\u202e\n", "cause": "x\r"}))
    assert all(" " <= c <= "~" for c in line)
    assert record_line("\x1b]0;x\x07") == r"(no record: \x1b]0;x\x07)"
    assert record_line("[1]").startswith("(no record")


@pytest.mark.spec("PROXY-052", "PROXY-053")
def test_a_record_is_a_line_of_ascii_of_4_kib_at_most() -> None:
    record = {"reason": "\x1b\n\u1234" * 5000, "argument": "a" * 5000, "stages": {}, "filters": []}
    line = encode(record)
    assert len(line) <= MAX_LINE and line.endswith(b"\n") and line.count(b"\n") == 1
    assert all(32 <= byte < 127 for byte in line[:-1])
    assert json.loads(line)["cut"] is True
    small = encode({"reason": 'a"b\\c', "n": 1.5, "none": None, "list": [1, True]})
    assert json.loads(small) == {"reason": 'a"b\\c', "n": 1.5, "none": None, "list": [1, True]}


# --- show and replay ------------------------------------------------------------------------------


def recorded(qube: Vm, data: bytes, service: str = "mirror") -> str:
    folder = qube.directory / "records"
    folder.mkdir(mode=0o700, exist_ok=True)
    qube.chain("rec", f"{{ use = 'record', directory = '{folder}' }}")
    assert qube.call(f"rec+vault+{service}", data).returncode == 0
    (path,) = folder.glob("*.rec")
    return str(path)


@pytest.mark.spec("PROXY-037", "PROXY-053")
def test_show_prints_a_recorded_call_escaped(qube: Vm) -> None:
    path = recorded(qube, b"\x1b[31mred\n\xff")
    out = sluice(qube, "show", path).stdout
    assert "work -> vault mirror [rec]" in out
    assert r"-> \x1b[31mred\x0a\xff" in out and r"<- \x1b[31mred\x0a\xff" in out
    assert "-> end" in out and out.rstrip().endswith("done")
    assert "1b 5b 33" in sluice(qube, "show", "--hex", path).stdout
    done = sluice(qube, "show", str(qube.config))
    assert done.returncode == 125 and "is no record of a call" in done.stderr


@pytest.mark.spec("PROXY-037", "PROXY-064")
def test_replay_asks_first_and_the_same_service_gives_the_same_bytes(qube: Vm) -> None:
    data = os.urandom(300_000)
    path = recorded(qube, data)
    calls = len(qube.calls())
    done = sluice(qube, "replay", path)
    assert done.returncode == 1 and "Go on?" in done.stderr and len(qube.calls()) == calls
    done = sluice(qube, "replay", path, data=b"n\n")
    assert done.returncode == 1 and len(qube.calls()) == calls
    done = sluice(qube, "replay", path, data=b"y\n")
    assert done.returncode == 0 and "same answer: 300000 bytes, exit code 0" in done.stdout
    assert len(qube.calls()) == calls + 1
    # What names a call that could not have been is no record of ours.
    whole = Path(path).read_bytes()
    odd = qube.directory / "odd.rec"
    odd.write_bytes(whole.replace(b'"argument": null', b'"argument": "\\u001b]0;x"', 1))
    assert odd.read_bytes() != whole
    done = sluice(qube, "replay", str(odd), data=b"n\n")
    assert done.returncode == 125 and "\x1b" not in done.stderr + done.stdout
    out = qube.directory / "answer"
    done = sluice(qube, "replay", "--yes", "--output", str(out), path, "--", "tr", "\\000", "x")
    assert done.returncode == 1 and "first difference at byte" in done.stdout
    assert out.read_bytes() == data.replace(b"\0", b"x")


def test_a_record_that_was_cut_off_can_be_shown(qube: Vm) -> None:
    path = Path(recorded(qube, b"hello" * 100))
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) - 20, 300, 200):
        path.write_bytes(whole[:size])
        assert "the record has no end" in sluice(qube, "show", str(path)).stdout or size > 200


# --- metrics --------------------------------------------------------------------------------------


@pytest.mark.spec("PROXY-056")
def test_metrics_count_over_processes(qube: Vm) -> None:
    qube.chain("counted", "'metrics'", "{ use = 'byte-limit', src2dst = 5, over = 'abort' }")
    for data in (b"abc", b"abcd", b"too long"):
        qube.call("counted+vault+mirror", data)
    out = sluice(qube, "metrics").stdout
    assert 'sluice_chain_calls_total{chain="counted",cause="done"} 2' in out
    assert 'sluice_chain_calls_total{chain="counted",cause="filter"} 1' in out
    assert 'sluice_chain_bytes_total{chain="counted",direction="src2dst"} 15' in out
    assert "# TYPE sluice_chain_seconds_total counter" in out
    for line in out.splitlines():
        assert line.startswith("#") or re.fullmatch(r"\w+\{[^}]*\} [0-9.e+-]+", line)
    assert parse(b"\xff damaged") == {}


# --- top ------------------------------------------------------------------------------------------


@pytest.mark.spec("PROXY-056")
def test_top_once_shows_calls_of_the_program_form(qube: Vm) -> None:
    process = qube.start("pass+vault+mirror+a[b]".replace("[b]", ".b"), source="personal")
    eventually(qube.pids)
    # The far end notes its start itself, a moment before the proxy knows of it.
    line = re.compile(r"personal +vault +mirror\+a\.b +pass +open")
    eventually(lambda: line.search(sluice(qube, "top", "--once").stdout))
    process.stdin.close()
    process.wait(30)


@pytest.mark.alone
@pytest.mark.spec("PROXY-056")
def test_top_in_a_terminal_ends_the_chosen_call(qube: Vm) -> None:
    """Alone: calls of the program form are all of this user's, and the first one is chosen."""
    first = qube.start("pass+vault+mirror+first", source="personal")
    eventually(qube.pids)
    process, master = _top(qube, "xterm")
    screen = _until(master, b"mirror+first")
    assert b"k: end the marked call" in screen or b"k: end" in _until(master, b"k: end")
    os.write(master, b"k")
    assert first.wait(60) == 125
    _until(master, b"ended: personal")
    os.write(master, b"q")
    assert process.wait(20) == 0
    os.close(master)
    assert qube.records()[0]["cause"] == "killed"


@pytest.mark.spec("PROXY-056")
def test_top_in_a_terminal_that_can_only_print_shows_the_calls_once(qube: Vm) -> None:
    first = qube.start("pass+vault+mirror+first", source="personal")
    eventually(qube.pids)
    process, master = _top(qube, "dumb")
    screen = _until(master, b"mirror+first")
    assert process.wait(20) == 0 and b"\x1b" not in screen
    os.close(master)
    first.stdin.close()
    first.wait(20)


def _top(qube: Vm, kind: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start ``sluice proxy top`` in a terminal of 80 columns; return it and the other end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, "proxy", "top"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, **qube.environment(), "TERM": kind, "XDG_RUNTIME_DIR": "/none"},
        start_new_session=True,
    )
    os.close(slave)
    return process, master


def _until(master: int, part: bytes, timeout: float = 30) -> bytes:
    deadline = time.monotonic() + timeout
    seen = b""
    while part not in seen:
        left = deadline - time.monotonic()
        assert left > 0 and select.select([master], [], [], left)[0], seen[-2000:]
        seen += os.read(master, 65536)
    return seen
