"""The parts of a sandbox without one: ids, limits, the filter, the mount plan, hostile trees."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import shutil
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from sluice.agent import inside
from sluice.domains import trees
from sluice.domains.model import DomainConfig
from sluice.domains.paths import Paths
from sluice.domains.registry import Registry
from sluice.domains.sandbox import ids, limits, mounts, namespaces, probe, seccomp, stage
from sluice.domains.sandbox.bubblewrap import Bubblewrap, RunningBubblewrap
from sluice.domains.sandbox.private import TREES, prepare
from sluice.errors import LocalError, ResourceError

UUID = "11111111-1111-4111-8111-111111111111"
DOMAIN = DomainConfig("work", 1, UUID, template="host")


# --- ids -------------------------------------------------------------------------------------


@pytest.mark.spec("CORE-178")
def test_ranges_never_meet() -> None:
    every = ids.Ids(ids.RANGES, ids.DEFAULT_BASE, ids.DEFAULT_BASE, 100 * ids.RANGE_SIZE)
    seen: set[int] = set()
    for slot in range(1, 100):
        made = every.map_for(slot)
        ((inside_first, outside, count),) = made.uids
        assert inside_first == 0
        assert count == ids.RANGE_SIZE
        assert made.root == (outside, outside)
        assert made.user[0] == outside + 1000
        assert 0 not in range(outside, outside + count)
        assert not seen & set(range(outside, outside + count, 1024))
        seen |= set(range(outside, outside + count, 1024))
    with pytest.raises(ResourceError):
        every.map_for(100)


@pytest.mark.spec("CORE-178")
def test_subordinate_ids_are_few_and_apart() -> None:
    every = ids.Ids(ids.SUBORDINATE, 100000, 200000, 65536)
    first, second = every.map_for(1), every.map_for(2)
    assert first.uids == ((0, 100004, 1), (1000, 100005, 1), (65534, 100006, 1))
    assert first.gids == ((0, 200004, 1), (1000, 200005, 1), (65534, 200006, 1))
    assert {line[1] for line in first.uids}.isdisjoint(line[1] for line in second.uids)
    assert every.slots == 16384


def test_the_maps_of_both_namespaces() -> None:
    made = ids.Ids(ids.SUBORDINATE, 100000, 100000, 65536).map_for(1)
    assert namespaces.outer_map(1001, made.uids) == [
        (0, 1001, 1),
        (1, 100004, 1),
        (2, 100005, 1),
        (3, 100006, 1),
    ]
    text, count = namespaces.inner_map(made.uids)
    assert text == "0 1 1\n1000 2 1\n65534 3 1\n"
    assert count == 3
    # Our own id is in the outer map only: nobody inside can become us.
    assert all(line.split()[1] != "0" for line in text.splitlines())


def test_one_id_for_all() -> None:
    made = ids.Ids(ids.SINGLE, 1001, 1001, 1).map_for(5)
    assert not made.has_root
    assert made.uids == ((0, os.geteuid(), 1),)
    assert "read your files" in ids.Ids(ids.SINGLE, 1, 1, 1).sentence()


def test_subordinate_ranges_are_read(tmp_path: Path) -> None:
    path = tmp_path / "subuid"
    path.write_text("other:1:65536\n1234:100000:10\n\nbad\n1234:x:5\n1234:300000:70000\n1234:1:2\n")
    assert ids.subordinate(str(path), 1234) == (300000, 70000)
    assert ids.subordinate(str(path), 4321) is None
    assert ids.subordinate(str(tmp_path / "none"), 1234) is None


def test_slots_are_kept_shared_and_freed(tmp_path: Path) -> None:
    slots = ids.Slots(tmp_path / "ids")
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert slots.take("u1", one, 100) == 1
    assert slots.take("u2", two, 100) == 2
    assert slots.take("u1", one, 100) == 1
    slots.release("u1")
    assert slots.take("u3", one, 100) == 1
    two.rmdir()  # that system is gone, and its slot is free again
    assert slots.take("u4", one, 100) == 2
    with pytest.raises(ResourceError):
        slots.take("u5", one, 3)


def test_slots_of_a_disk_that_is_away_are_kept(tmp_path: Path) -> None:
    slots = ids.Slots(tmp_path / "ids")
    away, here = Path("/nowhere/sluice"), tmp_path
    assert slots.take("u1", away, 100) == 1
    assert slots.take("u2", here, 100) == 2
    assert slots.take("u1", away, 100) == 1
    # Only when nothing else is left does it lose them.
    assert slots.take("u3", here, 3) == 1


def test_root_never_gives_its_own_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(ids, "_mapped_until", lambda base, what: base)
    with pytest.raises(LocalError, match="container"):
        ids.detect()
    with pytest.raises(LocalError, match="ordinary user"):
        ids.detect(single=True)


# --- limits ----------------------------------------------------------------------------------

MOUNTINFO = """\
30 1 0:26 / {root}/pids rw - cgroup cgroup rw,pids
31 1 0:27 / {root}/memory rw - cgroup cgroup rw,memory
32 1 0:28 / {root}/unified rw - cgroup2 cgroup2 rw
"""


def cgroup_tree(tmp_path: Path, unified: str) -> Path:
    """Make something that looks like /proc/self and the hierarchies it names."""
    proc = tmp_path / "proc"
    proc.mkdir()
    for name in ("pids", "memory", "unified"):
        (tmp_path / name / "own").mkdir(parents=True)
    (proc / "mountinfo").write_text(MOUNTINFO.format(root=tmp_path))
    (proc / "cgroup").write_text("2:pids:/own\n1:memory:/own\n0::/own\n")
    (tmp_path / "unified/own/cgroup.controllers").write_text(unified)
    (tmp_path / "unified/own/cgroup.subtree_control").write_text(unified)
    return proc


def test_version_one_is_used_where_version_two_has_nothing(tmp_path: Path) -> None:
    proc = cgroup_tree(tmp_path, "hugetlb\n")
    found = limits.probe(tmp_path / "state", proc=proc)
    assert found.kind("pids") == found.kind("memory") == limits.V1
    assert found.kind("cpu") == limits.NONE


def test_version_two_goes_before_version_one(tmp_path: Path) -> None:
    proc = cgroup_tree(tmp_path, "memory pids\n")
    found = limits.probe(tmp_path / "state", proc=proc, prepare=False)
    assert found.kind("pids") == found.kind("memory") == limits.V2


def test_the_name_of_a_system_is_that_of_its_directory_not_of_a_path(tmp_path: Path) -> None:
    state = tmp_path / "state"
    limits.label_of(state)  # where no system is yet
    state.mkdir()
    own = limits.label_of(state)
    assert limits.label_of(state) == own
    # What another namespace of mounts, as a container has, shows at the same path.
    state.rename(tmp_path / "elsewhere")
    state.mkdir()
    assert limits.label_of(state) != own


@pytest.mark.spec("CORE-172", "CORE-180")
def test_what_nothing_holds_is_published_and_stops_nothing(tmp_path: Path) -> None:
    held = limits.DomainLimits(limits.Controllers({}), "work", limits.Wanted(1 << 40, 10**6, 2))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        held.apply(child.pid)
        by = {limit.name: limit.by for limit in held.limits()}
        assert by == {
            "memory": "rlimit",
            "processes": "rlimit",
            "cpus": "none",
            "descriptors": "rlimit",
        }
        assert resource.prlimit(child.pid, resource.RLIMIT_NOFILE) == (1024, 1024)
        assert resource.prlimit(child.pid, resource.RLIMIT_CORE) == (1, 1)
    finally:
        child.communicate(b"\n")


@pytest.mark.spec("CORE-172")
def test_what_is_not_enforced_is_a_feature_of_dom0(tmp_path: Path) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    paths = Paths(tmp_path / "c", tmp_path / "s", tmp_path / "r")
    sandbox = Bubblewrap(paths, ids=ids.Ids(ids.SINGLE, 1, 1, 1))
    sandbox._controllers = limits.Controllers({})
    registry = Registry([])
    registry.publish(sandbox.findings())
    dom0 = registry.get("dom0")
    assert dom0 is not None
    assert dom0.feature("sandbox.ids") == "single"
    assert dom0.feature("sandbox.unenforced") == "vcpus"
    assert dom0.feature("sandbox.per-process") == "maxmem sandbox.pids-max"


def test_wanted_limits() -> None:
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    domain = DomainConfig("w", 1, UUID, maxmem=1 << 30, features={"sandbox.pids-max": "12"})
    assert limits.wanted(domain) == limits.Wanted(half, 12, 2)
    assert limits.wanted(DomainConfig("w", 1, UUID, maxmem=0, memory=20)).memory == 20 << 20
    odd = DomainConfig("w", 1, UUID, features={"sandbox.pids-max": "-1"})
    assert limits.wanted(odd).pids == limits.DEFAULT_PIDS


def test_groups_that_others_left_are_removed(tmp_path: Path) -> None:
    base = tmp_path / "pids"
    for name in ("sluice-a/work", "sluice-b", "sluice-adminvm", "theirs"):
        (base / name).mkdir(parents=True)
    limits.remove_groups(limits.Controllers({"pids": (limits.V1, base / "sluice-b")}))
    assert sorted(entry.name for entry in base.iterdir()) == [
        "sluice-a",
        "sluice-adminvm",
        "theirs",
    ]


# --- the filter ------------------------------------------------------------------------------


def run_filter(
    program: bytes, number: int, arguments: tuple[int, ...] = (), arch: int = 0xC000003E
) -> int:
    """Interpret classic BPF over a seccomp_data; returns the action."""
    padded = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("<iIQ6Q", number, arch, 0, *padded)
    code = list(struct.iter_unpack("<HBBI", program))
    accumulator, at = 0, 0
    while True:
        operation, true, false, k = code[at]
        at += 1
        if operation == 0x20:  # ld [k]
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif operation == 0x06:  # ret
            return k
        elif operation == 0x54:  # and
            accumulator &= k
        elif operation == 0x05:  # ja
            at += k
        else:
            taken = {
                0x15: accumulator == k,
                0x25: accumulator > k,
                0x35: accumulator >= k,
                0x45: bool(accumulator & k),
            }[operation]
            at += true if taken else false


ALLOW = 0x7FFF0000
REFUSE = 0x00050000


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64")
class TestFilter:
    """The bytecode itself, interpreted; the kernel's own answer is asked in tests/system."""

    program = seccomp.program()

    def test_ordinary_calls_pass(self) -> None:
        for number in (0, 1, 9, 59, 39, 202, 257, 232):
            assert run_filter(self.program, number) == ALLOW
        assert run_filter(self.program, 56, (0x01200011,)) == ALLOW  # fork of the C library
        assert run_filter(self.program, 41, (1, 1, 0)) == ALLOW
        assert run_filter(self.program, 16, (0, 0x5413)) == ALLOW

    def test_terminal_injection_with_any_upper_half(self) -> None:
        for upper in (0, 1, 0xFFFFFFFF):
            action = run_filter(self.program, 16, (0, 0x5412 | upper << 32))
            assert action == REFUSE | errno.EPERM

    def test_families(self) -> None:
        for family in (17, 38, 40, 45, 3, 15, 1 << 31):
            action = run_filter(self.program, 41, (family,))
            assert action == REFUSE | errno.EAFNOSUPPORT, family
        for family in (1, 2, 10, 16):
            assert run_filter(self.program, 41, (family,)) == ALLOW
        for protocol in (6, 9, 12, 21):
            action = run_filter(self.program, 41, (16, 3, protocol))
            assert action == REFUSE | errno.EPROTONOSUPPORT
            assert run_filter(self.program, 41, (2, 3, protocol)) == ALLOW

    def test_protocols_that_are_seldom_seen(self) -> None:
        for family in (2, 10, 2 | 1 << 32):
            for protocol in (33, 115, 132, 136, 256, 132 | 1 << 32):
                action = run_filter(self.program, 41, (family, 1, protocol))
                assert action == REFUSE | errno.EPROTONOSUPPORT
        for protocol in (0, 1, 6, 17, 58, 262):
            assert run_filter(self.program, 41, (2, 1, protocol)) == ALLOW

    def test_where_crashes_go_stays_as_it_is(self) -> None:
        for upper in (0, 1 << 32):
            assert run_filter(self.program, 160, (4 | upper, 1)) == REFUSE
            assert run_filter(self.program, 302, (0, 4 | upper, 1)) == REFUSE
            assert run_filter(self.program, 302, (0, 4 | upper, 1 << 32)) == REFUSE
            assert run_filter(self.program, 302, (0, 4 | upper, 0, 1)) == ALLOW  # to look
        assert run_filter(self.program, 160, (7, 1)) == ALLOW
        assert run_filter(self.program, 302, (0, 7, 1)) == ALLOW

    def test_namespaces(self) -> None:
        for flag in seccomp.CLONE_NAMESPACES:
            assert run_filter(self.program, 272, (flag | 0x400,)) == REFUSE | errno.EPERM
        allowing = seccomp.program(True)
        assert run_filter(allowing, 272, (0x10000000,)) == ALLOW
        assert run_filter(allowing, 272, (0x10000000 | 0x20000,)) == REFUSE | errno.EPERM

    def test_other_architectures(self) -> None:
        assert run_filter(self.program, 1, arch=0x40000003) == REFUSE | errno.ENOSYS
        assert run_filter(self.program, 1 | 0x40000000) == REFUSE | errno.ENOSYS

    def test_every_refused_call(self) -> None:
        import pyseccomp

        refused = 0
        for name in seccomp.REFUSED:
            number = pyseccomp.resolve_syscall(pyseccomp.system_arch(), name)
            if number >= 0:
                assert run_filter(self.program, number) == REFUSE | errno.EPERM, name
                refused += 1
        assert refused > 50


