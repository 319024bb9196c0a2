"""The system-call filter of a domain: what of the kernel is out of its reach.

A list of what is refused, in front of everything else allowed: a domain runs ordinary programs of
a distribution. Refused are calls that reach beyond namespaces (keyrings, kernel modules, clocks),
that have been the way into the kernel too often (bpf, io_uring, userfaultfd, perf), that would
undo the sandbox (namespaces, mounts), address families that no network namespace confines, and
every call of another architecture (i386 and x32 on x86-64). docs/spec/core-stack.md 12.4 step 7.
"""

from __future__ import annotations

import errno
import os
from functools import lru_cache

import pyseccomp

from sluice.errors import LocalError

# Refused with EPERM whatever their arguments. Names that this architecture or libseccomp does not
# know are left out: what does not exist cannot be called.
REFUSED = (
    # keyrings: their quota and their content belong to a user id, not to a namespace
    "add_key",
    "request_key",
    "keyctl",
    # ways into the kernel
    "bpf",
    "perf_event_open",
    "userfaultfd",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    "lookup_dcookie",
    "vmsplice",
    # the kernel itself, the machine, its clocks
    "kexec_load",
    "kexec_file_load",
    "init_module",
    "finit_module",
    "delete_module",
    "create_module",
    "query_module",
    "get_kernel_syms",
    "reboot",
    "syslog",
    "acct",
    "swapon",
    "swapoff",
    "quotactl",
    "quotactl_fd",
    "settimeofday",
    "stime",
    "clock_settime",
    "clock_settime64",
    "clock_adjtime",
    "clock_adjtime64",
    "adjtimex",
    "iopl",
    "ioperm",
    "vm86",
    "vm86old",
    "modify_ldt",
    "nfsservctl",
    "_sysctl",
    "uselib",
    "ustat",
    "sysfs",
    "vhangup",
    "move_pages",
    "migrate_pages",
    "mbind",
    "set_mempolicy",
    "set_mempolicy_home_node",
    # files by handle pass by directories; namespaces and mounts would undo the sandbox
    "open_by_handle_at",
    "name_to_handle_at",
    "setns",
    "mount",
    "umount",
    "umount2",
    "pivot_root",
    "chroot",
    "fsopen",
    "fsconfig",
    "fsmount",
    "fspick",
    "move_mount",
    "open_tree",
    "open_tree_attr",
    "mount_setattr",
    "fanotify_init",
    "fanotify_mark",
    # other processes' descriptors: none of a domain needs them
    "pidfd_getfd",
    "kcmp",
    "process_madvise",
)

CLONE_NAMESPACES = (
    0x00000080,  # CLONE_NEWTIME (unshare only)
    0x00020000,  # CLONE_NEWNS
    0x02000000,  # CLONE_NEWCGROUP
    0x04000000,  # CLONE_NEWUTS
    0x08000000,  # CLONE_NEWIPC
    0x10000000,  # CLONE_NEWUSER
    0x20000000,  # CLONE_NEWPID
    0x40000000,  # CLONE_NEWNET
)
CLONE_NEWUSER = 0x10000000

TIOCSTI = 0x5412
TIOCLINUX = 0x541C
# Terminal input injection and the console's paste. The kernel looks at the low 32 bits only.
REFUSED_IOCTLS = (TIOCSTI, TIOCLINUX)

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
ALLOWED_FAMILIES = (AF_UNIX, AF_INET, AF_INET6, AF_NETLINK)

# Routes and interfaces, socket statistics, device events: what ordinary programs ask for. Not
# netfilter, IPsec, auditing, crypto and the rest, which have been ways into the kernel.
ALLOWED_NETLINK = (0, 4, 15)

# Protocols that few programs use and whose code has often been a way in: DCCP, L2TP, SCTP,
# UDP-Lite, SMC. Asking for one can load its module.
REFUSED_PROTOCOLS = (33, 115, 132, 136, 256)

