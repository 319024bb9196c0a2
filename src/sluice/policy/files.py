"""Policies on the disk: reading a set, and noticing that it changed (sections 3 and 18.5).

The only module of the package that does I/O. No decision may come from a policy that is older than
the request, nor from half of a change. There are no watches, which come late and can be lost:

* Every path that reading a set has looked at, whether it was there or not, is *stamped*: mtime,
  size, inode, ctime, device, mode. Before each decision the stamps are compared (a microsecond a
  file); if all are equal, the policy in memory is that on the disk.
* If not, the set is read again, and used only once it has been seen unchanged for ``QUIET``, and
  was read after that time with equal stamps before and after. A file that is truncated and then
  written is, for a moment, a prefix of itself: it parses, and may allow what its end denies.
* Who changes several files at once holds the directory's lock (flock) exclusively; reading takes it
  shared, and waits otherwise.

Until then requests wait, ``PATIENCE`` at most; then they are denied. That a change time is old is
no sign of rest: truncating sets the size first and the time a little later, so that for some
microseconds a file of last year is empty (seen). And two changes within one tick of the kernel's
clock have equal stamps, which is why reading comes after the waiting.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from sluice.errors import PolicyError
from sluice.policy.evaluation import Policy
from sluice.policy.loader import DIRECTORIES, LEGACY_DIRECTORY, Loader, parse_file
from sluice.policy.parser import Parsed
from sluice.policy.problems import PolicyLoadError, PolicySyntaxError
from sluice.policy.rules import Rule

if TYPE_CHECKING:
    import asyncio

QUIET = 0.1
PATIENCE = 2.0
RETRY = 0.02
MAX_BYTES = 64 * 1024 * 1024

Stamp = tuple[int, int, int, int, int, int] | None
"""mtime_ns, size, inode, ctime_ns, device, mode; None for what is not there."""


def stamp(path: str) -> Stamp:
    """Return the stamp of a path, symlinks followed; None if it cannot be looked at."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (
        found.st_mtime_ns,
        found.st_size,
        found.st_ino,
        found.st_ctime_ns,
        found.st_dev,
        found.st_mode,
    )


