# ruff: noqa: E501  (what runs inside is written as it runs there)
"""Attempts to get out of a domain, or across to another: each one fails, in each of three modes.

Each test says in a sentence what it tries.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.sandbox import MODES, Machine, hostile_machine, wait_for

from sluice.domains.sandbox.ids import USER_INSIDE

pytestmark = [pytest.mark.sandbox, pytest.mark.xdist_group("sandbox")]


@pytest.fixture(scope="module", params=MODES)
def inside(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A system with the domains ``work``, which is hostile, and ``peer``."""
    with hostile_machine(request.param) as made:
        yield made


# --- files -----------------------------------------------------------------------------------


@pytest.mark.spec("CORE-166")
def test_the_peers_tree_by_its_host_path(inside: Machine) -> None:
    """Opens the private tree of another domain by the path it has on the host."""
    path = inside.root / "state/appvms/peer/private/home"
    assert path.exists()
    assert inside.value(f"attempt(os.listdir, {str(path)!r})") == "ENOENT"


@pytest.mark.spec("CORE-166", "CORE-169")
def test_files_of_the_host(inside: Machine) -> None:
    """Opens the host's password hashes, root's home, its logs and its boot files."""
    for path in (
        "/etc/shadow",
        "/etc/ssh",
        "/root/.ssh",
        "/var/log/syslog",
        "/boot",
        "/sys/kernel",
    ):
        assert inside.value(f"attempt(os.stat, {path!r})") in ("ENOENT", "EACCES"), path


@pytest.mark.spec("CORE-179")
def test_etc_is_the_allow_list(inside: Machine) -> None:
    """Looks for anything in /etc beyond the allowed and the generated names."""
    from sluice.domains.sandbox import etc

    expected = {name.split("/")[0] for name in (*etc.ALLOWED, *etc.MERGED)}
    expected |= {"passwd", "group", "hosts", "hostname", "nsswitch.conf", "resolv.conf"}
    expected.add("machine-id")
    found = set(inside.value("' '.join(os.listdir('/etc'))").split())
    assert found <= expected
    assert {"passwd", "group", "hosts", "machine-id"} <= found
    users = inside.value("[l.split(':')[0] for l in open('/etc/passwd')]")
    assert users == str(
        ["user", "nobody"] if inside.mode == "single" else ["root", "user", "nobody"]
    )
    own = Path("/etc/machine-id")
    if own.exists():
        assert inside.value("open('/etc/machine-id').read().strip()") != own.read_text().strip()


def test_system_directories_cannot_be_written(inside: Machine) -> None:
    """Writes into /usr, /etc, /, /usr/lib/sluice and the dynamic linker's preload file."""
    for place in ("/usr/bin/x", "/etc/x", "/x", "/usr/lib/sluice/sluice/x", "/etc/ld.so.preload"):
        assert inside.value(f"attempt(open, {place!r}, 'w')") in ("EROFS", "EACCES"), place


def test_the_hosts_temporary_files(inside: Machine) -> None:
    """Looks in /tmp and /dev/shm for what the host has there."""
    assert inside.root.parent == Path("/tmp")
    assert inside.value(f"{inside.root.name!r} in os.listdir('/tmp')") == "False"
    assert inside.value("os.listdir('/dev/shm')") == "[]"


def test_hard_link_to_a_file_of_the_template(inside: Machine) -> None:
    """Makes a hard link from the persistent tree to a file of the host's /usr."""
    code = "attempt(os.link, '/usr/bin/env', '/home/user/env')"
    assert inside.value(code) in ("EXDEV", "EPERM")


def test_handles_instead_of_paths(inside: Machine) -> None:
    """Opens a file by handle, which would pass by every directory."""
    assert inside.value("call(303, -100, b'/', None, None, 0)") == "EPERM"
    assert inside.value("call(304, 0, None, 0)") == "EPERM"


def test_changing_the_root(inside: Machine) -> None:
    """Changes the root directory to climb out of it."""
    assert inside.value("attempt(os.chroot, '/tmp')") == "EPERM"


def test_the_root_of_process_one(inside: Machine) -> None:
    """Follows /proc/1/root, hoping that process 1 has another root than ours."""
    assert inside.value("attempt(os.listdir, '/proc/1/root/etc')") in ("EACCES", "EPERM")


def test_leaving_by_dot_dot(inside: Machine) -> None:
    """Climbs with .. from a directory that was opened before, beyond the root."""
    code = "d = os.open('/', os.O_RDONLY)\nfor _ in range(40): d = os.open('..', os.O_RDONLY, dir_fd=d)\nprint(sorted(os.listdir(d)) == sorted(os.listdir('/')))"
    assert inside.python(code) == "True"