# --- the mount plan --------------------------------------------------------------------------


def test_the_plan_mounts_nothing_on_what_a_domain_wrote(tmp_path: Path) -> None:
    private = tmp_path / "private"
    plan = mounts.Plan()
    mounts.build(plan, DOMAIN, has_root=True, private=private, template=tmp_path, usr=Path("/usr"))
    words = plan.arguments
    plan.close()
    writable = [words[at + 1 : at + 3] for at, word in enumerate(words) if word == "--bind"]
    assert writable == [
        [str(private / "rw"), "/rw"],
        [str(private / "home"), "/home"],
        [str(private / "usrlocal"), "/usr/local"],
    ]
    last = max(words.index(path) for path in ("/rw", "/home"))
    destinations = [
        word for word in words[last + 1 :] if word.startswith(("/rw/", "/home/", "/usr/local/"))
    ]
    assert destinations == []
    assert words[-2:] == ["--remount-ro", "/"]
    assert "/etc/shadow" not in words
    assert "/usr/host-lib" in words


def test_certificates_are_where_fedora_has_them(tmp_path: Path) -> None:
    """Below three directories, of which only what is public is shown: keys lie beside it."""
    for name in ("certs", "private", "misc"):
        (tmp_path / "etc/pki/tls" / name).mkdir(parents=True)
    pem = tmp_path / "etc/pki/ca-trust/extracted/pem/bundle.pem"
    pem.parent.mkdir(parents=True)
    pem.touch()
    (tmp_path / "etc/pki/tls/cert.pem").symlink_to(pem)
    plan = mounts.Plan()
    mounts._etc(plan, DOMAIN, True, tmp_path)
    plan.close()
    words = plan.arguments
    last = {word: at for at, word in enumerate(words)}  # after the sources, where it is one, too
    assert last["/etc/pki"] < last["/etc/pki/tls"] < last["/etc/pki/tls/cert.pem"]
    shown = {word for word in words if word.startswith("/etc/pki/")}
    assert shown >= {
        *("/etc/pki/tls", "/etc/pki/tls/certs", "/etc/pki/tls/cert.pem"),
        *("/etc/pki/ca-trust", "/etc/pki/ca-trust/extracted"),
    }
    assert not [word for word in words if word.endswith(("private", "misc"))]
    assert words[words.index("/etc/pki/tls/cert.pem") - 1] == str(pem)


