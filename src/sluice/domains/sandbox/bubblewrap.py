"""Domains as bubblewrap sandboxes.

Theory. bubblewrap makes the namespaces and the file system and then waits for its only child, the
agent, which is process 1. Where the domain has ids of its own, bubblewrap sets everything up in
the outer of its two user namespaces and then enters the inner one (see namespaces.py); ``setpriv``
becomes the domain's root there, gives up all capabilities but a few, and executes the agent. With
one id only there is no root to become: bubblewrap makes a user namespace in which the domain's
user is an ordinary one and no further namespaces can be made.

What process 1 is to lay in the domain comes through a pipe, and it reads that to the end before it
does anything else. We write into it only when the process has its limits and groups, which the
kernel takes some milliseconds for, while the interpreter starts.

The parent-death signal of bwrap is bound to the thread that started it: call ``start`` in the main
thread only. docs/spec/core-stack.md 12.4, 12.4.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from sluice import runtime
from sluice.agent.inside import INIT_VARIABLE, LIMIT_VARIABLE, USER_VARIABLE
from sluice.domains.model import DomainConfig
from sluice.domains.paths import Paths
from sluice.domains.sandbox import etc, mounts, namespaces, seccomp, stage
from sluice.domains.sandbox.base import CONTROL_ENVIRONMENT, Limit
from sluice.domains.sandbox.ids import (
    RANGES,
    SINGLE,
    SUBORDINATE,
    USER_INSIDE,
    IdMap,
    Ids,
    Slots,
    detect,
)
from sluice.domains.sandbox.leftovers import end_in_groups, end_leftovers
from sluice.domains.sandbox.limits import (
    MAX_DESCRIPTORS,
    DomainLimits,
    Wanted,
    label_of,
    probe,
    remove_groups,
    wanted,
)
from sluice.domains.sandbox.namespaces import Namespaces
from sluice.domains.sandbox.private import (
    DISPOSABLE,
    EVERY_TREE,
    prepare,
    remove,
    remove_as_all_ids,
    sweep_trees,
)
from sluice.domains.sandbox.supplies import supplies
from sluice.errors import LocalError, ResourceError

# What the in-domain root keeps, in its own namespace: to be root over the domain's own files and
# users. Nothing that concerns mounts, devices, networks or the machine.
ROOT_CAPABILITIES = (
    "chown",
    "dac_override",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "net_bind_service",
)


SETPRIV = "/usr/bin/setpriv"
# What a sandbox is made with, and the packages of Debian that have it.
PROGRAMS = {
    "bwrap": "bubblewrap",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    SETPRIV: "util-linux",
}

# With the feature sandbox.allow-userns.
FURTHER_NAMESPACES = 64


class RunningBubblewrap:
    """One run of a domain in a bubblewrap sandbox."""

    kind = "bubblewrap"

    def __init__(self, staged: stage.Staged, held: DomainLimits) -> None:
        """Take the process that is or will be bwrap; ``stderr_fd`` is its console to read."""
        self._staged = staged
        self._limits = held
        self.pid = -1
        self.pidfd = -1
        self.stderr_fd = os.dup(staged.console)
        self._memory_event = -1
        # Removes what a disposable has written.
        self.forget: Callable[[], Awaitable[None]] | None = None

    def found_agent(self, pid: int) -> None:
        """Note the agent's process id. Raises LocalError where it has ended already."""
        try:
            self.pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise LocalError(f"the agent ended at once: {error.strerror}") from error
        if self._staged.process.poll() is not None:  # the number may be somebody else's by now
            raise LocalError("the sandbox ended at once")
        self.pid = pid

    def watch_memory(self) -> None:
        """End the domain when it is over its memory limit, where the kernel would not (12.5).

        Version 2 groups end as a whole; with version 1 the kernel picks one process, and tells.
        """
        self._memory_event = self._limits.memory_event()
        if self._memory_event >= 0:
            loop = asyncio.get_running_loop()
            loop.add_reader(self._memory_event, self._over_memory)

    def _over_memory(self) -> None:
        self._stop_watching()
        print(f"{self._limits.name}: over its memory limit, ended", file=sys.stderr, flush=True)
        self.kill()

    def _stop_watching(self) -> None:
        if self._memory_event >= 0:
            asyncio.get_running_loop().remove_reader(self._memory_event)
            os.close(self._memory_event)
            self._memory_event = -1

    def kill(self) -> None:
        """End process 1, and with it every process of its namespace, then bwrap itself."""
        if self.pidfd >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self._staged.kill()

    async def wait(self) -> int:
        """Wait for bwrap, and for the agent where bwrap was killed before it."""
        status = await self._staged.wait()
        if self.pidfd >= 0:
            # bwrap gone first means that somebody killed it; the domain goes with it.
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            await stage.readable(self.pidfd)
        return status

    async def clean(self) -> None:
        """Remove the control groups and close what is open; ``stderr_fd`` is the reader's."""
        self._stop_watching()
        for _ in range(100):
            if self._limits.remove():
                break
            # The kernel counts a process in its group for a moment after its end was reported.
            await asyncio.sleep(0.01)
        if self.forget is not None:
            # Where there is no room for another process, too: the next start removes it.
            with contextlib.suppress(LocalError, ResourceError, OSError):
                await self.forget()
        self._staged.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def limits(self) -> list[Limit]:
        """Return the limits in force."""
        return self._limits.limits()

    def change_limits(
        self, *, memory: int | None = None, processes: int | None = None, cpus: int | None = None
    ) -> None:
        """Set other limits while the domain runs; see ``RunningSandbox.change_limits``."""
        now = self._limits.wanted
        self._limits.change(
            Wanted(
                memory=now.memory if memory is None else memory << 20,
                pids=now.pids if processes is None else processes,
                cpus=now.cpus if cpus is None else cpus,
            )
        )

    def usage(self) -> dict[str, int]:
        """Return what the domain uses, as far as something counts it."""
        return self._limits.usage()


