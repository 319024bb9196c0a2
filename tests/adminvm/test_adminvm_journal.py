"""The journal of calls under way: each call gets one record, whenever the AdminVM is killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.adminvm import journal
from sluice.adminvm.audit import AuditLog, CallRecord
from sluice.adminvm.journal import Journal, cut_calls


def record(number: int) -> CallRecord:
    made = CallRecord(number, "work", f"test.S+{number}", "vault")
    made.decision, made.cause = "allow", "ended"
    return made


def numbers(path: Path) -> list[tuple[int, str]]:
    lines = path.read_text().splitlines()
    return [(entry["id"], entry["cause"]) for entry in map(json.loads, lines)]


def test_a_call_that_was_cut_is_recorded_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    first = AuditLog(path)
    calls = [record(number) for number in (1, 2, 3)]
    for call in calls:
        first.begin(call)
    first.write(calls[1])
    # Killed here: nothing is closed. The last line is torn.
    with open(f"{path}.begun", "ab") as file:
        file.write(b'{"id": 9, "sou')
    second = AuditLog(path)
    cut = "the AdminVM was killed"
    assert numbers(path) == [(2, "ended"), (1, cut), (3, cut)]
    second.close()
    AuditLog(path).close()
    assert len(numbers(path)) == 3, "recorded once"
    first.close()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=60))
def test_whenever_it_is_cut_each_call_has_one_record(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int]]
) -> None:
    path = tmp_path_factory.mktemp("j") / "audit.jsonl"
    log = AuditLog(path)
    alive: set[int] = set()
    begun: list[int] = []
    for begin, number in steps:
        if begin:
            log.begin(record(number))
            begun += [] if number in alive else [number]
            alive.add(number)
        elif number in alive:
            log.write(record(number))
            alive.discard(number)
    AuditLog(path).close()
    assert sorted(number for number, _ in numbers(path)) == sorted(begun)
    log.close()


def test_the_file_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_BYTES", 4096)
    path = tmp_path / "begun"
    kept = Journal(path, lambda line: None)
    kept.begin(1, b'{"id":1}\n')
    for number in range(2, 2000):
        kept.begin(number, b'{"id":%d,"pad":"%s"}\n' % (number, b"x" * 100))
        kept.end(number)
        assert path.stat().st_size < 8192
    assert [json.loads(line)["id"] for line in cut_calls(str(path))] == [1]
    kept.end(1)
    assert path.stat().st_size == 0
    kept.close()


def test_what_is_no_journal_is_no_call(tmp_path: Path) -> None:
    path = tmp_path / "begun"
    assert cut_calls(str(path)) == []
    path.write_bytes(b"\xff\xfe\n[]\n{}\nnull\n7\n" + b'{"id":"x"}\n')
    assert cut_calls(str(path)) == []
