"""The shipped example as it stands, the kind without isolation, and copies to and from a domain."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.sandbox import MODES, Machine, machine, remove, wait_for

from sluice.domains.model import DomainConfig
from sluice.domains.paths import Paths
from sluice.domains.sandbox.process import MARK, WARNING, Process, own_user

pytestmark = [pytest.mark.sandbox, pytest.mark.xdist_group("sandbox")]

SETTINGS = """
[domains.work]
[domains.dvm]
template_for_dispvms = true
[domains.disp1]
class = "DispVM"
template = "dvm"
"""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name is short enough for sockets below it."""
    path = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    remove(path)


def sluice(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sluice", "--root", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_the_example_runs_as_it_stands(short: Path) -> None:
    up = sluice(short, "up", "--detach", str(ROOT / "examples/system.toml"))
    try:
        assert "ready: 4 of 5 domains run" in up.stderr, up.stderr
        add = "qrexec-client-vm vault test.Add /usr/local/bin/our_test_add_client 1 2"
        assert sluice(short, "run", "work", "--", *add.split()).stdout == "3\n"
        time = ("qrexec-client-vm", "dom0", "demo.Time")
        assert sluice(short, "run", "work", "--", *time).stdout.startswith("work asked at")
        assert sluice(short, "run", "untrusted", "--", *time).returncode == 126
        assert "vault" in sluice(short, "ls").stdout
        wait_for(lambda: "test.Add" in sluice(short, "log").stdout)
        again = sluice(short, "up", str(ROOT / "examples/system.toml"))
        assert again.returncode == 125
        assert "runs here already" in again.stderr
    finally:
        down = sluice(short, "down")
    assert down.returncode == 0, down.stderr
    assert list((short / "run/daemon").iterdir()) == []


def test_a_domain_without_isolation(short: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It greets like any other, says at each start what it is, and leaves nothing when killed."""

    async def run() -> None:
        paths = Paths.find(str(short))
        paths.create()
        domain = DomainConfig("work", 1, "1" * 8, kind="process", default_user=own_user())
        sandbox = Process(paths)
        assert sandbox.privilege() == WARNING
        ours, theirs = socket.socketpair()
        running = await sandbox.start(domain, theirs)
        theirs.close()
        ours.setblocking(False)
        async with asyncio.timeout(60):
            greeting = await asyncio.get_running_loop().sock_recv(ours, 12)
        assert greeting[:4] == b"\x00\x03\x00\x00"
        # Something that the agent would not know of, with the mark of the run in its environment.
        mark = environment(running.pid)[MARK]
        # Several, and at once: some of them are seen in the middle of their execve.
        strays = [
            subprocess.Popen(["sleep", "1000"], env={MARK: mark}, start_new_session=True)
            for _ in range(20)
        ]
        running.kill()
        await running.wait()
        assert [stray.wait(30) for stray in strays] == [-9] * len(strays)
        await running.clean()
        os.close(running.stderr_fd)
        ours.close()
        assert not (paths.domains / "work").exists()
        assert {limit.by for limit in running.limits()} == {"none"}

    asyncio.run(run())
    assert "work: NO ISOLATION" in capfd.readouterr().err


def test_a_disposable_without_isolation_forgets(short: Path) -> None:
    """What it wrote is gone with it, and what a killed AdminVM left is gone with the next one."""

    async def run() -> None:
        paths = Paths.find(str(short))
        paths.create()
        domain = DomainConfig(
            "disp1", 1, "1" * 8, klass="DispVM", kind="process", default_user=own_user()
        )
        sandbox = Process(paths)
        ours, theirs = socket.socketpair()
        running = await sandbox.start(domain, theirs)
        theirs.close()
        tree = paths.appvms / "disp1/disposable"
        (tree / "home/user/secret").write_text("secret")
        running.kill()
        await running.wait()
        await running.clean()
        os.close(running.stderr_fd)
        ours.close()
        assert not tree.exists()
        for name in ("disp1", "no-longer-in-the-file"):
            for left in ("disposable", "private", "process"):
                (paths.appvms / name / left / "home").mkdir(parents=True)
        assert await sandbox.sweep() == []
        for name in ("disp1", "no-longer-in-the-file"):
            left_now = sorted(entry.name for entry in (paths.appvms / name).iterdir())
            assert left_now == ["private", "process"]

    asyncio.run(run())


def environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


@pytest.fixture(params=MODES)
def inside(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with machine(request.param, SETTINGS) as made:
        yield made


def test_a_disposable_forgets(inside: Machine) -> None:
    """What a disposable wrote is gone at its next start, and from the disk when it has stopped."""
    from sluice.adminvm.api import request

    control = inside.root / "run/control.sock"
    request(control, "start", name="disp1")
    assert (
        inside.shell("echo secret > kept; mkdir -m 0 locked; cat kept", "disp1").stdout
        == b"secret\n"
    )
    tree = inside.root / "state/appvms/disp1/disposable"
    assert tree.exists()
    request(control, "stop", name="disp1")
    assert not tree.exists()
    request(control, "start", name="disp1")
    assert inside.shell("ls", "disp1").stdout == b""
    # Killed, the AdminVM cannot remove it; the next one does, and starts no disposable for that.
    inside.shell("echo secret > kept; mkdir -m 0 locked", "disp1")
    assert inside.process is not None
    inside.process.kill()
    inside.process.wait()
    inside.log.close()
    inside.up()
    assert request(control, "state", name="disp1") == "Halted"
    assert not tree.exists()
    inside.shell("echo kept > kept")
    request(control, "stop", name="work")
    request(control, "start", name="work")
    assert inside.shell("cat kept").stdout == b"kept\n"


def test_what_a_domain_kept_can_be_removed(inside: Machine) -> None:
    """All of it goes, locked directories too; the next domain of that name is another one."""
    inside.shell("mkdir -p a/b; echo x > a/b/c; chmod 0 a; ln -s / link; cat /etc/machine-id")
    before = inside.shell("cat /etc/machine-id").stdout
    refused = wipe(inside)
    assert refused.returncode == 125
    assert "runs here already" in refused.stderr
    inside.down()
    held = 0 if inside.mode == "single" else 1
    assert slots(inside).count(str(inside.root / "state")) == held
    assert wipe(inside).returncode == 0
    assert not (inside.root / "state/appvms/work").exists()
    assert slots(inside).count(str(inside.root / "state")) == 0
    assert (inside.root / "state/appvms").exists()
    assert wipe(inside).returncode == 125
    inside.up()
    assert inside.shell("ls").stdout == b""
    assert inside.shell("cat /etc/machine-id").stdout != before


def slots(inside: Machine) -> str:
    """Return the file that says which user ids are whose."""
    own = inside.root / "user/.local/state/sluice/ids"
    path = Path("/var/lib/sluice/ids") if inside.mode == "ranges" else own
    if not path.exists():
        return ""
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # systems of others begin and end meanwhile
        return file.read()


def wipe(inside: Machine) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        inside.sluice("wipe", "--yes", "work"),
        capture_output=True,
        text=True,
        timeout=100,
        env=inside.environment,
        cwd="/",
        check=False,
    )


def test_copies_to_a_domain_and_back(inside: Machine) -> None:
    """A tree goes in and comes out again; links that the domain made lead nowhere on the host."""
    source = inside.root / "user/tree"
    (source / "a").mkdir(parents=True)
    (source / "a/file").write_text("content")
    (source / "a/file").chmod(0o750)
    if inside.user is not None:
        subprocess.run(["chown", "-R", inside.user, str(source)], check=True)

    def cp(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            inside.sluice("cp", *words),
            capture_output=True,
            text=True,
            timeout=100,
            env=inside.environment,
            cwd="/",
            check=False,
        )

    done = cp(str(source), "work:tree")
    assert done.returncode == 0, done.stderr
    assert inside.shell("cat tree/a/file; stat -c %a tree/a/file").stdout == b"content750\n"
    inside.shell("ln -s /etc/passwd tree/link; ln -s /etc tree/a/up; mkfifo tree/fifo")
    back = inside.root / "user/back"
    done = cp("work:tree", str(back))
    assert done.returncode == 0, done.stderr
    assert (back / "a/file").read_text() == "content"
    assert sorted(p.name for p in back.rglob("*")) == ["a", "file"]
    # Into what is a directory already, under its own name; nothing is replaced.
    for there in ("work:", "work:/home/user/tree", "work:tree/a"):
        done = cp(str(source / "a/file"), there)
        assert done.returncode == (1 if there == "work:tree/a" else 0), done.stderr
    assert inside.shell("cat file tree/file").stdout == b"contentcontent"
    assert cp("work:tree/file", str(back)).returncode == 0
    assert (back / "file").read_text() == "content"
    assert cp("work:/etc/passwd", str(back / "file")).returncode == 1
    assert cp("work:", str(back)).returncode == 125  # under which name?
    assert cp("work:nothing", str(inside.root / "user/x")).returncode == 1
    inside.shell("mkdir -p out; cp /bin/true out/x; echo evil > 'out/a\033]0;x'")
    assert cp("work:out", str(inside.root / "user/out")).returncode == 1
    assert [p.name for p in (inside.root / "user/out").iterdir()] in ([], ["x"])