# --- sockets and networks --------------------------------------------------------------------


@pytest.mark.spec("CORE-169")
def test_sockets_of_the_adminvm(inside: Machine) -> None:
    """Connects to the AdminVM's socket and to the daemons' by the paths they have on the host."""
    for name in ("control.sock", "daemon/qrexec.peer", "daemon/qrexec.work"):
        path = inside.root / "run" / name
        assert path.exists()
        code = f"attempt(socket.socket(socket.AF_UNIX).connect, {str(path)!r})"
        assert inside.value(code) == "ENOENT"


def test_a_socket_of_the_host_by_path(inside: Machine) -> None:
    """Connects to a socket that a host process has below /tmp, and to the usual system sockets."""
    path = inside.root / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        path.chmod(0o777)
        for place in (
            str(path),
            "/run/dbus/system_bus_socket",
            "/run/docker.sock",
            "/tmp/.X11-unix/X0",
        ):
            code = f"attempt(socket.socket(socket.AF_UNIX).connect, {place!r})"
            assert inside.value(code) == "ENOENT"


@pytest.mark.spec("CORE-166", "CORE-167")
def test_abstract_sockets(inside: Machine) -> None:
    """Connects to an abstract socket of the host, and to one of the other domain."""
    name = f"sluice-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        code = f"attempt(socket.socket(socket.AF_UNIX).connect, chr(0) + {name!r})"
        assert inside.value(code) == "ECONNREFUSED"
    listen = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.bind(chr(0)+'peers'); s.listen(); print(flush=True); sys.stdin.read()"
    with listening(inside, "peer", listen):
        code = "attempt(socket.socket(socket.AF_UNIX).connect, chr(0) + 'peers')"
        assert inside.value(code, "peer") == "THROUGH"
        assert inside.value(code) == "ECONNREFUSED"


class listening:
    """Runs Python in a domain that prints a line when it is ready and ends with its input."""

    def __init__(self, inside: Machine, domain: str, code: str) -> None:
        command = inside.command(f"/usr/bin/python3 -c {shlex.quote(code)}", domain)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=inside.environment, cwd="/"
        )

    def __enter__(self) -> listening:
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.mark.spec("CORE-167")
def test_ports_of_the_host(inside: Machine) -> None:
    """Connects to a TCP port of the host's loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"attempt(socket.create_connection, ('127.0.0.1', {port}), timeout=60)"
        assert inside.value(code) == "ECONNREFUSED"


@pytest.mark.spec("CORE-167")
def test_there_is_no_way_out(inside: Machine) -> None:
    """Sends a datagram to an address outside, through whatever interface or route there is."""
    assert inside.value("[n for _, n in socket.if_nameindex()]") == "['lo']"
    routes = inside.value("[l.split()[0] for l in open('/proc/net/route')][1:]")
    assert routes == "[]"
    code = "attempt(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect, ('192.0.2.1', 9))"
    assert inside.value(code) == "ENETUNREACH"


def test_making_an_interface(inside: Machine) -> None:
    """Asks the kernel over netlink for a network interface of its own."""
    code = """
s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
body = struct.pack('=BxHiII', 0, 0, 0, 0, 0) + struct.pack('=HH8s', 12, 3, b'dummy0') + struct.pack('=HHHH8s', 16, 18, 12, 1, b'dummy')
s.send(struct.pack('=IHHII', 16 + len(body), 16, 0x605, 1, 0) + body)
print(errno.errorcode[-struct.unpack_from('=i', s.recv(4096), 16)[0]])
"""
    assert inside.python(code) == "EPERM"


def test_other_ends_of_netlink(inside: Machine) -> None:
    """Opens the kernel's netlink ends for packet filters, IPsec, auditing and cryptography."""
    for protocol in (12, 6, 9, 21):
        code = f"attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW, {protocol})"
        assert inside.value(code) == "EPROTONOSUPPORT", protocol


def test_raw_sockets(inside: Machine) -> None:
    """Opens raw IP and packet sockets, to forge and to listen."""
    assert inside.value("attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)") == "EPERM"
    assert (
        inside.value("attempt(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)") == "EAFNOSUPPORT"
    )


def test_vsock_and_other_families(inside: Machine) -> None:
    """Opens sockets of families that no network namespace confines, or that the kernel seldom sees."""
    for family in (40, 38, 31, 44, 45, 30, 21, 15, 4):
        code = f"call(41, {family}, 1, 0)"
        assert inside.value(code) == "EAFNOSUPPORT", family


# --- processes -------------------------------------------------------------------------------


