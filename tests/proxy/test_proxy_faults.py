"""Kills at random moments: nothing hung, nothing left over, one record for each call."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.processes import alive
from tests.support.proxy import Vm, eventually, vm

from sluice.proxy import log as proxy_log
from sluice.proxy.audit import Audit
from sluice.proxy.unfinished import Unfinished


@pytest.fixture
def qube() -> Iterator[Vm]:
    with vm() as made:
        made.service("mirror", "#!/bin/sh\nexec cat\n")
        made.chain("pass", '"pass"')
        made.chain("look", "{ use = 'byte-limit', src2dst = '1G', dst2src = '1G' }")
        made.chain("outside", "{ use = 'program', src2dst = ['cat'], confine = false }")
        yield made


def one_fault(qube: Vm, seed: int) -> str:
    """Make a call, kill a part of it at a moment that the seed tells, and see what is left.

    Returns who was killed.
    """
    chance = random.Random(seed)
    chain = chance.choice(["pass", "look", "outside"])
    victim = chance.choice(["source", "target", "proxy", "program"])
    before = len(qube.pids())
    process = qube.start(f"{chain}+vault+mirror")
    feeder = subprocess.Popen(
        ["/usr/bin/head", "-c", str(chance.choice([0, 1000, 200_000, 1 << 30])), "/dev/zero"],
        stdout=process.stdin,
    )
    process.stdin.close()
    drain = subprocess.Popen(["/bin/cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
    process.stdout.close()
    time.sleep(chance.random() * 0.08)
    pids = qube.pids()[before:]
    if victim == "source":
        feeder.kill()
        drain.kill()
    elif victim == "proxy":
        process.kill()
    elif victim == "target" and pids:
        kill(pids[0])
    else:
        for pid in children(process.pid):
            if pid not in pids:
                kill(pid)
    try:
        # A call that nothing happened to ends when all is moved; one with a GiB is cut short.
        process.wait(20)
    except subprocess.TimeoutExpired:
        assert victim in ("target", "program"), f"seed {seed}: hung after the {victim} was killed"
        process.terminate()
        process.wait(20)
    for helper in (feeder, drain):
        helper.kill()
        helper.wait()
    eventually(lambda: not any(alive(pid) for pid in qube.pids()), what=f"seed {seed}: left over")
    return victim


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def records_of_all(qube: Vm, victims: list[str]) -> None:
    """Each call has exactly one record, those of killed proxies with the next one's start."""
    assert qube.call("pass+vault+mirror", b"x").stdout == b"x"
    idents = [record["id"] for record in qube.records()]
    assert len(idents) == len(set(idents))
    # A proxy that was killed before it knew what it was called for is no call yet.
    certain = len(victims) - victims.count("proxy") + 1
    assert certain <= len(idents) <= len(victims) + 1
    # What was killed in the middle of its note is no call yet, and swept a minute later.
    notes = qube.directory / "state/calls"
    for unfinished in notes.iterdir():
        assert unfinished.suffix == ".new"
        os.utime(unfinished, (0, 0))
    assert qube.call("pass+vault+mirror", b"x").stdout == b"x"
    assert list(notes.iterdir()) == []


@pytest.mark.alone
@pytest.mark.spec("PROXY-024", "PROXY-052")
def test_kills_at_random_moments(qube: Vm) -> None:
    records_of_all(qube, [one_fault(qube, seed) for seed in range(10)])


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.spec("PROXY-024", "PROXY-052")
def test_a_thousand_kills_at_random_moments(qube: Vm) -> None:
    records_of_all(qube, [one_fault(qube, seed) for seed in range(1000)])


@pytest.mark.spec("PROXY-052")
def test_a_call_whose_proxy_was_killed_has_one_record_as_soon_as_another_starts(qube: Vm) -> None:
    process = qube.start("pass+vault+mirror+first", source="personal")
    eventually(qube.pids)
    assert qube.records() == []
    assert qube.call("pass+vault+mirror", b"x").returncode == 0
    assert [r["source"] for r in qube.records()] == ["work"]
    process.kill()
    process.wait()
    for _ in range(2):
        assert qube.call("pass+vault+mirror", b"x").returncode == 0
    killed = [r for r in qube.records() if r["cause"] == "killed"]
    assert [(r["source"], r["argument"], r["exit_code"]) for r in killed] == [
        ("personal", "first", 125)
    ]
    assert len(qube.records()) == 4


