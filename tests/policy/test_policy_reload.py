"""No decision by a part of a policy: docs/spec/policy.md section 18.5, POL-253 to 255."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.policy import FIXTURE, brief

from sluice.errors import PolicyError
from sluice.policy import files
from sluice.policy.evaluation import Policy
from sluice.policy.files import DiskFiles, PolicyStore, changing
from sluice.policy.problems import PolicyLoadError, PolicySyntaxError
from sluice.policy.rules import Request

ALLOW = "t.S * work vault allow\n"
DENY = "t.S * work vault deny\n"


class Time:
    """A clock; sleeping moves it, and runs what was planned for the time that passes."""

    def __init__(self) -> None:
        self.now = 5000.0
        self.planned: list[tuple[float, Callable[[], None]]] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        until = self.now + seconds
        while due := [entry for entry in self.planned if entry[0] <= until]:
            entry = min(due, key=lambda entry: entry[0])
            self.planned.remove(entry)
            self.now = max(self.now, entry[0])
            entry[1]()
        self.now = max(self.now, until)

    def plan(self, after: float, action: Callable[[], None]) -> None:
        self.planned.append((self.now + after, action))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A policy directory with one file that was written long ago."""
    place = tmp_path / "policy.d"
    place.mkdir()
    (place / "10-a.policy").write_text(ALLOW)
    return place


def store(directory: Path, clock: Time) -> PolicyStore:
    """Return a store on that time."""
    return PolicyStore([directory], clock=clock.clock, sleep=clock.sleep)


def decision(policy: Policy) -> str:
    """Return the decision on the call that all these tests make."""
    return brief(policy.evaluate(Request.of("t.S", "work", "vault"), FIXTURE))


def test_unchanged_is_not_read_again(directory: Path) -> None:
    """The very same policy, as long as no stamp changes."""
    clock = Time()
    policies = store(directory, clock)
    first = policies.current()
    assert policies.current() is first
    assert policies.generation == 1


@pytest.mark.spec("POL-192", "POL-193")
def test_changes_take_effect(directory: Path) -> None:
    """Written, created, removed, moved, broken and mended: the next decision knows."""
    clock = Time()
    policies = store(directory, clock)
    assert decision(policies.current()) == "allow vault"
    (directory / "10-a.policy").write_text(DENY)
    assert decision(policies.current()) == "deny POLICY-DENY"
    (directory / "05-b.policy").write_text(ALLOW)
    assert decision(policies.current()) == "allow vault"
    (directory / "05-b.policy").rename(directory / "20-b.policy")
    assert decision(policies.current()) == "deny POLICY-DENY"
    (directory / "10-a.policy").unlink()
    assert decision(policies.current()) == "allow vault"
    (directory / "20-b.policy").write_text("broken\n")
    for _ in range(3):
        with pytest.raises(PolicySyntaxError, match=r"20-b\.policy:1: wrong number"):
            policies.current()
    (directory / "20-b.policy").write_text(ALLOW)
    assert decision(policies.current()) == "allow vault"


def later(path: Path) -> None:
    """Wait until what is written now gets another change time; some clocks of files are coarse."""
    probe = path.parent.with_name("probe")  # beside the directory, which stays as it is
    while True:
        probe.write_text("")
        if probe.stat().st_ctime_ns > path.stat().st_ctime_ns:
            probe.unlink()
            return
        time.sleep(0.001)


