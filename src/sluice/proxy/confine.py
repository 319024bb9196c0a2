"""Confines itself, then becomes an outside program (filter ``program``, docs/spec/proxy.md 5.1).

Run as ``python3 -I -S -c SOURCE_OF_THIS [--check] READ_PATHS... -- PROGRAM ARG...``; it stands
alone, so that it can be run from wherever the proxy lies, an archive too.

What is left to the program: its three streams, its own memory, reading and executing what the
system installs (/usr, /bin, /lib*), reading the named paths. No other file (Landlock), no socket of
any kind, no tracing, no mounting, no namespaces, no keys, no signals to others (a system-call
filter), no new privileges, bounded resources. It needs no privilege, so it works in a domain too.
If any of this cannot be set up it ends with 125 and the program does not run.
"""

import ctypes
import os
import resource
import struct
import sys

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

MEMORY = 2 << 30
DESCRIPTORS = 64

_NO_NEW_PRIVS, _PDEATHSIG, _SECCOMP, _FILTER = 38, 1, 22, 2
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
# Landlock's rights over files, and those of them that concern a file itself.
_EXECUTE, _WRITE, _READ, _READ_DIR, _TRUNCATE, _IOCTL = 1, 2, 4, 8, 1 << 14, 1 << 15
_OF_A_FILE = _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL

# name: (x86_64, aarch64). Each answers EPERM.
FORBIDDEN = {
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "bind": (49, 200),
    "listen": (50, 201), "socketpair": (53, 199), "accept4": (288, 242), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268),
    "unshare": (272, 97), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "pidfd_getfd": (438, 438),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "quotactl": (179, 60), "sethostname": (170, 161),
    "setdomainname": (171, 162), "personality": (135, 92), "syslog": (103, 116),
    "kcmp": (312, 272), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "shmget": (29, 194),
    "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193),
    "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
}  # fmt: skip
# Where Landlock cannot keep signals in (before its version 6).
SIGNALS = {"kill": (62, 129), "tgkill": (234, 131)}
CLONE, CLONE3, PRLIMIT = (56, 220), (435, 435), (302, 261)
_NEW_NAMESPACES = 0x7E020080
# uname's machine: (place in the tables, AUDIT_ARCH).
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38


class CannotConfine(Exception):
    """Something that confinement needs is not to be had here."""


def bpf(machine: str, *, keep_signals: bool) -> bytes:
    """Return the system-call filter for a machine. Raises CannotConfine for an unknown one."""
    if machine not in MACHINES:
        raise CannotConfine(f"no system-call filter for {machine}")
    place, arch = MACHINES[machine]
    numbers = [both[place] for both in FORBIDDEN.values()]
    if not keep_signals:
        numbers += [both[place] for both in SIGNALS.values()]
    # Each test jumps forward to a return; how far is known when all are there.
    tests = [(_EQUAL, number) for number in numbers]
    if machine == "x86_64":
        # The x32 numbers would name the same calls by another name.
        tests.insert(0, (_AT_LEAST, 0x40000000))
    tail = [
        (_EQUAL, 0, 2, CLONE[place]),
        (_LOAD, 0, 0, 16),
        (_ANY_BIT, 5, 6, _NEW_NAMESPACES),
        (_EQUAL, 0, 2, PRLIMIT[place]),
        (_LOAD, 0, 0, 16),
        (_EQUAL, 3, 2, 0),
        (_EQUAL, 0, 2, CLONE3[place]),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    denial = len(tests) + len(tail) - 2
    for at, (code, value) in enumerate(tests):
        program.append((code, denial - at - 1, 0, value))
    program += tail
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def confine(read: "list[str]", program: str) -> None:
    """Give up all but what this module's text says. Raises CannotConfine."""
    libc = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for what, most in ((resource.RLIMIT_NOFILE, DESCRIPTORS), (resource.RLIMIT_AS, MEMORY)):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    _check(libc.prctl(_PDEATHSIG, 9, 0, 0, 0), "the signal at the proxy's end")
    _check(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    version = libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise CannotConfine("this kernel has no Landlock, or forbids it")
    _landlock(libc, version, read, program)
    _system_calls(libc, version)


def _landlock(libc: ctypes.CDLL, version: int, read: "list[str]", program: str) -> None:
    handled = (1 << 13) - 1
    for since, bit in ((2, 13), (3, 14), (5, 15)):
        handled |= (1 << bit) if version >= since else 0
    attributes = struct.pack("<Q", handled)
    attributes += struct.pack("<Q", 3) if version >= 4 else b""
    attributes += struct.pack("<Q", 3) if version >= 6 else b""
    rules = libc.syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    _check(rules, "Landlock")
    use = _EXECUTE | _READ | _READ_DIR
    for path, rights in (
        *((path, use) for path in (*SYSTEM, program)),
        *((path, _READ | _WRITE | _IOCTL) for path in DEVICES),
        *((path, _READ | _READ_DIR) for path in read),
    ):
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            if path in read or path == program:
                raise CannotConfine(f"{path}: {error.strerror}") from None
            continue
        allowed = rights & handled
        if os.stat(fd).st_mode & 0o170000 != 0o040000:
            allowed &= _OF_A_FILE
        rule = struct.pack("<Qi", allowed, fd)
        _check(libc.syscall(_ADD_RULE, rules, 1, rule, 0), f"Landlock for {path}")
        os.close(fd)
    _check(libc.syscall(_RESTRICT, rules, 0), "Landlock")
    os.close(rules)


def _system_calls(libc: ctypes.CDLL, version: int) -> None:
    program = bpf(os.uname().machine, keep_signals=version >= 6)
    buffer = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    _check(libc.prctl(_SECCOMP, _FILTER, filter_, 0, 0), "the system-call filter")


def _check(result: int, what: str) -> None:
    if result < 0:
        raise CannotConfine(f"{what}: {os.strerror(ctypes.get_errno())}")


def main(argv: "list[str]") -> int:
    """Confine and become the program; with ``--check`` only see whether that can be done."""
    checking = argv[:1] == ["--check"]
    argv = argv[1:] if checking else argv
    at = argv.index("--")
    read, command = argv[:at], argv[at + 1 :]
    try:
        confine(read, command[0])
        if checking:
            return 0
        os.execv(command[0], command)
    except CannotConfine as error:
        sys.stderr.write(f"cannot be confined: {error}\n")
    except OSError as error:
        sys.stderr.write(f"cannot be started: {command[0]}: {error.strerror}\n")
    return 125


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
