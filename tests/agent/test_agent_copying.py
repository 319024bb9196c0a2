"""Files over a pipe: what a hostile sender cannot make a receiver do."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from sluice.agent import copying


def copy(source: Path, destination: Path, *, reserve: bool = False) -> list[str]:
    """Send and receive over a pipe; what the sender raises comes before what the receiver does."""
    reading, writing = os.pipe()
    outcome: list[BaseException | list[str]] = []

    def sender() -> None:
        try:
            outcome.append(copying.send(writing, str(source)))
        except (copying.CopyError, BrokenPipeError) as error:
            outcome.append(error)
        finally:
            os.close(writing)

    thread = threading.Thread(target=sender)
    thread.start()
    try:
        copying.receive(reading, str(destination), reserve=reserve)
    finally:
        os.close(reading)
        thread.join()
        if isinstance(outcome[0], copying.CopyError):
            raise outcome[0]
    assert isinstance(outcome[0], list)
    return outcome[0]


@pytest.mark.parametrize(
    "name",
    [
        b"a\nb",
        b"a\x1b]0;x",
        b"a\x7f",
        "a\x9b31mb".encode(),  # a C1 control, which some terminals obey
        b"a\x9b31mb",  # likewise, for those that do not read UTF-8
        "a\u202egpj.exe".encode(),  # is shown as aexe.jpg
        "\u2066a".encode(),
    ],
)
def test_names_that_deceive_are_not_made(tmp_path: Path, name: bytes) -> None:
    assert copying.unfit(name)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(name)).touch()
    with pytest.raises(copying.CopyError, match="a name that cannot be"):
        copy(tmp_path / "in", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_names_of_all_languages_are_made(tmp_path: Path) -> None:
    names = {"grüße ☃ 🎉", "שלום", "-rf", "a b", "..."}
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).touch()
    latin = b"gr\xfc\xdfe"  # not UTF-8, and harmless
    (tmp_path / "in" / os.fsdecode(latin)).touch()
    copy(tmp_path / "in", tmp_path / "out")
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == names | {os.fsdecode(latin)}


def test_a_hole_takes_no_room(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(50 << 20)
        file.seek(20 << 20)
        file.write(b"middle")
    copy(tmp_path / "sparse", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "sparse").read_bytes()
    assert (tmp_path / "out").stat().st_blocks * 512 < 2 << 20


def test_a_size_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """On the host: a domain that sends a terabyte of anything does not fill the disk."""
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 43)
    with pytest.raises(copying.CopyError, match="not enough room"):
        copy(tmp_path / "huge", tmp_path / "out", reserve=True)
    assert not (tmp_path / "out").exists()


def test_some_of_the_disk_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / name).touch()
    real = os.statvfs(tmp_path)

    def nearly_full(_: int) -> os.statvfs_result:
        fields = list(real)
        fields[4] = 100  # f_bavail
        return os.statvfs_result(fields)

    def few_files(_: int) -> os.statvfs_result:
        fields = list(real)
        fields[5], fields[7] = 1000, 10  # f_files, f_favail
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "fstatvfs", nearly_full)
    with pytest.raises(copying.CopyError, match="not enough room"):
        copy(tmp_path / "in", tmp_path / "out", reserve=True)
    monkeypatch.setattr(os, "fstatvfs", few_files)
    with pytest.raises(copying.CopyError, match="too many files"):
        copy(tmp_path / "in", tmp_path / "out2", reserve=True)
    copy(tmp_path / "in", tmp_path / "out3")  # inside a domain its own limits hold


def test_half_a_file_does_not_stay(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, copying.HEADER.pack(copying.FILE, 0o644, 1 << 30, 0) + b"the beginning")
    os.close(writing)
    with pytest.raises(copying.CopyError, match="ended too early"):
        copying.receive(reading, str(tmp_path / "out"))
    os.close(reading)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_said_to_be_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(copying.CopyError, match="is neither a file nor a directory"):
            copy(path, tmp_path / "out")


def test_what_cannot_be_read_is_an_error_when_all_else_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "locked", "z"):
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "in/link").symlink_to("a")
    opened = os.open

    def refuse(path: object, *more: object, **named: object) -> int:
        if path == b"locked" and named.get("dir_fd") is not None and not more[0] & os.O_CREAT:  # type: ignore[operator]
            raise PermissionError(13, "Permission denied")  # root may read everything
        return opened(path, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(copying.CopyError, match=r"^locked cannot be read; all else was copied$"):
        copy(tmp_path / "in", tmp_path / "out")
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["a", "z"]