# Processes may go while they are looked at.
READ_ALL = """
pids = [p for p in os.listdir('/proc') if p.isdigit()]
def read(pid, name):
    try:
        return open(f'/proc/{pid}/{name}').read().strip()
    except OSError:
        return ''
"""


@pytest.mark.spec("CORE-166")
def test_processes_of_others(inside: Machine) -> None:
    """Looks for processes of the host or of the other domain, and signals the AdminVM."""
    assert inside.process is not None
    found = inside.python(READ_ALL + "print([read(p, 'comm') for p in pids])")
    assert "bwrap" not in found
    assert len(found.split(",")) < 12
    with listening(inside, "peer", "print(flush=True); input()"):
        names = inside.python(READ_ALL + "print([read(p, 'cmdline') for p in pids])")
        assert "flush" not in names
    pid = inside.process.pid
    assert inside.value(f"attempt(os.kill, {pid}, 0)") == "ESRCH"


def test_killing_everybody(inside: Machine) -> None:
    """Sends a signal to every process there is; nobody outside of the domain hears it."""
    before = inside.agent_pid("peer")
    inside.shell("kill -TERM -1; true")
    assert inside.process is not None
    assert inside.process.poll() is None
    assert inside.agent_pid("peer") == before
    assert inside.value("1 + 1") == "2"


def test_tracing_the_agent(inside: Machine) -> None:
    """Attaches a debugger to process 1, which holds the control channel."""
    assert inside.value("call(101, 16, 1, 0, 0)") == "EPERM"


@pytest.mark.spec("CORE-169")
def test_the_memory_and_descriptors_of_the_agent(inside: Machine) -> None:
    """Opens the memory, the descriptors and the environment of process 1."""
    for name in ("mem", "environ", "maps", "fd/0", "root", "cwd", "exe"):
        function = "os.readlink" if name in ("root", "cwd", "exe", "fd/0") else "open"
        assert inside.value(f"attempt({function}, '/proc/1/{name}')") in ("EACCES", "EPERM"), name
    assert inside.value("attempt(os.listdir, '/proc/1/fd')") == "EACCES"


def test_taking_a_descriptor_from_the_agent(inside: Machine) -> None:
    """Takes the control channel from the agent with pidfd_getfd."""
    code = (
        "fd = os.pidfd_open(1)\nprint([call(438, fd, n, 0) for n in range(3, 9)] == ['EPERM'] * 6)"
    )
    assert inside.python(code) == "True"


def test_reading_the_memory_of_the_agent_by_call(inside: Machine) -> None:
    """Reads process 1 with process_vm_readv."""
    assert inside.value("call(310, 1, None, 0, None, 0, 0)") in ("EPERM", "THROUGH")
    code = """
class V(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('len', ctypes.c_size_t)]
b = ctypes.create_string_buffer(8); mine = V(ctypes.addressof(b), 8); theirs = V(ctypes.addressof(b), 8)
print(call(310, 1, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0))
"""
    assert inside.python(code) in ("EPERM", "EFAULT")


@pytest.mark.spec("CORE-169")
def test_inherited_descriptors(inside: Machine) -> None:
    """Looks for descriptors beyond the three of a service, and for where those three lead."""
    # Python has one more where libffi keeps its own file open.
    found = inside.shell("ls /proc/self/fd").stdout
    assert found.split() == [b"0", b"1", b"2", b"3"]  # the last one lists the directory
    targets = inside.value("[os.readlink(f'/proc/self/fd/{n}').split(':')[0] for n in range(3)]")
    assert targets == "['socket', 'socket', 'pipe']"


@pytest.mark.spec("CORE-169")
def test_the_agent_holds_one_channel_and_the_console(inside: Machine) -> None:
    """Counts the descriptors that process 1 shares with the host: its control channel, and the
    console, a pipe that it can only write to."""
    if os.geteuid() != 0:
        pytest.skip("only root may look into the agent from outside")
    agent = inside.agent_pid()

    def shared() -> list[str]:
        """The sockets that are not of the domain's own network namespace, where those are listed.

        Of a call that ends just now there may be some that are on no list any more.
        """
        lines = Path(f"/proc/{agent}/net/unix").read_text().splitlines()[1:]
        own = {line.split()[6] for line in lines}
        sockets = [link[8:-1] for link in open_files(agent).values() if link.startswith("socket:")]
        return [inode for inode in sockets if inode not in own]

    wait_for(lambda: len(shared()) == 1)
    held = open_files(agent)
    outside = set(open_files(inside.process.pid).values())
    pipes = {
        name: link for name, link in held.items() if link in outside and link.startswith("pipe:")
    }
    assert list(pipes) == ["2"], held
    flags = Path(f"/proc/{agent}/fdinfo/2").read_text().split()[3]
    assert int(flags, 8) & 3 == os.O_WRONLY
    assert all(not link.startswith("/") or link == "/dev/null" for link in held.values()), held


