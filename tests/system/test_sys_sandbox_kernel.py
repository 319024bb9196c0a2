# ruff: noqa: E501  (what runs inside is written as it runs there)
"""Attempts to get out of a domain through the kernel: each one fails, in each of three modes.

Each test says in a sentence what it tries. Numbers of system calls are those of x86-64; on other
machines those tests are skipped.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator

import pytest
from tests.support.sandbox import MODES, Machine, machine, wait_for

from sluice.domains.sandbox.ids import USER_INSIDE

pytestmark = [pytest.mark.sandbox, pytest.mark.xdist_group("sandbox")]

SETTINGS = """
[domains.work]
[domains.nesting]
features = { "sandbox.allow-userns" = true }
"""

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86-64")


@pytest.fixture(scope="module", params=MODES)
def inside(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A system with the domain ``work``, which is hostile."""
    with machine(request.param, SETTINGS) as made:
        yield made


# --- namespaces and mounts -------------------------------------------------------------------


@x86
def test_mounting(inside: Machine) -> None:
    """Mounts a file system, by the old call and by each of the new ones; unmounts; pivots."""
    code = "[call(165, b'x', b'/tmp', b'tmpfs', 0, None), call(166, b'/proc', 2), call(155, b'/', b'/tmp'), call(430, b'tmpfs', 0), call(428, -100, b'/', 1), call(442, -100, b'/', 0, None, 0), call(429, -1, b'', -100, b'/tmp', 4)]"
    assert inside.value(code) == str(["EPERM"] * 7)


@x86
def test_new_namespaces(inside: Machine) -> None:
    """Makes namespaces of each kind, with unshare and with clone."""
    flags = (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x4000000, 0x8000000, 0x2000000, 0x80)
    assert inside.value(f"[call(272, f) for f in {flags}]") == str(["EPERM"] * len(flags))
    code = f"[call(56, f | 17, 0, 0, 0, 0) for f in {flags[:-1]}]"
    assert inside.value(code) == str(["EPERM"] * (len(flags) - 1))


@x86
def test_where_user_namespaces_are_allowed(inside: Machine) -> None:
    """With the feature of dom0 a domain makes user namespaces, and still none of another kind."""
    assert inside.value("call(272, 0x10000000)", "nesting") == "THROUGH"
    assert inside.value("call(272, 0x10000000 | 0x20000)", "nesting") == "EPERM"
    code = "print(call(272, 0x10000000), call(165, b'x', b'/tmp', b'tmpfs', 0, None), call(272, 0x20000))"
    assert inside.python(code, "nesting") == "THROUGH EPERM EPERM"


@x86
def test_clone3(inside: Machine) -> None:
    """Uses clone3, whose flags a filter cannot see."""
    assert inside.value("call(435, None, 0)") == "ENOSYS"


@x86
def test_joining_namespaces(inside: Machine) -> None:
    """Joins the namespaces of process 1, or its own again with other powers."""
    code = "fd = os.open('/proc/self/ns/user', os.O_RDONLY)\nprint(call(308, fd, 0), call(308, os.pidfd_open(1), 0x10000000))"
    assert inside.python(code) == "EPERM EPERM"


def test_the_host_name(inside: Machine) -> None:
    """Changes the host name, which is the domain's name to those who look."""
    assert inside.value("attempt(socket.sethostname, 'dom0')") == "EPERM"
    assert inside.value("socket.gethostname()") == "work"


# --- the kernel ------------------------------------------------------------------------------

