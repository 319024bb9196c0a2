"""The two user namespaces of a domain with ids of its own.

Theory. Setting a sandbox up needs our own eyes: the state directory and a checkout in somebody's
home can be traversed by us, not by the domain's ids. Running one needs the opposite: not even the
domain's root may be able to become us. So there are two namespaces, one in the other::

    outer   0 = our own id, 1... = the domain's ids     the file system is set up as 0 of this one
      inner   0 = the domain's root, 1000 = its user    everything of the domain runs in this one

Mounts, network, host name and process ids belong to the outer one, so nobody inside, root included,
has any power over them. Both are made once, kept open, and serve every start of the domain.

A short-lived process makes each: ``unshare`` in front of a shell that says it is there and waits
for its ids. Only one who is in the outer namespace may write the inner one's map, so the outer
shell does. docs/spec/core-stack.md 12.4.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sluice.domains.sandbox import stage
from sluice.domains.sandbox.ids import SUBORDINATE, IdMap
from sluice.errors import LocalError

# What the kernel counts for a user id is bounded in the inner namespace by these.
_INNER = (
    'echo "$1" >/proc/sys/user/max_user_namespaces; '
    "echo 64 >/proc/sys/user/max_inotify_instances; "
    "echo 65536 >/proc/sys/user/max_inotify_watches; "
    "echo $$; read -r _ <&5"
)
# $1: the inner uid map, $2: the inner gid map, $3: how many namespaces may be made inside,
# $4: the script above. An end-of-file on standard input is the sign to leave.
_OUTER = (
    "printf .; read -r _ || exit 1; exec 5<&0; "
    'unshare --user --keep-caps -- /bin/sh -c "$4" sh "$3" | { read -r pid || exit 1; '
    'printf %s "$1" >/proc/$pid/uid_map; printf %s "$2" >/proc/$pid/gid_map; '
    'echo "$pid"; read -r _ <&5; }'
)


@dataclass
class Namespaces:
    """Open descriptors of the two namespaces."""

    outer: int
    inner: int

    def close(self) -> None:
        """Close both; the kernel forgets them when the last process has left."""
        for name in ("outer", "inner"):
            descriptor = getattr(self, name)
            if descriptor >= 0:
                os.close(descriptor)
                setattr(self, name, -1)

    async def run(self, argv: Sequence[str], directory: str) -> None:
        """Run a program in the outer namespace, where it may give files away. Raises LocalError.

        There 0 is our own id and 1 + N is the domain's N-th.
        """
        enter = ["nsenter", f"--user=/proc/self/fd/{self.outer}", "--preserve-credentials", "--"]
        await stage.run([*enter, *argv], descriptors=(self.outer,), directory=directory)


def inner_map(lines: Sequence[tuple[int, int, int]]) -> tuple[str, int]:
    """Return the inner map's text for the lines of a map, and how many ids the outer one needs."""
    text, at = "", 1
    for inside, _, count in lines:
        text += f"{inside} {at} {count}\n"
        at += count
    return text, at - 1


def outer_map(own: int, lines: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return the outer map: our own id as 0, and the domain's ids from 1 on."""
    made, at = [(0, own, 1)], 1
    for _, outside, count in lines:
        made.append((at, outside, count))
        at += count
    return made


async def make(ids: IdMap, *, further: int = 0) -> Namespaces:
    """Make the two namespaces for a domain's ids. Raises LocalError.

    ``further`` is how many user namespaces the domain itself may make.
    """
    ready, ready_write = os.pipe2(os.O_CLOEXEC)
    go_read, go = os.pipe2(os.O_CLOEXEC)
    inner_uids, inner_gids = inner_map(ids.uids)[0], inner_map(ids.gids)[0]
    script = ["/bin/sh", "-c", _OUTER, "sh", inner_uids, inner_gids, str(further), _INNER]
    try:
        staged = stage.spawn(
            ["unshare", "--user", "--keep-caps", "--", *script], stdin=go_read, stdout=ready_write
        )
    except BaseException:
        os.close(ready)
        os.close(go)
        raise
    finally:
        os.close(ready_write)
        os.close(go_read)
    try:
        async with asyncio.timeout(stage.TIMEOUT):
            await stage.readable(ready)
            if os.read(ready, 1) != b".":
                raise LocalError("the kernel gives no user namespace")
            await _write(staged.process.pid, ids)
            os.write(go, b"\n")
            inner = await _number(ready)
        made = Namespaces(_open(staged.process.pid), -1)
        made.inner = _open(inner)
    except (TimeoutError, OSError, LocalError) as error:
        raise LocalError(staged.said() or str(error) or "timed out") from error
    finally:
        os.close(go)
        os.close(ready)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(stage.TIMEOUT):
                await staged.wait()
        staged.kill()
        staged.process.wait()
        staged.close()
    return made


def _open(pid: int) -> int:
    return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


async def _number(descriptor: int) -> int:
    """Read one line with a process id."""
    text = b""
    while not text.endswith(b"\n"):
        await stage.readable(descriptor)
        piece = os.read(descriptor, 64)
        if not piece:
            raise LocalError("the inner user namespace was refused")
        text += piece
    return int(text)


async def _write(pid: int, ids: IdMap) -> None:
    """Write the outer maps: ourselves as root, else with the helpers of shadow-utils."""
    maps = (
        ("uid", outer_map(os.geteuid(), ids.uids)),
        ("gid", outer_map(os.getegid(), ids.gids)),
    )
    for what, lines in maps:
        numbers = [str(number) for line in lines for number in line]
        if ids.mode == SUBORDINATE:
            await stage.run([f"new{what}map", str(pid), *numbers])
            continue
        text = "".join(" ".join(map(str, line)) + "\n" for line in lines)
        try:
            Path(f"/proc/{pid}/{what}_map").write_text(text)
        except OSError as error:
            raise LocalError(f"the kernel refuses the user ids: {error.strerror}") from error
