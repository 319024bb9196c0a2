"""User ids: which ones a domain has on the host, and who may say so to the kernel.

Theory. A user namespace maps ids inside to ids outside. Who writes the map decides what is
possible:

* ``ranges``: we are root. Each domain gets 65536 host ids of its own, written directly.
* ``subordinate``: we are a user with lines in /etc/subuid and /etc/subgid. Each domain gets four
  of those ids (root, the user, nobody, one spare), written by newuidmap and newgidmap.
* ``single``: neither. Every domain is our own user on the host; inside there is the default user
  and nobody else.

Which ids belong to which domain is kept in one file for all systems of a user, so that two systems
never share an id. docs/spec/core-stack.md 12.4.1.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sluice.errors import LocalError, ResourceError

RANGES = "ranges"
SUBORDINATE = "subordinate"
SINGLE = "single"

USER_INSIDE = 1000
NOBODY = 65534
RANGE_SIZE = 65536
# Above what systemd-nspawn hands out, and 4096 domains stay below 2**31.
DEFAULT_BASE = 0x70000000
SUBORDINATE_SIZE = 4
_LAST_ID = 0xFFFFFFFE


@dataclass(frozen=True, slots=True)
class IdMap:
    """The ids of one domain: the lines of its maps, and what two of them are outside.

    A line is (first id inside, first id outside, count). ``root`` is None where nobody is root.
    """

    mode: str
    uids: tuple[tuple[int, int, int], ...]
    gids: tuple[tuple[int, int, int], ...]
    root: tuple[int, int] | None
    user: tuple[int, int]

    @property
    def has_root(self) -> bool:
        """Whether there is a root inside, who can run things as other users."""
        return self.root is not None

    def text(self, what: str) -> str:
        """Return the content of ``uid_map`` or ``gid_map``; ``what`` is ``uid`` or ``gid``."""
        lines = self.uids if what == "uid" else self.gids
        return "".join(f"{inside} {outside} {count}\n" for inside, outside, count in lines)

    def arguments(self, what: str) -> list[str]:
        """Return the same numbers as arguments of newuidmap or newgidmap."""
        lines = self.uids if what == "uid" else self.gids
        return [str(number) for line in lines for number in line]


@dataclass(frozen=True, slots=True)
class Ids:
    """The ids that are ours to give: a mode and the first id of each kind.

    ``uid_base`` and ``gid_base`` are the first host ids, ``count`` how many there are.
    """

    mode: str
    uid_base: int
    gid_base: int
    count: int

    @property
    def slot_size(self) -> int:
        """How many ids a domain gets."""
        return RANGE_SIZE if self.mode == RANGES else SUBORDINATE_SIZE

    @property
    def origin(self) -> int:
        """Where slot 0 is in the file of slots, which counts ranges from the usual base."""
        return (self.uid_base - DEFAULT_BASE) // RANGE_SIZE if self.mode == RANGES else 0

    @property
    def slots(self) -> int:
        """How many domains can have ids of their own."""
        return self.count // self.slot_size

    def map_for(self, slot: int) -> IdMap:
        """Return the map of the domain that has ``slot``. Raises ResourceError beyond the last."""
        if self.mode == SINGLE:
            return single_map()
        if not 0 <= slot < self.slots:
            raise ResourceError(f"no user ids are left: there are {self.slots} ranges of them")
        uid = self.uid_base + slot * self.slot_size
        gid = self.gid_base + slot * self.slot_size
        if self.mode == RANGES:
            return IdMap(
                RANGES,
                ((0, uid, RANGE_SIZE),),
                ((0, gid, RANGE_SIZE),),
                (uid, gid),
                (uid + USER_INSIDE, gid + USER_INSIDE),
            )
        return IdMap(
            SUBORDINATE,
            ((0, uid, 1), (USER_INSIDE, uid + 1, 1), (NOBODY, uid + 2, 1)),
            ((0, gid, 1), (USER_INSIDE, gid + 1, 1), (NOBODY, gid + 2, 1)),
            (uid, gid),
            (uid + 1, gid + 1),
        )

    def sentence(self) -> str:
        """Say which ids the domains have and what that means, for a person."""
        if self.mode == RANGES:
            return (
                f"each domain has {RANGE_SIZE} host user ids of its own, from {self.uid_base};"
                " none is host root, and what leaves its sandbox owns nothing of the others"
            )
        if self.mode == SUBORDINATE:
            return (
                f"each domain has {SUBORDINATE_SIZE} of your subordinate user ids for itself, from"
                f" {self.uid_base}; what leaves its sandbox owns nothing of yours or of the others"
            )
        return (
            "all domains run with your own user id: what leaves its sandbox can read your files"
            " and those of every other domain, and some limits of the kernel are shared by all"
        )


def single_map() -> IdMap:
    """Return the map of a domain that has our own user id and nothing else."""
    uid, gid = os.geteuid(), os.getegid()
    return IdMap(SINGLE, ((0, uid, 1),), ((0, gid, 1),), None, (uid, gid))


def detect(uid_base: int | None = None, *, single: bool = False) -> Ids:
    """Find out which of the three modes this machine gives us.

    ``single`` takes the weakest on purpose. Raises LocalError for root then, and for root in a
    container that has too few ids to keep domains off host root.
    """
    if os.geteuid() == 0:
        if single:
            raise LocalError("domains never have host root's id: start as an ordinary user")
        base = DEFAULT_BASE if uid_base is None else uid_base
        base = -(-base // RANGE_SIZE) * RANGE_SIZE  # so that ranges meet wholly or not at all
        end = min(_mapped_until(base, "uid"), _mapped_until(base, "gid"))
        if end - base < RANGE_SIZE:
            raise LocalError(
                f"started by root, but user ids from {base} are not available here (a container?):"
                " set uid_base in [system] to a free range, or start as an ordinary user"
            )
        return Ids(RANGES, base, base, end - base)
    uids, gids = subordinate("/etc/subuid"), subordinate("/etc/subgid")
    if not single and uids and gids and not obstacle():
        return Ids(SUBORDINATE, uids[0], gids[0], min(uids[1], gids[1]))
    return Ids(SINGLE, os.geteuid(), os.getegid(), 1)


def obstacle() -> str:
    """Return why we cannot use the subordinate ids that we have; empty where we can.

    Having them and being allowed to map them are two things: newuidmap may be missing, or have
    lost its privilege, as in many containers. So it is tried.
    """
    for program in ("newuidmap", "newgidmap"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    # First without maps: where the namespace itself is refused, unshare may wait for its own child.
    return _refusal([]) or _refusal(["--map-root-user", "--map-auto"])


def _refusal(maps: list[str]) -> str:
    """Return what unshare says against a user namespace with these maps; empty where it can."""
    command = ["unshare", "--user", *maps, "--", "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError as error:
        return f"unshare: {error.strerror}"
    except subprocess.TimeoutExpired:
        return "unshare did not end within 20 seconds"
    if done.returncode == 0 or "unrecognized option" in done.stderr:
        return ""
    return (done.stderr.strip().splitlines() or ["refused"])[0]


def _mapped_until(base: int, what: str) -> int:
    """Return the first id from ``base`` on that this namespace does not have."""
    with open(f"/proc/self/{what}_map") as file:
        for line in file:
            inside, _, count = (int(word) for word in line.split())
            if inside <= base < inside + count:
                return min(inside + count, _LAST_ID)
    return base


def subordinate(path: str, uid: int | None = None) -> tuple[int, int] | None:
    """Return (first, count) of the largest range that ``path`` gives a user (ourselves)."""
    number = os.geteuid() if uid is None else uid
    names = {str(number)}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(number).pw_name)
    best: tuple[int, int] | None = None
    try:
        with open(path) as file:
            for line in file:
                name, _, rest = line.strip().partition(":")
                first, _, count = rest.partition(":")
                if name in names and first.isdigit() and count.isdigit():
                    found = (int(first), int(count))
                    if found[1] >= SUBORDINATE_SIZE and (best is None or found[1] > best[1]):
                        best = found
    except OSError:
        return None
    return best


def slots_file() -> Path:
    """Return the file that says which domain has which ids: one for all systems of a user."""
    if os.geteuid() == 0:
        return Path("/var/lib/sluice/ids")
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if state.startswith("/") else Path.home() / ".local/state"
    return base / "sluice/ids"


class Slots:
    """The file of slots: lines ``SLOT UUID STATE-DIRECTORY``, changed under a lock."""

    def __init__(self, path: Path | None = None) -> None:
        """Take the file; it is made when first needed."""
        self._path = path or slots_file()

    def take(self, uuid: str, state: Path, limit: int, origin: int = 0) -> int:
        """Return the slot of a domain, a new one if it has none. Raises ResourceError if full.

        The result counts from ``origin`` (``Ids.origin``) and is below ``limit``; in the file slots
        count from 0, so that systems with different bases do not meet. Slots of systems in
        temporary places are free again when those are gone; of others only when nothing else is
        left, for a disk that is not mounted now may come back.
        """
        # Slot 0 stays unused: its first id would be the base itself, which people write down.
        ours = range(origin + 1, origin + limit)
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            entries = _parse(file.read())
            for slot, (owner, _) in entries.items():
                if owner == uuid and slot in ours:
                    return slot - origin
            kept = {slot: entry for slot, entry in entries.items() if not _forgotten(entry[1])}
            if all(slot in kept for slot in ours):
                kept = {slot: entry for slot, entry in kept.items() if os.path.isdir(entry[1])}
            free = next((slot for slot in ours if slot not in kept), None)
            if free is None:
                raise ResourceError(f"no user ids are left: there are {limit} ranges of them")
            kept[free] = (uuid, str(state))
            _rewrite(file.fileno(), kept)
        return free - origin

    def release(self, uuid: str) -> None:
        """Free the slot of a domain that was removed together with its files."""
        if not self._path.exists():
            return
        with open(self._path, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            entries = _parse(file.read())
            _rewrite(file.fileno(), {n: entry for n, entry in entries.items() if entry[0] != uuid})


def _rewrite(descriptor: int, entries: dict[int, tuple[str, str]]) -> None:
    """Replace what is in the file, so that it is whole whenever we are killed, and for readers.

    In one write, over the old content: in a file that was emptied first the ids of all domains of
    this machine would be lost, and given to others.
    """
    text = "".join(f"{number} {who} {where}\n" for number, (who, where) in entries.items())
    data = os.fsencode(text)
    padded = data.ljust(os.fstat(descriptor).st_size, b"\n")
    if os.pwrite(descriptor, padded, 0) < len(padded):
        # A range that is not written down would be given to somebody else, too.
        raise ResourceError("no room on the disk to note whose user ids are whose")
    os.ftruncate(descriptor, len(data))


def _forgotten(state: str) -> bool:
    temporary = ("/tmp/", "/var/tmp/", "/run/", "/dev/shm/")  # noqa: S108
    return state.startswith(temporary) and not os.path.isdir(state)


def _parse(text: str) -> dict[int, tuple[str, str]]:
    entries: dict[int, tuple[str, str]] = {}
    for line in text.splitlines():
        slot, _, rest = line.partition(" ")
        uuid, _, state = rest.partition(" ")
        if slot.removeprefix("-").isdigit() and state:
            entries[int(slot)] = (uuid, state)
    return entries
