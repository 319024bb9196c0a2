"""The command line's own parts: what reaches the terminal, what is copied, the log, init."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from sluice.agent import copying
from sluice.agent.terminal import SIZE, TYPED, WINDOW, Frames, frame
from sluice.cli.cp import split
from sluice.cli.escapes import EscapeFilter
from sluice.cli.log import render, wanted
from sluice.cli.main import LAZY, main
from sluice.cli.shell import Outlet
from sluice.domains.system_file import load
from sluice.policy.files import PolicyStore

# --- the filter of escape sequences ----------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (b"plain text\r\n\ttab\a\b", b"plain text\r\n\ttab\a\b"),
        (b"\x1b[31mred\x1b[0m", b"\x1b[31mred\x1b[0m"),
        (b"\x1b[2J\x1b[10;20H\x1b[K", b"\x1b[2J\x1b[10;20H\x1b[K"),
        (b"\x1b[?25l\x1b[?1049h\x1b[?2004h", b"\x1b[?25l\x1b[?1049h\x1b[?2004h"),
        (b"\x1b(B\x1b7\x1b8\x1bM", b"\x1b(B\x1b7\x1b8\x1bM"),
        ("grüße ☃ 🎉".encode(), "grüße ☃ 🎉".encode()),
        # what makes a terminal answer, remember or do
        (b"a\x1b]0;title\x07b", b"ab"),
        (b"a\x1b]52;c;ZXZpbA==\x1b\\b", b"ab"),
        (b"a\x1bP+q544e\x1b\\b", b"ab"),
        (b"a\x1b_hidden\x1b\\b", b"ab"),
        (b"a\x1b^hidden\x1b\\b", b"ab"),
        (b"a\x1bXhidden\x1b\\b", b"ab"),
        (b"a\x1b[6nb\x1b[cb\x1b[5nb\x1b[>cb", b"abbbb"),
        (b"a\x1b[21tb\x1b[8;1;1tb", b"abb"),
        (b"a\x1b[?1000hb\x1b[?1006hb\x1b[?25;1000hb", b"abbb"),
        (b"a\x1b[20hb\x1b[!pb\x1b[0qb\x1b[1;1;1;1;1*yb", b"abbbb"),
        (b"a\x1bcb\x1bZb\x1b#8b", b"abbb"),
        # C1 controls, raw and as UTF-8
        (b"a\x9b6nb\x90x\x9cb", b"a6nbxb"),
        (b"a\xc2\x9b6nb\xc2\x9d0;t\xc2\x9cb", b"a6nb0;tb"),
        # text that runs backwards
        ("a\u202eb\u2066c".encode(), b"abc"),
        # broken
        (b"a\x1b[31\x18b\x1b[31\x1ac", b"abc"),
        (b"a\x1b[\x1b[32mb", b"a\x1b[32mb"),
        (b"a\xff\xfe\xe2\x82b", b"ab"),
        (b"a\x00\x05\x7fb", b"ab"),
        (b"a\x1b[" + b"1;" * 100 + b"mb", b"ab"),
        (b"a\x1b]never ends" + b"x" * 10000, b"a"),
    ],
)
def test_what_passes_the_filter(sent: bytes, shown: bytes) -> None:
    assert EscapeFilter().feed(sent) == shown


@given(st.binary(max_size=200), st.integers(1, 7))
def test_the_filter_does_not_care_how_a_stream_is_cut(data: bytes, size: int) -> None:
    whole = EscapeFilter().feed(data)
    piecewise = EscapeFilter()
    assert (
        b"".join(piecewise.feed(data[at : at + size]) for at in range(0, len(data), size)) == whole
    )
    # What was filtered is fit to be filtered again: nothing forbidden is put together by it.
    assert EscapeFilter().feed(whole) == whole
    assert b"\x1b]" not in whole
    assert b"\x1bP" not in whole


# --- frames of a terminal --------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from([TYPED, WINDOW]), st.binary(max_size=50))), st.integers(1, 9)
)
def test_frames_come_out_as_they_went_in(frames: list[tuple[int, bytes]], size: int) -> None:
    stream = b"".join(frame(kind, body) for kind, body in frames)
    reader = Frames()
    found = [f for at in range(0, len(stream), size) for f in reader.feed(stream[at : at + size])]
    assert found == frames
    assert SIZE.size == 4


# --- copying ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "undone"),
    [
        (b"plain\x1b[2J\x1b[3;4H", b""),
        (b"\x1b[8mhidden", b"\x1b[0m"),
        (b"\x1b[?1049h\x1b[?25l", b"\x1b[?1049l\x1b[?25h"),
        (b"\x1b[?1049;025h\x1b[?1049l", b""),
        (b"\x1b[?07l\x1b[4h", b"\x1b[?7h\x1b[4l"),
        (b"\x1b(0", b"\x1b(B"),
        (b"\x1b[1;2r", b"\x1b7\x1b[r\x1b8"),
        (b"\x1b=", b"\x1b>"),
        (b"\x1b[?1000h", b""),  # did not pass
    ],
)
def test_what_a_stream_left_changed_is_put_back(sent: bytes, undone: bytes) -> None:
    escapes = EscapeFilter()
    escapes.feed(sent)
    assert escapes.undo() == undone
    assert escapes.undo() == b""


@pytest.mark.parametrize(
    "relay",
    ["sh.relay(argv, EscapeFilter())", "with run.screened(1): os.write(1, b'\\33[8mx')"],
)
def test_a_domain_does_not_leave_the_terminal_in_disguise(relay: str) -> None:
    program = (
        "import os, sluice.cli.shell as sh, sluice.cli.run as run\n"
        "from sluice.cli.escapes import EscapeFilter\n"
        "argv = ['/usr/bin/printf', '%b', '\\\\033[8mx']\n"
    )
    master, slave = os.openpty()
    subprocess.run(
        [sys.executable, "-c", program + relay],
        stdin=slave, stdout=slave, stderr=slave, timeout=60, check=True,
    )  # fmt: skip
    os.close(slave)
    shown = b""
    # What was written in two pieces may be read in two; the end of a terminal is an error.
    with contextlib.suppress(OSError):
        while piece := os.read(master, 4096):
            shown += piece
    os.close(master)
    assert shown == b"\x1b[8mx\x1b[0m"


def copy(source: Path, destination: Path) -> list[str]:
    """Send and receive over a pipe."""
    reading, writing = os.pipe()
    skipped: list[str] = []

    def sender() -> None:
        try:
            skipped.extend(copying.send(writing, str(source)))
        except BrokenPipeError:
            pass  # the receiver has given up
        finally:
            os.close(writing)

    thread = threading.Thread(target=sender)
    thread.start()
    try:
        copying.receive(reading, str(destination))
    finally:
        os.close(reading)
        thread.join()
    return skipped


def test_the_sender_does_not_let_everybody_write(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").touch()
    for path in (source, source / "file"):
        path.chmod(0o777)
    before = os.umask(0o027)
    try:
        copy(source, tmp_path / "copy")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "copy/file").stat().st_mode & 0o777 == 0o750


def test_a_tree_arrives_unchanged(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "a/b").mkdir(parents=True)
    (source / "a/b/data").write_bytes(os.urandom(700_000))
    (source / "a/run").write_text("#!/bin/sh\n")
    (source / "a/run").chmod(0o755)
    (source / "empty").touch()
    (source / "link").symlink_to("/etc/passwd")
    os.mkfifo(source / "fifo")
    skipped = copy(source, tmp_path / "copy")
    assert (tmp_path / "copy/a/b/data").read_bytes() == (source / "a/b/data").read_bytes()
    assert (tmp_path / "copy/a/run").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "copy/empty").read_bytes() == b""
    assert not os.path.lexists(tmp_path / "copy/link")
    assert "link" in skipped
    copy(source / "a/run", tmp_path / "single")
    assert (tmp_path / "single").read_text() == "#!/bin/sh\n"


def test_nothing_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    with pytest.raises(copying.CopyError, match="File exists"):
        copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "old"


def test_into_a_directory_under_its_own_name(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    (tmp_path / "there").mkdir()
    (tmp_path / "a").write_text("text")
    copying.send(writing, str(tmp_path / "a"))
    copying.receive(reading, str(tmp_path / "there"), "a")
    assert (tmp_path / "there/a").read_text() == "text"
    copying.send(writing, str(tmp_path / "a"))
    with pytest.raises(copying.CopyError, match="File exists"):
        copying.receive(reading, str(tmp_path / "there"), "a")
    os.close(reading)
    os.close(writing)


def test_an_interrupted_command_ends_by_the_signal() -> None:
    program = "import sluice.cli.common as c\n@c.tell_errors\ndef f(): raise KeyboardInterrupt\nf()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == b""


def test_a_command_whose_output_nobody_takes_ends_without_a_word() -> None:
    program = (
        "import sluice.cli.common as c\n@c.tell_errors\ndef f():\n while 1: print('x' * 99)\nf()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == -signal.SIGPIPE


def test_an_error_of_the_system_is_told_without_its_number() -> None:
    program = "import sluice.cli.common as c\n@c.tell_errors\ndef f(): open('/etc/passwd/x')\nf()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (125, b"sluice: /etc/passwd/x: Not a directory\n")


def stream(*entries: tuple[int, int, int, bytes, bytes]) -> bytes:
    return b"".join(
        copying.HEADER.pack(kind, mode, size, len(name)) + name + body
        for kind, mode, size, name, body in entries
    )


@pytest.mark.parametrize(
    "hostile",
    [
        stream((1, 0o755, 0, b"", b""), (0, 0o644, 1, b"../x", b"x")),
        stream((1, 0o755, 0, b"", b""), (0, 0o644, 1, b"..", b"x")),
        stream((1, 0o755, 0, b"", b""), (0, 0o644, 1, b"/etc/x", b"x")),
        stream((1, 0o755, 0, b"", b""), (0, 0o644, 1, b"a\0b", b"x")),
        stream((1, 0o755, 0, b"", b""), (0, 0o644, 1, b"", b"x")),
        stream((1, 0o755, 0, b"", b""), (2, 0, 0, b"", b""), (0, 0o644, 1, b"y", b"x")),
        stream((1, 0o755, 0, b"", b""), (2, 0, 0, b"", b""), (2, 0, 0, b"", b"")),
        stream((0, 0o644, 1, b"named", b"x")),
        stream((9, 0, 0, b"", b"")),
        stream((3, 0, 0, b"", b"")),
        stream((0, 0o644, 1 << 40, b"", b"short")),
        b"\x00",
        stream(*[(1, 0o755, 0, b"d" if n else b"", b"") for n in range(400)]),
    ],
)
def test_a_hostile_sender_makes_nothing_elsewhere(tmp_path: Path, hostile: bytes) -> None:
    (tmp_path / "in").mkdir()
    reading, writing = os.pipe()
    os.write(writing, hostile)
    os.close(writing)
    with pytest.raises(copying.CopyError):
        copying.receive(reading, str(tmp_path / "in/copy"))
    os.close(reading)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]
    assert {entry.name for entry in (tmp_path / "in").iterdir()} <= {"copy"}


def test_places_of_cp() -> None:
    assert split("work:file") == ("work", "file")
    assert split("work:/abs/file") == ("work", "/abs/file")
    assert split("work:") == ("work", ".")
    assert split("./a:b") is None
    assert split("file") is None
    assert split("1x:y") is None


# --- the log ---------------------------------------------------------------------------------

RECORD = (
    '{"time":"T","id":1,"source":"work","target":"vault","requested_target":"vault",'
    '"service":"test.Add","argument":"x","rule":"f:1","decision":"deny","cause":"no","stages":{"a":2}}'
)


def test_a_record_is_readable() -> None:
    assert render(RECORD) == "T  work -> vault  test.Add+x  deny  by f:1  no  2 ms"


def test_a_broken_record_is_shown_escaped() -> None:
    assert render("\x1b]0;x\x07\n") == "\\x1b]0;x\\x07"


def test_records_can_be_chosen() -> None:
    assert wanted(RECORD, "vault", False)
    assert wanted(RECORD, None, True)
    assert not wanted(RECORD, "other", False)
    assert not wanted(RECORD.replace("deny", "allow"), None, True)


# --- commands --------------------------------------------------------------------------------


def test_every_command_of_the_table_loads() -> None:
    for name in LAZY:
        shown = CliRunner().invoke(main, [name, "--help"])
        assert shown.exit_code == 0, (name, shown.output)


def test_init_writes_a_system_that_loads(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["init", "--root", str(tmp_path)])
    assert done.exit_code == 0, done.output
    system = load(tmp_path / "config/system.toml")
    assert list(system.domains) == ["work", "vault", "untrusted"]
    store = PolicyStore(
        [tmp_path / "config/policy.d"], legacy_directory=tmp_path / "config/policy.legacy"
    )
    store.load()
    assert f"`sluice up --root {tmp_path}`" in done.output
    proxy = tmp_path / "config/template/host/etc/qubes-rpc/qrexec-proxy"
    assert os.readlink(proxy) == "/usr/lib/sluice/bin/qrexec-proxy"
    again = CliRunner().invoke(main, ["init", "--root", str(tmp_path)])
    assert again.exit_code == 125
    assert "there is a system already" in again.output


def test_what_is_held_for_a_domain_goes_with_the_pipe() -> None:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    outlet = Outlet(os.fdopen(writing, "wb"))
    while not outlet.held:
        outlet.send(TYPED, bytes(16384))
    outlet.close()
    outlet.send(WINDOW, SIZE.pack(1, 1))
    assert not outlet.held
    outlet.close()
    os.close(reading)


def test_errors_are_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["up", "--root", str(tmp_path)])
    assert done.exit_code == 125
    assert done.output.count("\n") == 1
    done = CliRunner().invoke(main, ["ls", "--root", str(tmp_path)])
    assert done.exit_code == 125
    assert "Traceback" not in done.output