CALLS = {
    "a BPF program": (321, "0, None, 0"),
    "a userfaultfd": (323, "0"),
    "performance counters": (298, "None, 0, -1, -1, 0"),
    "io_uring": (425, "8, None"),
    "io_uring_enter": (426, "0, 0, 0, 0, None, 0"),
    "io_uring_register": (427, "0, 0, None, 0"),
    "a key for the keyring": (248, "b'user', b'x', b'y', 1, -3"),
    "a key on request": (249, "b'user', b'x', None, 0"),
    "the keyrings": (250, "0, -3, 0"),
    "a kernel to boot": (246, "0, 0, None, 0"),
    "a kernel to boot from a file": (320, "0, 0, 0, b'', 0"),
    "a module": (175, "None, 0, b''"),
    "a module from a file": (313, "0, b'', 0"),
    "the removal of a module": (176, "b'x', 0"),
    "a reboot": (169, "0, 0, 0, None"),
    "the kernel's log": (103, "2, None, 0"),
    "the clock": (164, "None, None"),
    "a clock by number": (227, "0, None"),
    "the clock's speed": (159, "None"),
    "swap": (167, "b'/tmp/x', 0"),
    "process accounting": (163, "None"),
    "quotas": (179, "0, None, 0, None"),
    "fanotify": (300, "0, 0"),
    "ports of the machine": (172, "3"),
    "pages of others": (279, "0, 0, None, None, None, 0"),
    "gifted pages": (278, "1, None, 0, 0"),
}


@pytest.fixture(scope="module")
def answers(inside: Machine) -> dict[str, str]:
    """What the kernel answers to each of CALLS, asked in one go."""
    pairs = "".join(f"print({what!r}, call({n}, {a}), sep='=')\n" for what, (n, a) in CALLS.items())
    return dict(line.split("=") for line in inside.python(pairs).splitlines())


@x86
@pytest.mark.parametrize("what", CALLS)
def test_calls_that_reach_the_kernel(answers: dict[str, str], what: str) -> None:
    """Asks the kernel for what no domain needs, and what has been a way out before."""
    assert answers[what] == "EPERM"


@x86
def test_calls_of_x32(inside: Machine) -> None:
    """Makes the same calls by their x32 numbers, by which a filter could be passed."""
    code = "[call(0x40000000 | n, 0, 0, 0) for n in (39, 165, 272, 321)]"
    assert inside.value(code) == str(["ENOSYS"] * 4)


@x86
def test_calls_of_i386(inside: Machine) -> None:
    """Makes system calls through the 32-bit gate, whose numbers mean something else."""
    code = """
import mmap
m = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
# push rbx; mov eax, edi; mov ebx, esi; xor ecx, ecx; xor edx, edx; int 0x80; pop rbx; ret
m.write(bytes.fromhex('53' '89f8' '89f3' '31c9' '31d2' 'cd80' '5b' 'c3'))
gate = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
print([errno.errorcode[-gate(n, 0)] for n in (20, 21, 310, 357)])  # getpid, mount, unshare, bpf
"""
    assert inside.python(code) == str(["ENOSYS"] * 4)


def test_devices(inside: Machine) -> None:
    """Looks for devices beyond the harmless ones, and makes one."""
    found = set(inside.value("' '.join(os.listdir('/dev'))").split())
    harmless = {"null", "zero", "full", "random", "urandom", "tty", "pts", "ptmx", "shm", "log"}
    assert found <= harmless | {"fd", "stdin", "stdout", "stderr", "core", "console"}
    assert inside.value("attempt(os.mknod, '/tmp/sda', 0o60666, os.makedev(8, 0))") == "EPERM"
    assert inside.value("attempt(os.mknod, '/tmp/mem', 0o20666, os.makedev(1, 1))") == "EPERM"