def test_same_size_and_time(directory: Path) -> None:
    """A change that keeps size and mtime is seen by the change time, which nobody can set."""
    clock = Time()
    policies = store(directory, clock)
    path = directory / "10-a.policy"
    path.write_text("t.S * work vault ask  \n")
    before = path.stat()
    assert decision(policies.current()) == "ask {vault}"
    later(path)
    path.write_text("t.S * work vault deny \n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert decision(policies.current()) == "deny POLICY-DENY"


def test_includes_and_links_are_stamped(directory: Path, tmp_path: Path) -> None:
    """What is reached by include, by link, and what was not there yet."""
    clock = Time()
    outside = tmp_path / "outside"
    (directory / "10-a.policy").write_text(f"!include {outside}\n")
    policies = store(directory, clock)
    with pytest.raises(PolicySyntaxError, match="not a file"):
        policies.current()
    outside.write_text(ALLOW)
    assert decision(policies.current()) == "allow vault"
    outside.write_text(DENY)
    assert decision(policies.current()) == "deny POLICY-DENY"
    target = tmp_path / "target"
    (directory / "00-link.policy").symlink_to(target)
    assert decision(policies.current()) == "deny POLICY-DENY"
    target.write_text(ALLOW)
    assert decision(policies.current()) == "allow vault"


@pytest.mark.spec("POL-194")
def test_legacy_directory_is_stamped(directory: Path, tmp_path: Path) -> None:
    """Changes there take effect, too."""
    clock = Time()
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    (directory / "10-a.policy").write_text("!compat-4.0\n")
    policies = PolicyStore(
        [directory],
        legacy_directory=legacy,
        clock=clock.clock,
        sleep=clock.sleep,
    )
    assert decision(policies.current()) == "deny NO-MATCH"
    (legacy / "t.S").write_text("work vault allow")
    assert decision(policies.current()) == "allow vault"


@pytest.mark.spec("POL-253")
def test_truncated_and_rewritten(directory: Path) -> None:
    """A prefix of the new file parses, and would allow; no call sees it."""
    clock = Time()
    path = directory / "10-a.policy"
    path.write_text(DENY)
    policies = store(directory, clock)
    policies.current()
    path.write_text("")  # truncated, and then written in two pieces
    clock.plan(0.03, lambda: path.write_text(ALLOW))
    clock.plan(0.09, lambda: path.write_text("t.S * work * deny\n" + ALLOW))
    started = clock.now
    assert decision(policies.current()) == "deny POLICY-DENY"
    assert clock.now - started >= 0.1


@pytest.mark.spec("POL-253")
def test_changed_while_it_is_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stamps that differ after reading: what was read is thrown away."""
    clock = Time()
    path = directory / "10-a.policy"
    policies = store(directory, clock)
    read = DiskFiles.read
    times = []

    def slow(self: DiskFiles, name: str) -> bytes:
        content = read(self, name)
        times.append(name)
        if len(times) == 1:
            path.write_text(DENY)
        return content

    monkeypatch.setattr(DiskFiles, "read", slow)
    clock.now += 1
    assert decision(policies.current()) == "deny POLICY-DENY"
    assert len(times) >= 2


@pytest.mark.spec("POL-254")
def test_never_at_rest(directory: Path) -> None:
    """Two seconds of changes deny the call; rest serves the next, without restart."""
    clock = Time()
    path = directory / "10-a.policy"
    policies = store(directory, clock)
    policies.current()

    def churn() -> None:
        path.write_text(ALLOW + "#" * int(clock.now * 1000 % 977) + "\n")
        if busy:
            clock.plan(0.05, churn)

    busy = True
    churn()
    started = clock.now
    with pytest.raises(PolicyLoadError, match="keeps changing") as caught:
        policies.current()
    assert not isinstance(caught.value, PolicySyntaxError)
    assert 1.9 < clock.now - started < 2.2
    busy = False
    clock.planned.clear()
    assert decision(policies.current()) == "allow vault"


@pytest.mark.spec("POL-255")
def test_two_files_under_the_lock(directory: Path) -> None:
    """Who changes two files holds the lock; no call sees one of them only."""
    clock = Time()
    policies = store(directory, clock)
    policies.current()
    lock = changing(directory)
    lock.__enter__()
    (directory / "05-b.policy").write_text("t.S * work @anyvm allow target=mail\n")

    def second() -> None:
        (directory / "01-c.policy").write_text(DENY)
        lock.__exit__(None, None, None)

    clock.plan(1.0, second)
    started = clock.now
    assert decision(policies.current()) == "deny POLICY-DENY"
    assert clock.now - started >= 1.0


@pytest.mark.spec("POL-255", "POL-254")
def test_lock_that_is_never_released(directory: Path) -> None:
    """Nobody waits for ever; what did not change yet is served meanwhile."""
    clock = Time()
    policies = store(directory, clock)
    with changing(directory), pytest.raises(PolicyLoadError, match="keeps changing"):
        policies.current()
    policies.current()
    with changing(directory):
        assert decision(policies.current()) == "allow vault"


@pytest.mark.spec("POL-253")
def test_old_times_are_no_sign_of_rest(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncating sets the size before the times: an empty file that looks old is waited for."""
    clock = Time()
    path = directory / "10-a.policy"
    path.write_text(DENY)
    policies = store(directory, clock)
    policies.current()
    real = files.stamp
    half = [True]

    def stamp(name: str) -> files.Stamp:
        found = real(name)
        if found is None or not half or not name.endswith("10-a.policy"):
            return found
        return (1, found[1], found[2], 1, *found[4:])  # times of 1970

    def finish() -> None:
        half.clear()
        path.write_text(DENY)

    monkeypatch.setattr(files, "stamp", stamp)
    path.write_text("")
    clock.plan(0.05, finish)
    assert decision(policies.current()) == "deny POLICY-DENY"


def test_a_change_waits_once(directory: Path) -> None:
    """What has rested is not waited for again; a change costs its quiet period, not more."""
    clock = Time()
    policies = store(directory, clock)
    for text in (ALLOW, DENY, ALLOW):
        (directory / "10-a.policy").write_text(text)
        started = clock.now
        policies.current()
        assert clock.now - started == pytest.approx(0.1)
        policies.current()
        assert clock.now - started == pytest.approx(0.1)


@pytest.mark.spec("POL-012", "POL-193")
def test_missing_directory_comes_back(directory: Path) -> None:
    """A failure that is no syntax error is not remembered."""
    clock = Time()
    policies = store(directory, clock)
    policies.current()
    away = directory.with_name("away")
    directory.rename(away)
    for _ in range(2):
        with pytest.raises(PolicyLoadError, match="cannot be read"):
            policies.current()
    away.rename(directory)
    assert decision(policies.current()) == "allow vault"


def test_unchanged_files_are_not_parsed_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a change of one file only that one is parsed."""
    clock = Time()
    (directory / "20-b.policy").write_text(ALLOW)
    policies = store(directory, clock)
    policies.current()
    parsed = []

    def parse(path: str, content: bytes, fixed: tuple[str, str] | None) -> object:
        parsed.append(os.path.basename(path))
        return original(path, content, fixed)

    original = files.parse_file
    monkeypatch.setattr(files, "parse_file", parse)
    (directory / "20-b.policy").write_text(DENY)
    policies.current()
    assert set(parsed) == {"20-b.policy"}


def test_async_store_shares_one_reload(directory: Path) -> None:
    """Fifty waiting calls cause one reload, and all get its policy or its error."""

    async def run() -> None:
        policies = PolicyStore([directory], quiet=0.02)
        found = await asyncio.gather(*(policies.current_async() for _ in range(50)))
        assert all(policy is found[0] for policy in found)
        assert policies.generation == 1
        (directory / "10-a.policy").write_text("broken\n")
        errors = await asyncio.gather(
            *(policies.current_async() for _ in range(20)), return_exceptions=True
        )
        assert all(isinstance(error, PolicySyntaxError) for error in errors)
        (directory / "10-a.policy").unlink()
        directory.rmdir()
        errors = await asyncio.gather(
            *(policies.current_async() for _ in range(20)), return_exceptions=True
        )
        assert all(isinstance(error, PolicyLoadError) for error in errors)

    asyncio.run(run())


def test_async_store_survives_cancelled_callers(directory: Path) -> None:
    """A caller that goes away does not take the reload with it."""

    async def run() -> None:
        policies = PolicyStore([directory], quiet=0.02)
        first = asyncio.ensure_future(policies.current_async())
        second = asyncio.ensure_future(policies.current_async())
        await asyncio.sleep(0)
        first.cancel()
        assert decision(await second) == "allow vault"
        assert first.cancelled()

    asyncio.run(run())


@pytest.mark.spec("POL-253", "POL-254")
def test_writer_in_earnest(directory: Path) -> None:
    """A thread truncates and rewrites the file in pieces while calls arrive: never a part."""
    path = directory / "10-a.policy"
    # In whole the second line denies; each prefix that ends after the first allows.
    whole = "t.S * vault work allow\n" + "#" * 5000 + "\nt.S * @anyvm @anyvm deny\n"
    late = "t.S * work mail allow\n" + whole + "t.S * work vault allow\n"
    path.write_text(whole)
    policies = PolicyStore([directory], quiet=0.06, patience=1.0)
    policies.current()
    stop = threading.Event()
    # A writer that rests within a file for as long as a file is waited for shows nothing of the
    # store. It does where the machine does not let it run.
    rests = [0.0]
    touched: list[float] = []

    def rested() -> float:
        return max(rests[0], *(time.monotonic() - when for when in touched[-1:]), 0.0)

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            text = whole if number % 2 else late
            touched.append(time.monotonic())
            with path.open("w") as stream:
                for start in range(0, len(text), 700):
                    stream.write(text[start : start + 700])
                    stream.flush()
                    rests[0] = rested()
                    touched.append(time.monotonic())
                    stop.wait(0.001)
            rests[0] = rested()
            touched.clear()
            stop.wait(0.12)

    writer = threading.Thread(target=write)
    writer.start()
    seen: dict[int, int] = {}
    deadline = time.monotonic() + 2.0
    try:
        while time.monotonic() < (deadline if seen else deadline + 40):
            rests[0] = 0.0
            try:
                policy = policies.current()
            except PolicyError:
                continue
            if rested() > 0.03:
                continue
            count = len(policy.rules)
            seen[count] = seen.get(count, 0) + 1
            denied = policy.evaluate(Request.of("t.S", "sys-usb", "vault"), FIXTURE)
            assert brief(denied) == "deny POLICY-DENY"
    finally:
        stop.set()
        writer.join()
    assert set(seen) <= {2, 4}
    assert seen