def open_files(pid: int) -> dict[str, str]:
    """Return what the descriptors of a process are, by their numbers."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            found[name] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def test_preloading_into_others(inside: Machine) -> None:
    """Has LD_PRELOAD set for a call, hoping that it reaches the service on the other side."""
    done = inside.shell(
        "LD_PRELOAD=/home/user/evil.so PYTHONPATH=/home/user /usr/bin/env LD_PRELOAD= qrexec-client-vm peer test.Environment"
    )
    assert b"PRELOAD" not in done.stdout
    assert b"PYTHONPATH=/usr/lib/sluice\n" in done.stdout  # its own domain's
    assert b"/home/user/evil" not in done.stdout
    assert b"QREXEC_REMOTE_DOMAIN=work" in done.stdout


@pytest.mark.spec("CORE-168")
def test_the_environment_of_a_service(inside: Machine) -> None:
    """Looks for anything of the host user's session in a service's environment."""
    names = set(inside.value("' '.join(os.environ)").split())
    allowed = {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "PWD", "OLDPWD", "SHLVL", "_"}
    assert names - allowed <= {
        *("QREXEC_AGENT_PID", "LC_CTYPE", "PYTHONPATH", "XDG_RUNTIME_DIR"),
    }
    assert inside.value("os.environ['PYTHONPATH']") == "/usr/lib/sluice"
    assert inside.value("os.environ['XDG_RUNTIME_DIR']") == "/run/user/1000"
    assert str(inside.root) not in inside.value("str(os.environ)")


def test_programs_with_the_setuid_bit(inside: Machine) -> None:
    """Runs the host's setuid programs, which must not make anybody root."""
    assert (
        inside.value("open('/proc/self/status').read().split('NoNewPrivs:')[1].split()[0]") == "1"
    )
    mounts = inside.value(
        "[l.split()[1] for l in open('/proc/mounts') if 'nosuid' not in l.split()[3].split(',')]"
    )
    assert mounts == "[]"
    done = inside.shell("/usr/bin/su -c id </dev/null; /usr/bin/mount -t tmpfs x /mnt")
    assert b"uid=0" not in done.stdout


def test_becoming_somebody_else(inside: Machine) -> None:
    """Becomes root, the AdminVM's user, or any host id."""
    for uid in (0, inside.uid, 2000, 100000):
        if uid == USER_INSIDE:
            continue  # the number of its own user: on many machines the first person's, too
        assert inside.value(f"attempt(os.setuid, {uid})") in ("EPERM", "EINVAL"), uid


@pytest.mark.spec("CORE-178")
def test_host_ids_of_a_domains_processes(inside: Machine) -> None:
    """Looks from outside at the user ids: never host root, with own ids never the AdminVM's."""
    uids = {}
    for domain in ("work", "peer"):
        with listening(inside, domain, "print(flush=True); input()"):
            agent = inside.agent_pid(domain)
            pids = [agent, *children(agent)]
            assert len(pids) > 1
            status = [uid_line(pid) for pid in pids]
            assert status[0], "the agent is still there"
            uids[domain] = {uid for line in status for uid in line}
    assert 0 not in uids["work"] | uids["peer"]
    if inside.mode == "single":
        # Not stopped here: there is one id for all. The threat model says what that means.
        assert uids["work"] == uids["peer"] == {inside.uid}
    else:
        assert inside.uid not in uids["work"] | uids["peer"]
        assert not uids["work"] & uids["peer"]


def uid_line(pid: int) -> set[int]:
    """Return the four user ids of a process, none where it has gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return set()
    return {int(word) for word in re.search(r"^Uid:(.*)$", text, re.M)[1].split()}


def children(pid: int) -> list[int]:
    """Return the process ids below ``pid``."""
    from tests.support.system import descendants

    return descendants(pid)


def test_no_capabilities(inside: Machine) -> None:
    """Looks for capabilities of an ordinary service: there are none, nor any to gain."""
    text = inside.value("open('/proc/self/status').read()")
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert re.search(rf"^{name}:\s+0+$", text, re.M), name
    bounding = int(re.search(r"^CapBnd:\s+(\w+)$", text, re.M)[1], 16)
    from sluice.domains.sandbox.bubblewrap import ROOT_CAPABILITIES

    assert bounding.bit_count() == (0 if inside.mode == "single" else len(ROOT_CAPABILITIES))