def test_additions_to_a_template_win(tmp_path: Path) -> None:
    directory = tmp_path / "etc/qubes-rpc"
    directory.mkdir(parents=True)
    (directory / "test.Add").write_text("#!/bin/sh\n")
    (directory / "test.Add").chmod(0o755)
    (directory / "test.Tcp").symlink_to("/dev/tcp/127.0.0.1/80")
    plan = mounts.Plan()
    mounts._etc(plan, DOMAIN, True, tmp_path)
    words = plan.arguments
    at = words.index("/etc/qubes-rpc/test.Add")
    assert words[at - 4 : at - 1] == ["--perms", "0755", "--file"]
    assert os.pread(int(words[at - 1]), 100, 0) == b"#!/bin/sh\n"
    assert words[words.index("/etc/qubes-rpc/test.Tcp") - 1] == "/dev/tcp/127.0.0.1/80"
    plan.close()


# --- hostile trees ---------------------------------------------------------------------------


def hostile_tree(root: Path) -> None:
    """Make a tree with everything that makes removing hard."""
    outside = root / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    tree = root / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(outside)
    (tree / "up").symlink_to("..")
    (tree / "dangling").symlink_to("/nowhere")
    os.link(outside / "kept", tree / "hard")
    os.mkfifo(tree / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tree)
        server.bind("sock")
        os.chdir(here)
    (tree / "locked").mkdir()
    (tree / "locked/file").write_text("x")
    (tree / "locked/deeper").mkdir()
    (tree / "locked/deeper").chmod(0)
    (tree / "locked").chmod(0)
    (tree / "-rf").mkdir()
    (tree / "new\nline").write_text("")
    (tree / ".moved-1").write_text("in the way")
    (tree / ".moved-2").mkdir()
    descriptor = os.open(tree, os.O_RDONLY)
    for _ in range(1500):  # far deeper than a path, or a stack of calls, can be
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)