def test_files_of_the_kernel(inside: Machine) -> None:
    """Writes to files below /proc that rule the machine, and reads its memory."""
    for name in (
        "sys/kernel/core_pattern",
        "sysrq-trigger",
        "sys/kernel/modprobe",
        "sys/vm/drop_caches",
        "sys/kernel/hostname",
        "irq/default_smp_affinity",
    ):
        assert inside.value(f"attempt(open, '/proc/{name}', 'w')") in (
            "EACCES",
            "EROFS",
            "ENOENT",
        ), name
    for name in ("kcore", "kmsg", "1/stack", "kpageflags"):
        assert inside.value(f"attempt(lambda: open('/proc/{name}', 'rb').read(1))") in (
            "EACCES",
            "EPERM",
            "ENOENT",
        ), name
    addresses = (
        inside.value("{l.split()[0] for l in open('/proc/kallsyms')} - {'0' * 16}")
        if inside.value("attempt(open, '/proc/kallsyms')") == "THROUGH"
        else "set()"
    )
    assert addresses == "set()"


def test_typing_into_the_terminal(inside: Machine) -> None:
    """Types into the terminal that a command runs on, by TIOCSTI, as if the user had."""
    assert inside.value("attempt(os.open, '/dev/tty', os.O_RDWR)") == "ENXIO"
    code = """
import fcntl
master, slave = os.openpty()
def push(request):
    return attempt(fcntl.ioctl, slave, request, b'x')
print(push(0x5412), push(0x541C), call(16, slave, 0x5412 | 1 << 32, b'x'))
"""
    assert inside.python(code) == "EPERM EPERM EPERM"


@pytest.mark.spec("CORE-180")
def test_raising_the_limits(inside: Machine) -> None:
    """Raises its own limits again."""
    # An unprivileged attempt to raise a hard limit is a ValueError in Python.
    done = inside.shell(
        f"/usr/bin/python3 -c {shlex.quote('import resource; resource.setrlimit(7, (9000, 9000))')}"
    )
    assert b"not allowed to raise maximum limit" in done.stderr
    assert inside.value("__import__('resource').getrlimit(7)") == "(1024, 1024)"
    # Crashes go to nobody, not to the program of the host's core_pattern either.
    code = "__import__('resource').setrlimit(4, (0, 0)), __import__('resource').getrlimit(4)"
    assert inside.value(code) == "None (1, 1)"


def test_scheduling(inside: Machine) -> None:
    """Takes real-time priority, to starve the others."""
    code = "attempt(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(50))"
    assert inside.value(code) == "EPERM"


# --- root inside -----------------------------------------------------------------------------


def needs_root_inside(inside: Machine) -> None:
    if inside.mode == "single":
        pytest.skip("there is no root in a domain with one id")


@x86
def test_root_inside_has_no_power_outside(inside: Machine) -> None:
    """As the domain's root: mounts, makes devices and namespaces, loads modules, sets the clock."""
    needs_root_inside(inside)
    code = "[call(165, b'x', b'/mnt', b'tmpfs', 0, None), call(272, 0x20000), call(272, 0x10000000), call(175, None, 0, b''), attempt(os.mknod, '/run/m', 0o20666, 259), attempt(socket.sethostname, 'x')]"
    assert inside.value(code, user="root") == str(["EPERM"] * 6)


def test_root_inside_cannot_become_a_host_user(inside: Machine) -> None:
    """As the domain's root: becomes the AdminVM's user or host root, gives files to them."""
    needs_root_inside(inside)
    for uid in (inside.uid, 70000, 100000, 1879048192):
        if uid in (0, USER_INSIDE):
            continue  # numbers of its own users
        assert inside.value(f"attempt(os.setuid, {uid})", user="root") == "EINVAL"
        assert inside.value(f"attempt(os.chown, '/rw/config', {uid}, -1)", user="root") == "EINVAL"
    assert inside.value("open('/proc/self/uid_map').read().split()[0]", user="root") == "0"


def test_root_in_a_domain_with_one_id(inside: Machine) -> None:
    """Asks for a service as root where nobody is root: refused, and the log says why."""
    if inside.mode != "single":
        pytest.skip("there is a root here")
    assert inside.shell("id", user="root").returncode == 125
    log = inside.root / "state/log/domains.jsonl"
    wait_for(lambda: log.exists() and "refused to run as" in log.read_text())
