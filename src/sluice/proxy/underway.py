"""The calls under way in the resident form: admission, ends, what there is to see of them.

``max_calls`` bounds all calls, ``max_calls_source`` those of one source, so that no source can take
the places of the others (docs/spec/proxy.md 10). A call has its place from the moment that its
source is known until its flow is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sluice.proxy.stage import Cause
from sluice.wire.names import escape

if TYPE_CHECKING:
    from sluice.proxy.flow import Flow
    from sluice.proxy.link import Call
    from sluice.proxy.session import Session

_SHOWN_ARGUMENT = 256


class UnderWay:
    """One call with a place; ``flow`` is None for the moment in which it begins."""

    __slots__ = ("began", "call", "flow", "session")

    def __init__(self, call: Call, session: Session) -> None:
        """Begin now. ``session`` has the configuration that the call keeps."""
        self.call = call
        self.session = session
        self.flow: Flow | None = None
        self.began = time.time()

    def describe(self) -> dict[str, Any]:
        """Return what ``sluice proxy top`` shows of it: plain values, nothing of them raw."""
        call, flow = self.call, self.flow
        argument = call.argument
        return {
            "id": call.ident,
            "form": call.form,
            "source": call.source,
            "target": call.target,
            "service": call.service,
            "argument": None if argument is None else escape(argument, _SHOWN_ARGUMENT),
            "chain": call.chain,
            "state": "opening" if flow is None else flow.state,
            "seconds": round(max(time.time() - self.began, 0.0), 3),
            "bytes": flow.counters() if flow is not None else {},
        }


class Calls:
    """All calls of a server. ``on_empty`` is called whenever the last one ends."""

    def __init__(self, on_empty: Callable[[], None] = lambda: None) -> None:
        """Begin with none."""
        self._calls: dict[str, UnderWay] = {}
        self._of_source: dict[str, int] = {}
        self._on_empty = on_empty
        self.stopping = False

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._calls)

    def begin(
        self,
        session: Session,
        call: Call,
        in_fd: int,
        out_fd: int,
        on_end: Callable[[int], None],
    ) -> UnderWay | None:
        """Give a call a place and start it; None where it is refused, which is told and recorded.

        Owns both descriptors. ``on_end(exit_code)`` is called once, maybe at once.
        """
        reason = self._objection(session, call)
        if reason is not None:
            session.turn_away(call, Cause("busy", reason, exit_code=126), in_fd, out_fd, on_end)
            return None
        entry = UnderWay(call, session)
        self._calls[call.ident] = entry
        self._of_source[call.source] = self._of_source.get(call.source, 0) + 1

        def ended(code: int) -> None:
            self._leave(entry)
            on_end(code)

        entry.flow = session.begin(call, in_fd, out_fd, ended)
        return entry if call.ident in self._calls else None

    def _objection(self, session: Session, call: Call) -> str | None:
        """Return why there is no place for a call, if there is none."""
        settings = session.settings
        if self.stopping:
            return "the server ends"
        if len(self._calls) >= settings.max_calls:
            return f"{settings.max_calls} calls are under way already (max_calls)"
        if self._of_source.get(call.source, 0) >= settings.max_calls_source:
            most = settings.max_calls_source
            return f"{most} calls of '{call.source}' are under way already (max_calls_source)"
        return None

    def _leave(self, entry: UnderWay) -> None:
        if self._calls.pop(entry.call.ident, None) is None:
            return
        source = entry.call.source
        self._of_source[source] -= 1
        if not self._of_source[source]:
            del self._of_source[source]
        if not self._calls:
            self._on_empty()

    def describe(self) -> list[dict[str, Any]]:
        """Return all calls as plain values, the oldest first."""
        return [entry.describe() for entry in self._calls.values()]

    def end(self, ident: str, cause: Cause) -> bool:
        """End one call; tell whether there was one of that name."""
        entry = self._calls.get(ident)
        if entry is None or entry.flow is None:
            return False
        entry.flow.abort(cause)
        return True

    def end_all(self, cause: Cause) -> None:
        """End every call."""
        for ident in list(self._calls):
            self.end(ident, cause)
