"""The file that says which ranges of user ids are whose, when a process is killed over it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sluice.domains.sandbox import ids


@pytest.mark.parametrize("killed_at", ["pwrite", "ftruncate"])
def test_slots_outlive_a_kill_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    class Killed(BaseException):
        pass

    def kill(*arguments: object) -> None:
        raise Killed

    path = tmp_path / "ids"
    slots = ids.Slots(path)
    for number in range(1, 30):
        assert slots.take(f"u{number}", tmp_path, 100) == number
    with monkeypatch.context() as patch:
        patch.setattr(os, killed_at, kill)
        with pytest.raises(Killed):
            slots.release("u7")
        with pytest.raises(Killed):
            slots.take("late", tmp_path, 100)
    assert [slots.take(f"u{number}", tmp_path, 100) for number in (1, 15, 29)] == [1, 15, 29]
    assert slots.take("late", tmp_path, 100) in (7, 30)
    assert "\n\n" not in path.read_text()


@pytest.mark.spec("CORE-178")
def test_systems_with_different_bases_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three systems of root, each with a ``uid_base`` of its own: no id belongs to two domains."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(ids, "_mapped_until", lambda base, what: base + 40 * ids.RANGE_SIZE)
    slots = ids.Slots(tmp_path / "ids")
    seen: dict[int, str] = {}
    bases = (None, ids.DEFAULT_BASE + 2 * ids.RANGE_SIZE, ids.DEFAULT_BASE - 70_000, 100_000)
    for number in range(8):
        for system, base in enumerate(bases):
            ours = ids.detect(base)
            uuid = f"u{system}-{number}"
            slot = slots.take(uuid, tmp_path, ours.slots, ours.origin)
            assert slots.take(uuid, tmp_path, ours.slots, ours.origin) == slot
            ((_, first, count),) = ours.map_for(slot).uids
            for uid in (first, first + count - 1):
                assert seen.setdefault(uid, uuid) == uuid
                assert uid >= (base or ids.DEFAULT_BASE)
    slots.release("u2-0")
    assert "u2-0" not in (tmp_path / "ids").read_text()


def test_a_system_that_gets_another_base_keeps_its_old_ids_to_itself(tmp_path: Path) -> None:
    """Its trees still belong to them."""
    slots = ids.Slots(tmp_path / "ids")
    assert slots.take("u1", tmp_path, 10, 0) == 1
    assert slots.take("u1", tmp_path, 10, 100) == 1
    assert slots.take("u2", tmp_path, 10, 0) == 2
    slots.release("u1")
    assert slots.take("u3", tmp_path, 10, 0) == 1


def test_a_range_that_cannot_be_noted_is_not_given(tmp_path: Path) -> None:
    """On a full disk; what was noted before stays."""
    path = tmp_path / "ids"
    assert ids.Slots(path).take("u1", tmp_path, 100) == 1
    code = (
        "import resource, signal, sys, pathlib\n"
        "from sluice.domains.sandbox import ids\n"
        "from sluice.errors import ResourceError\n"
        "size = pathlib.Path(sys.argv[1]).stat().st_size + 5\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "try: ids.Slots(pathlib.Path(sys.argv[1])).take('u2', sys.argv[2], 100)\n"
        "except ResourceError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "no room on the disk" in done.stdout
    assert ids.Slots(path).take("u1", tmp_path, 100) == 1
