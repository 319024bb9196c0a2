# ruff: noqa: E501  (what runs inside is written as it runs there)
"""More attempts to get out of a domain or across to another, in each of three modes; and what a
stop, a kill or another system finds of it. Each test says in a sentence what it tries.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.sandbox import MODES, Machine, groups, hostile_machine, wait_for
from tests.support.system import descendants

from sluice.adminvm.api import request
from sluice.domains.sandbox.limits import label_of

pytestmark = [pytest.mark.sandbox, pytest.mark.xdist_group("sandbox")]

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86-64")


@pytest.fixture(scope="module", params=MODES)
def inside(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A system with the domains ``work``, which is hostile, and ``peer``."""
    with hostile_machine(request.param) as made:
        yield made


def ask(inside: Machine, method: str, **fields: object) -> object:
    return request(inside.root / "run/control.sock", method, **fields)


def sluice(inside: Machine, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        inside.sluice(*words), capture_output=True, text=True, timeout=60,
        env=inside.environment, cwd="/", check=False,
    )  # fmt: skip


# --- across ----------------------------------------------------------------------------------


@x86
@pytest.mark.spec("CORE-166")
def test_ipc_objects(inside: Machine) -> None:
    """Looks for shared memory, message queues and semaphores that the other domain has made."""
    made = "[call(29, 0x5EC2E7, 4096, 0o1666), call(68, 0x5EC2E7, 0o1666), call(64, 0x5EC2E7, 1, 0o1666), call(240, b'secret', 0o102, 0o666, None)]"
    found = "[call(29, 0x5EC2E7, 4096, 0), call(68, 0x5EC2E7, 0), call(64, 0x5EC2E7, 1, 0), call(240, b'secret', 2, 0, None)]"
    assert inside.value(made, "peer") == str(["THROUGH"] * 4)
    assert inside.value(found, "peer") == str(["THROUGH"] * 4)
    assert inside.value(found) == str(["ENOENT"] * 4)
    assert inside.shell("cat /proc/sysvipc/shm /proc/sysvipc/msg | wc -l").stdout == b"2\n"


@pytest.mark.spec("CORE-166")
def test_watching_a_peer_by_its_number(inside: Machine) -> None:
    """Asks for processes of the other domain and of the host by the numbers they have there, for
    what they are or when they come and go."""
    assert inside.process is not None
    code = """
found = []
for pid in {pids}:
    asks = (os.getpgid, os.getsid, os.sched_getaffinity, os.sched_getparam, os.pidfd_open)
    found += [attempt(ask, pid) for ask in asks]
    found += [attempt(os.kill, pid, 0), attempt(os.getpriority, os.PRIO_PROCESS, pid)]
    found += [attempt(os.stat, f'/proc/{{pid}}').replace('ENOENT', 'ESRCH')]
print(set(found))
"""
    # A number that somebody of its own has would tell nothing.
    own = inside.value("[int(n) for n in os.listdir('/proc') if n.isdigit()]")
    wanted = [inside.agent_pid("peer"), inside.process.pid]
    pids = [pid for pid in wanted if pid > max(map(int, own.strip("[]").split(","))) + 100]
    if not pids:
        pytest.skip("the machine has just been started: the numbers are the domain's, too")
    assert inside.python(code.format(pids=pids)) == "{'ESRCH'}"


@x86
def test_a_descriptor_of_a_sockets_peer(inside: Machine) -> None:
    """Has the kernel name the process behind the agent's socket (SO_PEERPIDFD), and takes its descriptors."""
    code = """
s = socket.socket(socket.AF_UNIX); s.connect('/run/qubes/qrexec-agent')
assert struct.unpack('3i', s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0] == 1
try: fd = struct.unpack('i', s.getsockopt(socket.SOL_SOCKET, 77, 4))[0]
except OSError: fd = os.pidfd_open(1)
print({call(438, fd, n, 0) for n in range(12)})
"""
    assert inside.python(code) == "{'EPERM'}"


