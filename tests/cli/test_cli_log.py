"""``sluice log``: records of calls and lines of domains, in order, over rotations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from sluice.cli.log import Tail, command, render


def record(second: int, source: str, decision: str = "allow") -> str:
    return json.dumps(
        {
            "time": f"2026-01-01T00:00:{second:02}.000Z",
            "source": source,
            "target": "vault",
            "requested_target": "vault",
            "service": "test.Add",
            "argument": None,
            "decision": decision,
            "rule": "a.policy:1",
            "cause": "ended",
            "stages": {},
        }
    )


def line(second: int, domain: str, text: str) -> str:
    return json.dumps(
        {"time": f"2026-01-01T00:00:{second:02}.000Z", "domain": domain, "line": text}
    )


def system(root: Path) -> Path:
    log = root / "state" / "log"
    log.mkdir(parents=True)
    calls = [record(1, "work"), record(3, "wallet", "deny")]
    (log / "audit.jsonl").write_text("\n".join(calls) + "\n")
    (log / "domains.jsonl").write_text(
        line(2, "proxy", "it timed out") + "\n" + line(4, "work", "\x1b[2J") + "\n"
    )
    return root


def shown(root: Path, *words: str) -> list[str]:
    done = CliRunner().invoke(command, ["--root", str(root), *words])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_calls_and_lines_are_merged_by_their_time(tmp_path: Path) -> None:
    lines = shown(system(tmp_path))
    assert [
        found
        for text in lines
        for found in ("work ->", "proxy: it", "wallet ->", "work: ")
        if found in text
    ] == ["work ->", "proxy: it", "wallet ->", "work: "]


def test_what_is_shown_can_be_narrowed(tmp_path: Path) -> None:
    root = system(tmp_path)
    assert len(shown(root, "--domain", "proxy")) == 1
    assert len(shown(root, "--refused")) == 1
    assert len(shown(root, "--calls")) == 2
    assert len(shown(root, "-n", "1")) == 1
    assert shown(root, "-n", "0") == []
    assert json.loads(shown(root, "--json")[0])["source"] == "work"


def test_nothing_reaches_the_terminal_raw(tmp_path: Path) -> None:
    assert "\x1b" not in "".join(shown(system(tmp_path)))
    assert "\x1b" not in render('{"time": "\x1b[31m"')


@pytest.mark.spec("POL-251")
def test_the_reason_of_a_rule_is_shown(tmp_path: Path) -> None:
    stored = json.loads(record(1, "work")) | {"reason": "ticket 5"}
    assert "(ticket 5)" in render(json.dumps(stored))


def test_a_tail_follows_growth_pieces_and_rotation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path, lambda text: "skip" not in text)
    assert tail.poll() == []
    path.write_text("one\nskip\ntw")
    assert tail.poll() == ["one"]
    with path.open("a") as file:
        file.write("o\nthree\n")
    assert tail.poll() == ["two", "three"]
    path.rename(tmp_path / "log.1")
    path.write_text("four\n")
    assert tail.poll() == ["four"]
    assert tail.poll() == []


def rotate(path: Path, keep: int) -> None:
    for number in range(keep, 0, -1):
        newer = path.with_name(f"{path.name}.{number - 1}" if number > 1 else path.name)
        if newer.exists():
            newer.rename(path.with_name(f"{path.name}.{number}"))


def test_a_tail_loses_nothing_at_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one\ntw")
    tail = Tail(path, lambda text: True)
    assert tail.poll() == ["one"]
    with path.open("a") as file:
        file.write("o\n")
    rotate(path, 3)
    path.write_text("three\n")
    rotate(path, 3)
    path.write_text("four\nfi")
    assert tail.poll() == ["two", "three", "four"]
    with path.open("a") as file:
        file.write("ve\n")
    assert tail.poll() == ["five"]
    with path.open("a") as file:
        file.write("last\n")
    for text in ("six\n", "seven\n", "eight\n", "nine\n", "ten\n"):
        rotate(path, 3)
        path.write_text(text)
    assert tail.poll() == ["last", "seven", "eight", "nine", "ten"]  # six is deleted
    assert tail.poll() == []


def test_rotated_files_are_shown_as_far_as_they_are_asked_for(tmp_path: Path) -> None:
    root = system(tmp_path)
    log = root / "state" / "log"
    rotate(log / "audit.jsonl", 2)
    (log / "audit.jsonl").write_text(record(9, "late") + "\n")
    assert [text.split()[1] for text in shown(root, "--calls")] == ["work", "wallet", "late"]
    assert [text.split()[1] for text in shown(root, "--calls", "-n", "2")] == ["wallet", "late"]
    assert len(shown(root, "--refused")) == 1