class DiskFiles:
    """The disk, as the loader wants it. Remembers the stamp of everything it was asked about."""

    def __init__(self) -> None:
        """Start with nothing looked at."""
        self.stamps: dict[str, Stamp] = {}
        self._size = 0

    def _look(self, path: str) -> Stamp:
        # The first look counts: what is read afterwards is no older than it.
        if path not in self.stamps:
            self.stamps[path] = stamp(path)
        return self.stamps[path]

    def entries(self, directory: str) -> list[str]:
        """Return the names in a directory."""
        self._look(directory)
        return os.listdir(directory)

    def is_file(self, path: str) -> bool:
        """Tell whether it is a regular file, symlinks followed."""
        found = self._look(path)
        return found is not None and stat.S_ISREG(found[5])

    def is_directory(self, path: str) -> bool:
        """Tell whether it is a directory, symlinks followed."""
        found = self._look(path)
        return found is not None and stat.S_ISDIR(found[5])

    def resolve(self, path: str) -> str:
        """Return the path with every symlink followed and ``..`` collapsed."""
        self._look(path)
        try:
            return os.path.realpath(path)
        except ValueError:  # a NUL: no such file, as the next look will say
            return path

    def read(self, path: str) -> bytes:
        """Return the content of a regular file; OSError for anything else, without waiting."""
        self._look(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            content = file.read(MAX_BYTES + 1 - self._size)
        self._size += len(content)
        if self._size > MAX_BYTES:
            raise PolicyLoadError(f"the policy has more than {MAX_BYTES} bytes", file=path)
        return content

    def unchanged(self) -> bool:
        """Tell whether everything that was looked at is still as it was."""
        return all(stamp(path) == before for path, before in self.stamps.items())


class Snapshot:
    """One reading of a set: the policy or the error, and the stamps that it holds for."""

    __slots__ = ("error", "files", "policy")

    def __init__(self, files: DiskFiles, policy: Policy | None, error: PolicyError | None) -> None:
        """Exactly one of ``policy`` and ``error`` is given."""
        self.files = files
        self.policy = policy
        self.error = error


class PolicyStore:
    """The policy of a list of directories, always as it is on the disk.

    ``current`` blocks while a change comes to rest; ``current_async`` lets the event loop run and
    parses in a thread. Both raise PolicyError where every call must be denied: PolicySyntaxError
    silently, anything else with a notification (section 17).
    """

    def __init__(
        self,
        directories: Sequence[str | os.PathLike[str]] = DIRECTORIES,
        *,
        legacy_directory: str | os.PathLike[str] = LEGACY_DIRECTORY,
        quiet: float = QUIET,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take the directories, first one wins for equal names. Nothing is read yet."""
        self.directories = tuple(os.fspath(directory) for directory in directories)
        self.legacy_directory = os.fspath(legacy_directory)
        self.generation = 0
        self._quiet = quiet
        self._patience = patience
        self._clock = clock
        self._sleep = sleep
        self._snapshot: Snapshot | None = None
        self._candidate: tuple[float, Snapshot] | None = None
        self._parsed: dict[tuple[str, tuple[str, str] | None], tuple[bytes, Parsed]] = {}
        self._reloading: asyncio.Future[None] | None = None

    def load(self) -> Policy:
        """Read the set as it is now, whatever changes meanwhile. For tools; raises PolicyError."""
        files = DiskFiles()
        loaded = Loader(files, self.directories, legacy_directory=self.legacy_directory).load()
        return Policy(loaded.rules, loaded.warnings)

    def current(self) -> Policy:
        """Return the policy for a decision now; wait at most ``patience`` for a change to end."""
        deadline = self._clock() + self._patience
        while True:
            policy = self._unchanged()
            if policy is not None:
                return policy
            delay = self._attempt()
            if delay:
                self._sleep(self._bounded(delay, deadline))
            elif self._unchanged() is None:
                self._bounded(0.0, deadline)

    async def current_async(self) -> Policy:
        """Do what ``current`` does without holding up the event loop; one reload serves all."""
        import asyncio  # the tools, which start often, do without

        deadline = self._clock() + self._patience
        while True:
            policy = self._unchanged()
            if policy is not None:
                return policy
            if self._reloading is None or self._reloading.done():
                self._reloading = asyncio.ensure_future(self._reload_in_thread())
                # Should every waiter be cancelled, nobody else looks at its exception.
                self._reloading.add_done_callback(lambda task: task.cancelled() or task.exception())
            # Shielded: the caller may be cancelled, the others still wait for the same reload.
            await asyncio.shield(self._reloading)
            if self._unchanged() is None:
                self._bounded(0.0, deadline)

    async def _reload_in_thread(self) -> None:
        import asyncio

        delay = await asyncio.to_thread(self._attempt)
        if delay:
            await asyncio.sleep(delay)

    def _bounded(self, delay: float, deadline: float) -> float:
        left = deadline - self._clock()
        if left <= 0:
            raise PolicyLoadError(
                f"the policy keeps changing: not at rest for {self._patience:g} s",
                file=self.directories[0] if self.directories else None,
            )
        return min(delay, left)

    def _unchanged(self) -> Policy | None:
        """Return the policy in memory if it is that on the disk; raise its error; else None."""
        snapshot = self._snapshot
        if snapshot is None or not snapshot.files.unchanged():
            return None
        if snapshot.error is not None:
            # Without the traceback of the last time, which would grow with each request.
            raise snapshot.error.with_traceback(None)
        assert snapshot.policy is not None
        return snapshot.policy

    def _attempt(self) -> float:
        """Try to read the set; return 0 if it is now in memory, else when to try again."""
        with self._locked() as locked:
            if not locked:
                return RETRY
            began = self._clock()
            snapshot = self._read()
            if not snapshot.files.unchanged():
                self._candidate = None
                return RETRY
        if self._candidate is None or self._candidate[1].files.stamps != snapshot.files.stamps:
            self._candidate = (began, snapshot)
        waited = began - self._candidate[0]
        if waited < self._quiet:
            return self._quiet - waited
        if snapshot.error is not None and not isinstance(snapshot.error, PolicySyntaxError):
            # Not kept: what cannot be read now (descriptors, memory) may be readable next time
            # without any stamp having changed. The candidate stays: it has rested.
            self._snapshot = None
            raise snapshot.error
        self._candidate = None
        self.generation += 1
        self._snapshot = snapshot
        return 0.0

    def _read(self) -> Snapshot:
        files = DiskFiles()
        used: dict[tuple[str, tuple[str, str] | None], tuple[bytes, Parsed]] = {}

        def parse(path: str, content: bytes, fixed: tuple[str, str] | None) -> Parsed:
            # Files that did not change are not parsed again.
            known = self._parsed.get((path, fixed))
            parsed = known[1] if known and known[0] == content else parse_file(path, content, fixed)
            used[path, fixed] = (content, parsed)
            return parsed

        loader = Loader(
            files, self.directories, legacy_directory=self.legacy_directory, parse=parse
        )
        try:
            loaded = loader.load()
            policy = self._same(loaded.rules) or Policy(loaded.rules, loaded.warnings)
            snapshot = Snapshot(files, policy, None)
        except PolicyError as error:
            snapshot = Snapshot(files, None, error)
        self._parsed = used
        return snapshot

    def _same(self, rules: list[Rule]) -> Policy | None:
        """Return the policy made before the waiting, if it has these very rules: no new index."""
        policy = self._candidate[1].policy if self._candidate else None
        return policy if policy is not None and policy.rules == tuple(rules) else None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Hold the lock of every directory shared; yield False if somebody is changing one."""
        with contextlib.ExitStack() as stack:
            for directory in self.directories:
                try:
                    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except OSError:
                    continue  # the loader will say what is wrong with it
                stack.callback(os.close, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield False
                    return
            yield True


@contextlib.contextmanager
def changing(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a policy directory exclusively while several of its files are changed.

    Decisions wait meanwhile, so be quick. Raises OSError if the directory cannot be opened.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
