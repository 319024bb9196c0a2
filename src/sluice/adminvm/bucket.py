"""Token buckets: how often something may happen, by a clock that is passed in."""

from __future__ import annotations

from collections.abc import Callable


class TokenBucket:
    """``rate`` tokens a second, at most ``burst`` of them saved up; it begins full."""

    __slots__ = ("_clock", "_tokens", "_when", "burst", "rate")

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        """Take tokens per second, the most that can be saved, and a clock in seconds."""
        self.rate = rate
        self.burst = burst
        self._clock = clock
        self._tokens = burst
        self._when = clock()

    def _refill(self) -> None:
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + max(0.0, now - self._when) * self.rate)
        self._when = now

    def take(self, cost: float = 1.0) -> bool:
        """Take ``cost`` tokens if they are there; tell whether they were."""
        self._refill()
        if self._tokens < cost:
            return False
        self._tokens -= cost
        return True

    def spend(self, cost: float) -> float:
        """Take ``cost`` tokens, into debt if need be; return the seconds until it is paid back."""
        self._refill()
        self._tokens -= cost
        return max(0.0, -self._tokens / self.rate)
