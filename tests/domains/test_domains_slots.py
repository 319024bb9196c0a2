"""The file that says which ranges of user ids are whose, when a process is killed over it."""

from __future__ import annotations

import os
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