@pytest.mark.spec("CORE-174")
def test_removing_exactly_the_tree(tmp_path: Path) -> None:
    hostile_tree(tmp_path)
    parent = os.open(tmp_path, os.O_RDONLY)
    try:
        trees.remove_tree(parent, "tree")
        trees.remove_tree(parent, "tree")  # absent is success
    finally:
        os.close(parent)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["outside"]
    assert (tmp_path / "outside/kept").read_text() == "kept"


@pytest.mark.spec("CORE-174")
def test_removing_a_link_leaves_what_it_means(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_text("x")
    (tmp_path / "link").symlink_to("real")
    parent = os.open(tmp_path, os.O_RDONLY)
    trees.remove_tree(parent, "link")
    for name in ("", ".", "..", "a/b"):
        with pytest.raises(ValueError, match="one name"):
            trees.remove_tree(parent, name)
    os.close(parent)
    assert (tmp_path / "real/file").exists()
    assert not (tmp_path / "link").is_symlink()


# --- furnishing ------------------------------------------------------------------------------


def test_laying_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").symlink_to(outside)
    (root / "b").mkdir()
    (root / "b/file").symlink_to(outside / "target")
    archive = b"".join(
        (
            inside.pack(inside.EACH_START, 0o644, "/a/file", b"1"),
            inside.pack(inside.EACH_START, 0o755, "/b/file", b"2"),
            inside.pack(inside.EACH_START, 0o644, "/c/d/e", b"3"),
            inside.pack(inside.FIRST_START, 0o644, "/rw/config/rc.local", b"4"),
        )
    )
    failures = inside.furnish(archive, -1, str(root))
    assert len(failures) == 1
    assert failures[0].startswith("/a/file: ")
    assert list(outside.iterdir()) == []
    assert (root / "b/file").read_bytes() == b"2"
    assert not (root / "b/file").is_symlink()
    assert stat.S_IMODE((root / "b/file").stat().st_mode) == 0o755
    assert (root / "c/d/e").read_bytes() == b"3"
    (root / "rw/config/rc.local").write_text("mine")
    inside.furnish(archive, -1, str(root))
    assert (root / "rw/config/rc.local").read_text() == "mine"  # the first start is over


# --- the probe -------------------------------------------------------------------------------


def test_the_doctor_finds_what_stands_in_the_way(tmp_path: Path) -> None:
    findings = probe.examine(tmp_path)
    names = [finding.what for finding in findings]
    assert len(names) == len(set(names))
    for finding in findings:
        assert finding.state in (probe.GOOD, probe.WEAK, probe.BAD)
        assert finding.state == probe.GOOD or finding.follows
    broken = [
        probe.Finding(f.what, probe.BAD, "no", "x") if f.what == "namespaces" else f
        for f in findings
    ]
    assert probe.level(broken) == 0
    assert [f.what for f in probe.obstacles(broken, "bubblewrap")][0:1] == ["namespaces"]
    assert probe.obstacles(findings, "process") == []


def test_users_of_a_domain_can_enter_its_trees_whatever_umask_we_have(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        made = asyncio.run(prepare(tmp_path / "work", DOMAIN, ids.single_map(), None))
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((made / name).stat().st_mode) for name in TREES}
    assert modes == dict.fromkeys(TREES, 0o755)
    assert stat.S_IMODE(made.stat().st_mode) == stat.S_IMODE(made.parent.stat().st_mode) == 0o700


def test_what_domains_cannot_read_is_found_before_they_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout made with umask 077: to ids of its own a domain's programs are unreadable."""
    (tmp_path / "bin").mkdir()
    first = tmp_path / "bin/sluice-domain-init"
    first.write_text("")
    monkeypatch.setattr(mounts.runtime, "package_directory", lambda: str(tmp_path))
    own, one = ids.Ids(ids.SUBORDINATE, 100000, 100000, 65536), ids.Ids(ids.SINGLE, 0, 0, 0)
    paths = Paths.find(str(tmp_path / "system"))
    for directory, file in ((0o700, 0o644), (0o755, 0o600)):
        tmp_path.chmod(directory)
        first.chmod(file)
        with pytest.raises(LocalError, match=f"chmod -R o\\+rX {tmp_path}$"):
            Bubblewrap(paths, ids=own)
        Bubblewrap(paths, ids=one).close()
    tmp_path.chmod(0o755)
    first.chmod(0o644)
    Bubblewrap(paths, ids=own).close()


def test_descriptors_are_closed_where_a_disposable_cannot_be_removed() -> None:
    async def forget() -> None:
        raise ResourceError("no process for it")

    class Held:
        def remove(self) -> bool:
            return True

    async def main() -> None:
        console, writing = os.pipe()
        os.close(writing)
        process = subprocess.Popen(["true"])
        staged = stage.Staged(process, os.pidfd_open(process.pid), console)
        running = RunningBubblewrap(staged, Held())  # type: ignore[arg-type]
        running.forget = forget
        os.close(running.stderr_fd)
        await running.wait()
        await running.clean()
        assert (staged.pidfd, staged.console, running.pidfd) == (-1, -1, -1)

    asyncio.run(main())