@x86
def test_keys_of_the_user(inside: Machine) -> None:
    """Lists the keys of the user who started the system; their names tell of accounts and disks."""
    name = f"secret-of-the-user-{os.getpid()}"
    code = f"import ctypes; c = ctypes.CDLL(None); print(c.syscall(248, b'user', {name.encode()!r}, b'x', 1, -4), '/proc/keys' and open('/proc/keys').read())"
    made = subprocess.run(
        inside.as_user(["/usr/bin/python3", "-c", code]), capture_output=True, text=True, check=False
    )  # fmt: skip
    if made.returncode or made.stdout.startswith("-1"):
        pytest.skip("there are no keyrings here")
    try:
        assert name in made.stdout  # whoever has the user's id sees it
        assert inside.value("open('/proc/keys').read() + open('/proc/key-users').read()") == ""
    finally:
        if inside.user is None:
            unlink = ctypes.CDLL(None).syscall  # another user's go with that user
            unlink(250, 9, int(made.stdout.split()[0]), -4)


@pytest.mark.spec("CORE-166")
def test_sockets_in_the_kernels_lists(inside: Machine) -> None:
    """Reads the kernel's list of UNIX sockets for the names of those of the host and of the peer."""
    listed = inside.value("open('/proc/net/unix').read()")
    assert "qrexec-agent" in listed  # its own agent's
    assert str(inside.root) not in listed
    code = """
s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)
body = struct.pack('=BBHIIIII', 1, 0, 0, 0xffffffff, 0, 1, 0, 0)  # all UNIX sockets, with names
s.send(struct.pack('=IHHII', 16 + len(body), 20, 0x301, 1, 0) + body)
print(s.recv(1 << 20))
"""
    assert str(inside.root) not in inside.python(code)


# --- out -------------------------------------------------------------------------------------


def test_settings_of_the_kernel(inside: Machine) -> None:
    """Writes every file below /proc/sys anew, as an ordinary user and as the domain's root. With one
    id those of its own message queues, shared memory and process numbers are its own, and nobody else's."""
    code = """
through = []
for where, _, names in os.walk('/proc/sys'):
    for name in names:
        path = f'{where}/{name}'
        if attempt(os.open, path, os.O_WRONLY) != 'THROUGH': continue
        try: content = open(path, 'rb').read()
        except OSError: content = b'0'
        if attempt(lambda: os.write(os.open(path, os.O_WRONLY), content)) == 'THROUGH':
            through.append(path)
own = ('/proc/sys/fs/mqueue/', '/proc/sys/kernel/msg', '/proc/sys/kernel/shm', '/proc/sys/kernel/sem', '/proc/sys/kernel/auto_msgmni', '/proc/sys/kernel/pid_max')
print([path for path in through if not (single and path.startswith(own))])
"""
    for user in ("DEFAULT", "root")[: 1 if inside.mode == "single" else 2]:
        single = f"single = {inside.mode == 'single'}\n"
        assert inside.python(single + code, user=user) == "[]"


def test_control_groups(inside: Machine) -> None:
    """Looks for the control groups that hold it, to leave them or to raise its limits."""
    for path in ("/sys/fs/cgroup", "/sys", "/proc/1/cgroup.procs"):
        assert inside.value(f"attempt(os.stat, {path!r})") == "ENOENT"
    user = "DEFAULT" if inside.mode == "single" else "root"
    done = inside.shell("mount -t cgroup2 none /mnt || mount -t cgroup -o pids none /mnt; ls /mnt", user=user)  # fmt: skip
    assert done.stdout == b""


def test_a_file_system_of_its_own_making(inside: Machine) -> None:
    """Mounts a file system in user space, by the helper that is setuid root on the host."""
    assert inside.value("attempt(open, '/dev/fuse', 'r+b')") == "ENOENT"
    done = inside.shell("mkdir -p /tmp/m; for p in fusermount3 fusermount; do $p /tmp/m; done")
    assert done.returncode != 0
    assert inside.value("'fuse' in open('/proc/mounts').read()") == "False"