@pytest.mark.spec("PROXY-052")
def test_killed_between_its_record_and_its_end_a_call_has_still_one(tmp_path: Path) -> None:
    audit = Audit(str(tmp_path / "audit.jsonl"))
    unfinished = Unfinished(str(tmp_path / "state"), audit)
    note = unfinished.note("abc", "work", {"id": "abc", "cause": "killed"})
    assert note is not None and unfinished.collect() == 0
    audit.write({"id": "abc", "cause": "done"})
    os.close(note._fd)
    assert unfinished.collect() == 0
    assert not list((tmp_path / "state/calls").iterdir())
    assert audit.path is not None and Path(audit.path).read_text().count("abc") == 1


@pytest.mark.spec("PROXY-052")
def test_without_a_place_for_the_state_calls_are_made_all_the_same(qube: Vm) -> None:
    (qube.directory / "state").write_text("a file")
    assert qube.call("pass+vault+mirror", b"x").stdout == b"x"
    assert len(qube.records()) == 1


@pytest.mark.spec("PROXY-054", "PROXY-055")
def test_calls_at_once_are_bounded_where_each_is_a_process_too(qube: Vm) -> None:
    qube.configure("", "max_calls = 4\nmax_calls_source = 2\n")
    qube.chain("pass", '"pass"')
    running = [qube.start("pass+vault+mirror", source=s) for s in ("work", "work", "personal")]
    eventually(lambda: len(qube.pids()) == 3)
    for source, reason in (("work", "max_calls_source"), ("other", "(max_calls)")):
        if source == "other":
            running.append(qube.start("pass+vault+mirror", source="banking"))
            eventually(lambda: len(qube.pids()) == 4)
        assert qube.call("pass+vault+mirror", b"x", source=source).returncode == 126
        assert all(process.poll() is None for process in running), "it did not wait for a place"
        record = qube.records()[-1]
        assert record["cause"] == "busy" and reason in record["reason"]
    running[0].kill()
    running[0].wait()
    assert qube.call("pass+vault+mirror", b"x", source="work").stdout == b"x"
    for process in running[1:]:
        process.stdin.close()
        assert process.wait(20) == 0


def test_places_of_calls_that_are_over_leave_nothing_behind(qube: Vm) -> None:
    qube.chain("few", "{ use = 'concurrent', limit = 2, per = 'source+service+target' }")
    for argument in ("a", "b", "c"):
        assert qube.call(f"few+vault+mirror+{argument}", b"x").stdout == b"x"
    assert list((qube.directory / "state/concurrent").iterdir()) == []


def test_the_log_of_a_server_does_not_grow_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_log, "_MAX_FILE", 10_000)
    path = tmp_path / "log"
    log = proxy_log.Log(str(path))
    for number in range(1000):
        log.write(f"refused: {number}")
    log.close()
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]
    assert all(file.stat().st_size < 11_000 for file in tmp_path.iterdir())
    assert "refused: 999" in path.read_text() + (tmp_path / "log.1").read_text()


@pytest.mark.spec("PROXY-053")
def test_whatever_is_written_to_the_log_is_one_plain_line(tmp_path: Path) -> None:
    """Also what somebody forgot to escape before it got here."""
    log = proxy_log.Log(str(tmp_path / "log"))
    log.write("a\x1b[31mred\nforged: line\r\u202e\x9b")
    log.of_call("id", 10)("\x07second")
    log.close()
    first, second = (tmp_path / "log").read_bytes().decode("ascii").splitlines()
    assert first.endswith(r": a\x1b[31mred\x0aforged: line\x0d\u202e\x9b")
    assert second.endswith(r": [id] \x07second")