class Bubblewrap:
    """Starts domains as bubblewrap sandboxes, for one system."""

    kind = "bubblewrap"
    first_process: tuple[str, ...] = (
        runtime.INTERPRETER,
        "-IS",
        f"{runtime.INSIDE_BIN}/sluice-domain-init",
    )

    def __init__(
        self,
        paths: Paths,
        *,
        uid_base: int | None = None,
        single: bool = False,
        ids: Ids | None = None,
    ) -> None:
        """Look at the machine. Raises LocalError where it cannot run such sandboxes at all.

        ``single`` asks for one user id for all domains although there may be more.
        """
        for program, package in PROGRAMS.items():
            if shutil.which(program) is None:
                raise LocalError(f"{program} is not installed (Debian: {package})")
        self._paths = paths
        self.ids = detect(uid_base, single=single) if ids is None else ids
        closed = mounts.closed_to_others()
        if closed is not None and self.ids.mode != SINGLE:
            raise LocalError(
                f"{closed}: others may not read it, so domains with ids of their own cannot"
                f" run it; please run: chmod -R o+rX {closed}"
            )
        self._slots = Slots()
        self._spaces: dict[tuple[str, int], Namespaces] = {}
        self._controllers = probe(paths.state)
        self._name = f"bwrap:{label_of(paths.state)}"
        end_leftovers(self._name)
        end_in_groups(self._controllers)

    def privilege(self) -> str:
        """Say which user ids the domains have on the host."""
        return self.ids.sentence()

    def findings(self) -> dict[str, str]:
        """Return what is published as features of dom0 (12.1, 12.5): name -> value."""
        properties = {"memory": "maxmem", "pids": "sandbox.pids-max", "cpu": "vcpus"}
        weak = [properties[name] for name in properties if self._controllers.kind(name) == "none"]
        # Without groups the kernel still holds these two, for each process and each user id.
        held = [name for name in weak if name != "vcpus"]
        return {
            "sandbox.ids": self.ids.mode,
            "sandbox.unenforced": " ".join(name for name in weak if name not in held),
            "sandbox.per-process": " ".join(held),
        }

    def id_map(self, domain: DomainConfig) -> IdMap:
        """Return the ids of one domain; hers for good from the first time on."""
        if self.ids.mode == SINGLE:
            return self.ids.map_for(0)
        ids = self.ids
        slot = self._slots.take(domain.uuid, self._paths.state, ids.slots, ids.origin)
        return ids.map_for(slot)

    async def spaces(self, domain: DomainConfig, ids: IdMap) -> Namespaces | None:
        """Return the two user namespaces of a domain with ids of its own; made once."""
        if not ids.has_root:
            return None
        further = FURTHER_NAMESPACES if _may_nest(domain) else 0
        key = (domain.uuid, further)
        if key not in self._spaces:
            self._spaces[key] = await namespaces.make(ids, further=further)
        return self._spaces[key]

    def close(self) -> None:
        """Close the namespaces and remove the system's own groups, at the end of the AdminVM."""
        for spaces in self._spaces.values():
            spaces.close()
        self._spaces.clear()
        remove_groups(self._controllers)

    async def sweep(self) -> list[str]:
        """Remove what disposables of a killed AdminVM have left; see ``Sandbox.sweep``."""
        return await sweep_trees(self._paths.appvms, as_all_ids=self.ids.mode == SUBORDINATE)

    async def wipe(self, name: str) -> None:
        """Remove what the halted domain ``name`` keeps. Raises LocalError if some of it stays."""
        place = self._paths.appvms / name
        for tree in EVERY_TREE:
            if self.ids.mode == SUBORDINATE:
                # All our subordinate ids at once: the tree may be that of an earlier system.
                await remove_as_all_ids(place, tree)
            else:
                await remove(place, tree, None)
        with contextlib.suppress(FileNotFoundError):
            place.rmdir()

    async def start(self, domain: DomainConfig, control: socket.socket) -> RunningBubblewrap:
        """Start the domain's agent; see ``Sandbox.start``."""
        plan = mounts.Plan()
        try:
            ids = self.id_map(domain)
            spaces = await self.spaces(domain, ids)
            place = self._paths.appvms / domain.name
            private = await prepare(place, domain, ids, spaces)
            self._describe(plan, domain, ids, spaces, private)
            running = await self._launch(plan, domain, ids, spaces, control)
            if domain.klass == "DispVM":
                running.forget = lambda: remove(
                    place, DISPOSABLE, spaces if ids.mode != RANGES else None
                )
            return running
        except (LocalError, ResourceError) as error:
            message = f"{domain.name}: the sandbox did not start: {error}"
            raise type(error)(message) from error
        except OSError as error:
            raise LocalError(f"{domain.name}: the sandbox did not start: {error}") from error
        finally:
            plan.close()

    def _describe(
        self,
        plan: mounts.Plan,
        domain: DomainConfig,
        ids: IdMap,
        spaces: Namespaces | None,
        private: Path,
    ) -> None:
        plan.add("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts")
        plan.add("--unshare-cgroup-try", "--as-pid-1", "--die-with-parent", "--new-session")
        plan.add("--hostname", domain.name, "--clearenv", "--chdir", "/", "--cap-drop", "ALL")
        if spaces is not None:
            plan.add("--userns", str(spaces.outer), "--userns2", str(spaces.inner))
            # The last one is for setpriv, which gives it up.
            for capability in (*ROOT_CAPABILITIES, "setpcap"):
                plan.add("--cap-add", f"CAP_{capability.upper()}")
        else:
            inside = str(USER_INSIDE)
            plan.add("--unshare-user", "--uid", inside, "--gid", inside)
            if not _may_nest(domain):
                plan.add("--disable-userns")
        for name, value in etc.environment(domain, as_root=ids.has_root).items():
            plan.add("--setenv", name, value)
        template = self._paths.template(domain.template or domain.name)
        mounts.build(
            plan,
            domain,
            has_root=ids.has_root,
            private=private,
            template=template,
            usr=Path("/usr"),
        )
        plan.add("--seccomp", str(plan.memory(seccomp.program(_may_nest(domain)))))

    async def _launch(
        self,
        plan: mounts.Plan,
        domain: DomainConfig,
        ids: IdMap,
        spaces: Namespaces | None,
        control: socket.socket,
    ) -> RunningBubblewrap:
        status, status_write = os.pipe2(os.O_CLOEXEC)
        archive, archive_write = os.pipe2(os.O_CLOEXEC)
        plan.descriptors += [status, status_write, archive, archive_write]
        content = supplies(domain, self._paths)
        environment = {
            CONTROL_ENVIRONMENT: control.fileno(),
            INIT_VARIABLE: archive,
            USER_VARIABLE: USER_INSIDE if ids.has_root else -1,
        }
        if not ids.has_root:
            environment[LIMIT_VARIABLE] = MAX_DESCRIPTORS
        for name, value in environment.items():
            plan.add("--setenv", name, str(value))
        plan.add("--json-status-fd", str(status_write))
        arguments = plan.memory(b"".join(os.fsencode(word) + b"\0" for word in plan.arguments))
        inherited = [*plan.descriptors, control.fileno()]
        inherited.remove(status)
        inherited.remove(archive_write)
        if spaces is not None:
            inherited += [spaces.outer, spaces.inner]
        held = DomainLimits(self._controllers, domain.name, wanted(domain))
        staged = stage.spawn(
            ["bwrap", "--args", str(arguments), "--", *_become_root(ids), *self.first_process],
            name=self._name,
            descriptors=inherited,
        )
        for descriptor in (status_write, archive):
            plan.descriptors.remove(descriptor)
            os.close(descriptor)
        running = RunningBubblewrap(staged, held)
        try:
            async with asyncio.timeout(stage.TIMEOUT):
                running.found_agent(await _child_pid(status))
                await asyncio.to_thread(held.apply, running.pid, agent_has_own_id=ids.has_root)
                running.watch_memory()
                await stage.write_all(archive_write, content)
        except BaseException as error:
            running.kill()
            await running.wait()
            said = staged.said()
            os.close(running.stderr_fd)
            await running.clean()
            if isinstance(error, TimeoutError | LocalError | OSError):
                raise LocalError(said or str(error) or "timed out") from error
            raise
        return running


def _may_nest(domain: DomainConfig) -> bool:
    return bool(domain.feature("sandbox.allow-userns"))


def _become_root(ids: IdMap) -> list[str]:
    """Return the program that becomes the domain's root and gives up what that should not have."""
    if not ids.has_root:
        return []
    kept = ",".join(["-all", *("+" + name for name in ROOT_CAPABILITIES)])
    return [
        # By its path: it runs inside, still as our own user, and the search path inside begins
        # with directories that the domain can write.
        SETPRIV,
        "--reuid=0",
        "--regid=0",
        "--clear-groups",
        "--inh-caps=-all",
        "--ambient-caps=-all",
        f"--bounding-set={kept}",
        "--",
    ]


async def _child_pid(status: int) -> int:
    """Read the agent's process id from bwrap's status. Raises LocalError where none comes."""
    text = b""
    while b"\n" not in text:
        await stage.readable(status)
        piece = os.read(status, 4096)
        if not piece:
            raise LocalError("bwrap ended before it had started anything")
        text += piece
    first = json.loads(text.split(b"\n")[0])
    if "child-pid" not in first:
        raise LocalError("bwrap did not tell the process id")
    return int(first["child-pid"])