def test_the_hosts_program_for_crashes(inside: Machine) -> None:
    """Crashes, so that the host's root would read what it has prepared, after having tried to set
    the limit by which the kernel decides that."""
    code = """
import resource, signal
os.chdir('/home/user')
for value in (0, 1 << 20, -1):
    attempt(resource.setrlimit, resource.RLIMIT_CORE, (0, 0))
    try: resource.prlimit(0, resource.RLIMIT_CORE, (value, value))
    except ValueError: pass
pid = os.fork()
if pid == 0: os.kill(os.getpid(), signal.SIGSEGV)
status = os.waitpid(pid, 0)[1]
print(status, resource.getrlimit(resource.RLIMIT_CORE), [n for n in os.listdir() if 'core' in n])
"""
    # Without the flag of a dumped core.
    assert inside.python(code) == f"{int(signal.SIGSEGV)} (1, 1) []"


def test_a_setuid_program_left_for_the_host(inside: Machine) -> None:
    """Leaves a setuid program in its tree, for another user of the host to run."""
    user = "DEFAULT" if inside.mode == "single" else "root"
    inside.shell("cp /bin/true /rw/planted/suid; chmod 6755 /rw/planted/suid; ls -l /rw/planted", user=user)  # fmt: skip
    place = inside.root / "state/appvms/work/private"
    found = (place / "rw/planted/suid").stat()
    assert found.st_mode & stat.S_ISUID  # it may; what follows is what stops it
    assert found.st_uid != 0
    assert inside.mode == "single" or found.st_uid != inside.uid
    for directory in (place, place.parent, inside.root / "state"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert directory.stat().st_uid == inside.uid


# --- what remains ----------------------------------------------------------------------------

# Processes that are stopped, that are traced, and one that waits in the kernel for a child that never
# executes (CLONE_VFORK).
STUCK = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None)
if os.fork() == 0: os.kill(os.getpid(), signal.SIGSTOP)
if os.fork() == 0: libc.ptrace(0, 0, 0, 0); os.kill(os.getpid(), signal.SIGTRAP)
if os.fork() == 0: libc.syscall(56, 0x4011, 0, 0, 0, 0) or signal.pause()
for number in range(1, 65): libc.signal(number, ctypes.c_void_p(1))
os.write(1, b'ready')
while True: signal.pause()
"""


@pytest.mark.spec("CORE-173")
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_processes_that_do_not_want_to_end(inside: Machine, how: str) -> None:
    """Leaves processes that are stopped, traced or deaf to every signal, and is ended."""
    process = subprocess.Popen(
        inside.command(f"exec /usr/bin/python3 -c \"{STUCK}\""),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=inside.environment, cwd="/",
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"ready"
        agent = inside.agent_pid()
        pids = [agent, *descendants(agent)]
        assert len(pids) >= 5
        ask(inside, how, name="work")
        assert [pid for pid in pids if running(pid)] == []
    ask(inside, "start", name="work")
    assert inside.shell("echo alive").stdout == b"alive\n"


def running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.spec("CORE-175", "CORE-178")
def test_another_system_beside_it(inside: Machine) -> None:
    """Another system of the same user is started, killed, started again and stopped: it neither
    ends nor frees nor takes anything of ours."""
    other = Machine(
        inside.mode, inside.root / "other", inside.user, "[domains.work]\n[domains.third]\n"
    )
    other.root.mkdir()
    other.environment["HOME"] = inside.environment["HOME"]  # one file of user ids for both
    other.prepare("", {})
    if inside.user is not None:
        subprocess.run(["chown", "-R", inside.user, str(other.root)], check=True)
    before = {name: inside.agent_pid(name) for name in ("work", "peer")}
    limits = sluice(inside, "ls", "--limits").stdout
    mine = {uid(pid) for pid in before.values()}
    for _ in range(2):
        other.up()
        try:
            theirs = {uid(other.agent_pid(name)) for name in ("work", "third")}
            assert inside.mode == "single" or not mine & theirs
            assert other.process is not None
            leftover = descendants(other.process.pid)
            other.process.kill()
            other.process.wait()
            wait_for(lambda found=leftover: not any(running(pid) for pid in found))
        finally:
            other.down()
    other.up()
    other.down()
    assert {name: inside.agent_pid(name) for name in ("work", "peer")} == before
    assert sluice(inside, "ls", "--limits").stdout == limits
    assert inside.shell("qrexec-client-vm peer test.Who").stdout == b"work\n"
    if inside.mode == "ranges":
        members = [(group / "cgroup.procs").read_text().split() for group in groups(inside, "peer")]
        assert any(str(before["peer"]) in pids for pids in members)


@pytest.mark.spec("CORE-173", "CORE-175")
def test_a_start_that_was_cut_off(inside: Machine) -> None:
    """Kills the AdminVM in the middle of starts; and leaves what bwrap leaves when it loses its parent
    between two steps: a child that waits for ever. The next start ends it, and nobody else's."""
    system = Machine(inside.mode, inside.root / "cut", inside.user, "[domains.a]\n[domains.b]\n")
    system.root.mkdir()
    system.environment["HOME"] = inside.environment["HOME"]
    system.prepare("", {})
    (system.root / "state").mkdir(mode=0o700)
    if inside.user is not None:
        subprocess.run(["chown", "-R", inside.user, str(system.root)], check=True)
    names = [f"bwrap:{label_of(root / 'state')}" for root in (system.root, inside.root)]
    mine, theirs = (
        subprocess.Popen(system.as_user(["bash", "-c", f"exec -a {name} sleep 1000"]))
        for name in names
    )
    try:
        system.up()
        assert mine.wait(20) == -signal.SIGKILL
        assert theirs.poll() is None
        assert system.shell("echo alive", "a").stdout == b"alive\n"
        system.down()
    finally:
        for process in (mine, theirs):
            process.kill()
            process.wait()
    for moment in (0.2, 0.35, 0.5):
        log = (system.root / "log").open("wb")
        with log, subprocess.Popen(
            system.sluice("up"), stdout=log, stderr=log, env=system.environment, cwd="/"
        ) as process:  # fmt: skip
            time.sleep(moment)  # a moment of the start, whichever it is on this machine
            process.kill()
    system.up()
    try:
        started = set(descendants(system.process.pid))
        assert called(names[0]) <= started
        assert system.shell("echo alive", "b").stdout == b"alive\n"
    finally:
        system.down()
    assert called(names[0]) == set()


