"""Counting for ``limit=N/DURATION`` (section 31). The state of it, kept by whom carries calls out.

The engine is pure, so a limit is carried on the resolution, and the dispatcher asks here before it
carries an allowed call out. At most N calls pass in *any* interval of DURATION: the times of the
last N are kept, and the next may pass when the oldest of them is DURATION ago. Rules are told apart
by file and text, so that moving a rule to another line does not forgive what was used; sources by
name.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from sluice.policy.resolution import Allow, Ask, Cause, Deny

MAX_KEYS = 4096
FOLD_SECONDS = 60.0
"""How long refusals of one rule and source are only counted after one was logged."""


class Verdict(NamedTuple):
    """Whether a call may pass, and what to log if not."""

    passed: bool
    log: bool = False
    """Whether this refusal is to be logged; the others of the interval are folded into a count."""
    folded: int = 0
    """How many refusals were not logged since the last one that was."""
    retry_after: float = 0.0
    """Seconds until a call could pass."""


class _State:
    __slots__ = ("folded", "logged", "seconds", "times")

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        self.times: deque[float] = deque()
        self.folded = 0
        self.logged: float | None = None


class CallLimits:
    """Counts the calls of limited rules. ``clock`` gives monotonic seconds."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, max_keys: int = MAX_KEYS
    ) -> None:
        """Start with nothing counted."""
        self._clock = clock
        self._max_keys = max_keys
        self._states: dict[tuple[str, str, str], _State] = {}

    def __len__(self) -> int:
        """Return how many pairs of rule and source are being counted."""
        return len(self._states)

    def take(self, resolution: Allow | Ask) -> Verdict:
        """Count a call that is about to be carried out; refuse it if its rule's limit is reached.

        A refused call does not count. Rules without a limit always pass.
        """
        rule, limit = resolution.rule, resolution.limit
        if rule is None or limit is None:
            return Verdict(True)
        now = self._clock()
        key = (rule.file, str(rule), resolution.source)
        state = self._states.get(key)
        if state is None:
            if len(self._states) >= self._max_keys:
                self._forget(now)
            if len(self._states) >= self._max_keys:
                return Verdict(False, retry_after=float(limit.seconds))
            state = self._states[key] = _State(limit.seconds)
        times = state.times
        while times and now - times[0] >= limit.seconds:
            times.popleft()
        if len(times) < limit.calls:
            times.append(now)
            return Verdict(True)
        return self._refuse(state, now, limit.seconds - (now - times[0]))

    def apply(self, allow: Allow) -> tuple[Allow | Deny, Verdict]:
        """Return the call as it stands after counting: itself, or a Deny with cause LIMIT."""
        verdict = self.take(allow)
        if verdict.passed:
            return allow, verdict
        assert allow.rule is not None
        more = f", {verdict.folded} more refused since" if verdict.folded else ""
        message = f"over the limit={allow.limit} of {allow.rule.place}{more}"
        return allow.deny(Cause.LIMIT, message, notify=False), verdict

    def _refuse(self, state: _State, now: float, retry_after: float) -> Verdict:
        if state.logged is not None and now - state.logged < FOLD_SECONDS:
            state.folded += 1
            return Verdict(False, False, state.folded, retry_after)
        folded, state.folded, state.logged = state.folded, 0, now
        return Verdict(False, True, folded, retry_after)

    def _forget(self, now: float) -> None:
        """Drop what no longer holds any call back."""
        for key, state in list(self._states.items()):
            if not state.times or now - state.times[-1] >= state.seconds:
                del self._states[key]
