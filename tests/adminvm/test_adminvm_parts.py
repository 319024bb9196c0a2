"""The parts of the AdminVM that need no domain: replies, sessions, audit lines, logs, buckets."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.adminvm import EXEC_CMDLINE, exec_body, hello, message, until

from sluice.adminvm import logs
from sluice.adminvm.audit import MAX_LINE, AuditLog, CallRecord
from sluice.adminvm.bucket import TokenBucket
from sluice.adminvm.calls import FIRST_NUMBER, LAST_NUMBER, CallNumbers, Ends
from sluice.adminvm.decision import (
    command_for_dom0,
    command_for_vm,
    parse_reply,
)
from sluice.adminvm.logs import FoldedLog, StderrReader
from sluice.adminvm.qubesd import QubesdError, decode_reply, encode_request
from sluice.adminvm.rotated import RotatedFile
from sluice.adminvm.session import LocalRequest, Session, State
from sluice.adminvm.supervisor import Supervisor
from sluice.errors import LocalError, RemoteError
from sluice.wire.names import escape

# --- policy replies -----------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_any_reply_is_a_decision_or_malformed(reply: bytes) -> None:
    try:
        decision = parse_reply(reply)
    except RemoteError:
        return
    assert decision.allowed is False  # nothing this short and random allows


def test_an_allowing_reply_in_any_order() -> None:
    lines = [b"autostart=False", b"target=t", b"result=allow", b"user=", b"requested_target=@x"]
    for turn in range(len(lines)):
        decision = parse_reply(b"\n".join(lines[turn:] + lines[:turn]))
        assert decision.allowed
        assert (decision.user, decision.target, decision.selected) == ("", "t", "t")


def test_commands() -> None:
    assert command_for_vm("u", "s", "src") == b"u:QUBESRPC s+ src\0"
    assert command_for_vm("u", "s+a+b", "src") == b"u:QUBESRPC s+a+b src\0"
    assert command_for_dom0("s+", "src", "dom0") == b"QUBESRPC s+ src name dom0\0"
    assert command_for_dom0("s", "src", "@adminvm") == b"QUBESRPC s+ src keyword adminvm\0"
    with pytest.raises(LocalError):
        command_for_vm("u", "s" * 65535, "src")
    with pytest.raises(LocalError):
        command_for_vm("u\0", "s", "src")


def test_qubesd_requests_and_replies() -> None:
    assert encode_request("admin.vm.Start", "work") == b"admin.vm.Start+ dom0 name work\0"
    assert encode_request("m", "@tag:x", payload="p") == b"m+ dom0 keyword tag:x\0p"
    assert decode_reply(b"0\0name") == b"name"
    with pytest.raises(QubesdError) as caught:
        decode_reply(b"2\0Some\x1bError\0\0text\0")
    assert caught.value.exception == "Some\\x1bError"
    for reply in (b"", b"0", b"00", b"1\0", b"0\0" + b"x" * 65534):
        with pytest.raises(RemoteError):
            decode_reply(reply)


# --- local sessions -----------------------------------------------------------------------------


@given(st.lists(st.integers(1, 7), max_size=40))
def test_a_session_in_any_pieces(sizes: list[int]) -> None:
    stream = hello(3) + message(EXEC_CMDLINE, exec_body(1, 2, b"text\0"))
    session = Session()
    found = []
    for size in [*sizes, len(stream)]:
        piece, stream = stream[:size], stream[size:]
        if piece:
            found.append(session.receive(piece))
    assert [item for item in found if item] == [LocalRequest(EXEC_CMDLINE, 1, 2, b"text\0")]
    assert session.state is State.RUNNING
    with pytest.raises(RemoteError):
        session.receive(b"x")


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=20))
def test_no_bytes_make_a_session_fail_otherwise(pieces: list[bytes]) -> None:
    session = Session()
    try:
        for piece in pieces:
            session.receive(piece)
    except RemoteError:
        pass


# --- audit --------------------------------------------------------------------------------------


@given(st.text(max_size=400), st.text(max_size=1000), st.text(max_size=900), st.text(max_size=900))
@example("\\" * 400, "\\" * 400 + "+" + "\\" * 900, "\\" * 900, "\\" * 900)
def test_a_line_is_bounded_and_printable(
    source: str, service: str, cause: str, command: str
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="s-") as directory:
        log = AuditLog(Path(directory) / "audit.jsonl")
        record = CallRecord(7, source, service, source)
        record.cause = cause
        record.command = command
        record.rule = cause
        log.write(record)
        log.close()
        raw = (Path(directory) / "audit.jsonl").read_bytes()
    assert len(raw) <= MAX_LINE
    assert raw.endswith(b"\n")
    assert re.fullmatch(rb"[ -~]+\n", raw)
    assert json.loads(raw)["id"] == 7


def test_an_argument_is_told_from_none(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    for service in ("s", "s+", "s+a+b"):
        log.write(CallRecord(1, "a", service, "b"))
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["service"], line["argument"]) for line in lines] == [
        ("s", None),
        ("s", ""),
        ("s", "a+b"),
    ]
    log.close()


def test_the_file_is_rotated_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = RotatedFile(path, 1000, 2)
    for number in range(100):
        file.append(b"%099d\n" % number)
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1", "log.2"]
    text = b"".join((tmp_path / name).read_bytes() for name in ("log.2", "log.1", "log"))
    numbers = [int(line) for line in text.splitlines()]
    assert numbers == list(range(100 - len(numbers), 100))
    assert all((tmp_path / name).stat().st_size <= 1000 for name in os.listdir(tmp_path))
    assert path.stat().st_mode & 0o777 == 0o600
    file.close()
    again = RotatedFile(path, 1000, 2)
    again.append(b"x\n")
    assert path.read_bytes().endswith(b"x\n")
    again.close()


def test_a_full_disk_loses_lines_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    file = RotatedFile(tmp_path / "log", on_trouble=said.append)
    real = os.write

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for _ in range(5):
        file.append(b"x\n")
    monkeypatch.setattr(os, "write", real)
    assert (file.lost, len(said)) == (5, 1)
    file.append(b"y\n")
    assert (tmp_path / "log").read_bytes() == b"y\n"
    file.close()


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("")
    (tmp_path / "log").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic"):
        RotatedFile(tmp_path / "log")


# --- calls --------------------------------------------------------------------------------------


def test_numbers_are_not_used_twice_while_they_live() -> None:
    numbers = CallNumbers(LAST_NUMBER - 1)
    taken = [numbers.take() for _ in range(4)]
    assert taken == [LAST_NUMBER - 1, LAST_NUMBER, FIRST_NUMBER, FIRST_NUMBER + 1]
    numbers = CallNumbers(LAST_NUMBER)
    numbers.take()
    held = numbers.take()
    numbers._next = FIRST_NUMBER
    assert numbers.take() != held
    numbers.free(held)
    assert len(numbers) == 2


def test_a_call_ends_when_both_sides_have() -> None:
    async def main() -> None:
        record = CallRecord(1, "a", "s", "b")
        ends = Ends(asyncio.get_running_loop(), record)
        source, target = ends.expect("source"), ends.expect("target")
        waiting = asyncio.ensure_future(ends.wait())
        target.end("b is gone")
        target.end("again")
        await asyncio.sleep(0)
        assert not waiting.done()
        source.end()
        assert await waiting == "b is gone"
        assert set(record.stages) == {"source_ended", "target_ended"}

    asyncio.run(main())


def test_a_bucket_is_spent_and_refilled() -> None:
    now = [0.0]
    bucket = TokenBucket(10, 20, lambda: now[0])
    assert all(bucket.take() for _ in range(20))
    assert not bucket.take()
    now[0] = 0.5
    assert [bucket.take() for _ in range(6)] == [True] * 5 + [False]
    assert bucket.spend(10) == pytest.approx(1.0)
    now[0] = 100
    assert bucket.spend(20) == 0.0
    now[0] = 50  # a clock that goes back gives nothing
    assert not bucket.take()


# --- supervision and logs -----------------------------------------------------------------------


def test_a_failed_task_is_told_and_stops_nothing() -> None:
    async def main() -> None:
        said: list[str] = []
        tasks = Supervisor(said.append)

        async def fail() -> None:
            raise ValueError("oops")

        async def stay() -> None:
            await asyncio.Event().wait()

        tasks.spawn(fail(), "the failing one")
        staying = tasks.spawn(stay(), "stays")
        await asyncio.sleep(0.01)
        assert len(tasks) == 1
        assert "the failing one failed" in said[0]
        assert "ValueError: oops" in said[0]
        assert await tasks.close(1.0)
        assert staying is not None
        assert staying.cancelled()
        assert tasks.spawn(stay(), "too late") is None

    asyncio.run(main())


def test_a_task_that_does_not_end_does_not_hold_up_the_end() -> None:
    async def main() -> None:
        tasks = Supervisor(lambda text: None)
        end = asyncio.Event()

        async def stubborn() -> None:
            while not end.is_set():
                try:
                    await end.wait()
                except asyncio.CancelledError:
                    continue

        tasks.spawn(stubborn(), "stubborn")
        await asyncio.sleep(0)
        assert not await tasks.close(0.05)
        end.set()

    asyncio.run(main())


def left_out(said: list[str]) -> int:
    """Return how many lines were said to be left out, in however many notes."""
    return sum(int(line[1:].split()[0]) for line in said if "more lines left out" in line)


def test_log_lines_are_folded() -> None:
    async def main() -> None:
        said: list[str] = []
        log = FoldedLog(asyncio.get_running_loop(), said.append, rate=1e-6, burst=3)
        for number in range(100):
            log(str(number))
        assert said == ["0", "1", "2"]
        log.flush()
        assert said[3] == "(97 more lines left out)"

    asyncio.run(main())


def test_lines_that_are_left_out_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []

    def escaping(line: bytes, limit: int) -> str:
        looked.append(line)
        return escape(line, limit)

    async def main() -> None:
        said: list[str] = []
        loop = asyncio.get_running_loop()
        read_fd, write_fd = os.pipe()
        reader = StderrReader(loop, read_fd, FoldedLog(loop, said.append, rate=1e-6, burst=3))
        os.write(write_fd, b"\n" * 60000 + b"x" * 2000)
        os.close(write_fd)
        await until(lambda: left_out(said) == 59998, "what was left out to be told")
        reader.close()

    monkeypatch.setattr(logs, "escape", escaping)
    asyncio.run(main())
    assert len(looked) == 3


def test_a_sandboxs_stderr_is_escaped_cut_and_bounded() -> None:
    async def main() -> None:
        said: list[str] = []
        loop = asyncio.get_running_loop()
        read_fd, write_fd = os.pipe()
        reader = StderrReader(loop, read_fd, FoldedLog(loop, said.append, rate=1e-6, burst=50))
        os.write(write_fd, b"plain\n\x1b]0;evil\x07\nhalf ")
        os.write(write_fd, b"line\n" + b"x" * 5000)
        await until(lambda: len(said) >= 3, "the first lines")
        os.write(write_fd, b"".join(b"%d\n" % number for number in range(5000)))
        os.close(write_fd)
        await until(lambda: left_out(said) > 4900, "what was left out to be told")
        assert said[:3] == ["plain", "\\x1b]0;evil\\x07", "half line"]
        assert max(map(len, said)) <= 1024
        assert len([line for line in said if "more lines left out" not in line]) == 50
        reader.close()

    asyncio.run(main())