# The limit of core files stays what it is, see rlimits.CORE_TO_NOBODY. To set it is answered as if
# done, since programs with secrets refuse to run otherwise.
RLIMIT_CORE = 4

_LOW = 0xFFFFFFFF


@lru_cache(maxsize=2)
def program(allow_user_namespaces: bool = False) -> bytes:
    """Return the filter as the kernel's bytecode (an array of ``struct sock_filter``).

    ``allow_user_namespaces`` is the dom0-only feature ``sandbox.allow-userns``; mounts inside such
    a namespace stay refused. Raises LocalError where libseccomp cannot do it.
    """
    try:
        return _build(allow_user_namespaces)
    except (OSError, ValueError, RuntimeError) as error:
        raise LocalError(f"no system-call filter: {error}") from error


def _build(allow_user_namespaces: bool) -> bytes:
    rules = pyseccomp.SyscallFilter(defaction=pyseccomp.ALLOW)
    # Calls of another architecture do not exist here; programs of it end with that.
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.ERRNO(errno.ENOSYS))
    for name in REFUSED:
        _add(rules, errno.EPERM, name)
    # Its flags lie in memory, where no filter can look. The C library falls back to clone.
    _add(rules, errno.ENOSYS, "clone3")
    masked = pyseccomp.MASKED_EQ
    for flag in CLONE_NAMESPACES:
        if flag == CLONE_NEWUSER and allow_user_namespaces:
            continue
        _add(rules, errno.EPERM, "unshare", pyseccomp.Arg(0, masked, flag, flag))
        if flag != CLONE_NAMESPACES[0]:  # in clone these bits are the signal at exit
            _add(rules, errno.EPERM, "clone", pyseccomp.Arg(_clone_flags(), masked, flag, flag))
    for request in REFUSED_IOCTLS:
        _add(rules, errno.EPERM, "ioctl", pyseccomp.Arg(1, masked, _LOW, request))
    for name in ("socket", "socketpair"):
        for family in range(AF_NETLINK):
            if family not in ALLOWED_FAMILIES:
                condition = pyseccomp.Arg(0, masked, _LOW, family)
                _add(rules, errno.EAFNOSUPPORT, name, condition)
        above = pyseccomp.Arg(0, pyseccomp.GT, AF_NETLINK)
        _add(rules, errno.EAFNOSUPPORT, name, above)
    for family in (AF_INET, AF_INET6):
        for protocol in REFUSED_PROTOCOLS:
            domain = pyseccomp.Arg(0, masked, _LOW, family)
            which = pyseccomp.Arg(2, masked, _LOW, protocol)
            _add(rules, errno.EPROTONOSUPPORT, "socket", domain, which)
    _add(rules, 0, "setrlimit", pyseccomp.Arg(0, masked, _LOW, RLIMIT_CORE))
    core, anew = pyseccomp.Arg(1, masked, _LOW, RLIMIT_CORE), pyseccomp.Arg(2, pyseccomp.NE, 0)
    _add(rules, 0, "prlimit64", core, anew)
    for protocol in range(32):
        if protocol not in ALLOWED_NETLINK:
            netlink = pyseccomp.Arg(0, masked, _LOW, AF_NETLINK)
            which = pyseccomp.Arg(2, masked, _LOW, protocol)
            _add(rules, errno.EPROTONOSUPPORT, "socket", netlink, which)
    return _export(rules)


def _clone_flags() -> int:
    """Return which argument of clone the flags are: s390 has them second."""
    return 1 if os.uname().machine.startswith("s390") else 0


def _add(rules: pyseccomp.SyscallFilter, error: int, name: str, *conditions: object) -> None:
    try:
        rules.add_rule(pyseccomp.ERRNO(error), name, *conditions)
    except (ValueError, OSError, RuntimeError):
        if name in ("clone", "unshare", "ioctl", "socket", "clone3", "prlimit64"):
            raise


def _export(rules: pyseccomp.SyscallFilter) -> bytes:
    descriptor = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "r+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