def called(name: str) -> set[int]:
    """Return the processes that were started under a name."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(name.encode()):
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def uid(pid: int) -> int:
    """Return the user id of a process."""
    return int(Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[0])


# --- copies ----------------------------------------------------------------------------------


def test_copies_of_what_it_prepared(inside: Machine) -> None:
    """Prepares names, sizes, devices and locked directories as traps for `sluice cp`."""
    script = """
mkdir -p traps/bidi traps/c1 traps/line traps/locked/in && cd traps
touch "$(printf 'bidi/a\\342\\200\\256gpj.exe')" "$(printf 'c1/a\\302\\2332J')" "$(printf 'line/a\\nb')"
truncate -s 8T huge; mkfifo fifo; echo x > locked/a; chmod 0 locked/in; ln locked/a hard; chmod 6755 hard
"""
    assert inside.shell(script).returncode == 0
    target = inside.root / "user/traps"

    def refused(name: str) -> str:
        done = sluice(inside, "cp", f"work:traps/{name}", str(target))
        assert done.returncode in (1, 125), done
        return done.stderr

    for name in ("bidi", "c1", "line"):
        said = refused(name)
        assert "a name that cannot be" in said
        assert said.isascii() and said.rstrip("\n").isprintable()
        assert list(target.iterdir()) == []
        target.rmdir()
    assert "not enough room" in refused("huge")
    assert "is neither a file nor a directory" in refused("fifo")
    assert "in cannot be read; all else was copied" in refused("locked")
    assert (target / "a").read_text() == "x\n"
    assert sluice(inside, "cp", "work:traps/hard", str(target)).returncode == 0
    assert stat.S_IMODE((target / "hard").stat().st_mode) & 0o7000 == 0
    assert (target / "hard").stat().st_nlink == 1
    inside.shell("chmod -R 700 traps; rm -r traps")
