"""How many descriptors we may have, and how many what we start may have.

Theory. One process serves all calls of a domain and a call takes five descriptors, so that the soft
limit of 1024 which most processes begin with is that of 200 calls. It is there for programs that
cannot hear a descriptor over 1023 (select) or go through all numbers up to it; we can and do not,
and raise ours as far as the hard limit allows. What we start may be such a program and gets the
limit back that we were given. A limit is inherited, so ours is lowered for the moment of a start:
that closes nothing which is open. But glibc's posix_spawn refuses to move a descriptor over the
limit; three numbers below it are therefore kept for that moment. For processes with one thread.
docs/spec/wire-protocol.md 7.2.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Limits = tuple[int, int]

# More than the most calls that a domain can have at once need; beyond it a leak would go unseen.
MOST = 16384


class DescriptorLimit:
    """The limit of this process, and of what it starts."""

    def __init__(self) -> None:
        """Leave everything as it is, until ``raise_it``."""
        self._set: Callable[[Limits], None] | None = None
        self._given: Limits = (0, 0)
        self._ours: Limits = (0, 0)
        # /dev/null on numbers that are kept.
        self._kept: list[int] = []
        self._null = -1

    def raise_it(self) -> None:
        """Raise our soft limit to the hard one, at most to ``MOST``; never lower it."""
        # Loaded by the few programs that serve many calls, not by every client.
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MOST if hard == resource.RLIM_INFINITY else min(MOST, hard)
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._kept = [os.dup(null) for _ in range(3)]
        self._null = null
        self._given, self._ours = (soft, hard), (wanted, hard)
        self._set = lambda limits: resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        self._set(self._ours)

    def lower(self, descriptors: Sequence[int]) -> list[int]:
        """Go back to the limit that we were given, to start something; then call ``restore``.

        Returns the same open files as up to three ``descriptors``, on numbers below that limit.
        """
        if self._set is None:
            return list(descriptors)
        self._set(self._given)
        return [
            fd if fd < self._given[0] else os.dup2(fd, kept, inheritable=False)
            for fd, kept in zip(descriptors, self._kept, strict=False)
        ]

    def restore(self) -> None:
        """Raise our limit again."""
        if self._set is not None:
            for kept in self._kept:
                os.dup2(self._null, kept, inheritable=False)
            self._set(self._ours)


own_limit = DescriptorLimit()
