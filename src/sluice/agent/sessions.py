"""Ending what a command has begun, when nobody waits for it any more.

Theory. Everything that is started for a call is in a session of its own, whose number is the
process id of its first process; what that starts belongs to the session until it makes one of its
own. As when a terminal hangs up, all of the session hear SIGHUP; unlike there, what does not heed
it hears SIGTERM a little later, and is killed in the end. Who wants to stay makes a session of its
own (``setsid``). The number of a session is not given out again while the session has a process.
docs/spec/wire-protocol.md 9.1.1.
"""

from __future__ import annotations

import os

from sluice.agent.procfs import stat_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.flow.reactor import Loop

# Signals (1 SIGHUP, 15 SIGTERM, 9 SIGKILL) and the seconds before the next of them.
STEPS = ((1, 3.0), (15, 7.0), (9, 0.0))
CONTINUE = 18  # SIGCONT: who is stopped hears nothing else


def members(session: int) -> list[int]:
    """Return the processes of a session, as far as /proc tells."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = stat_fields(name)
            except OSError:
                continue  # ended meanwhile
            if int(fields[3]) == session and fields[0] != b"Z":
                found.append(int(name))
    return found


def signal_all(session: int, number: int) -> bool:
    """Signal all processes of a session; tell whether there was any."""
    pids = members(session)
    for pid in pids:
        for each in (number, CONTINUE):
            try:  # noqa: SIM105
                os.kill(pid, each)
            except OSError:
                pass  # ended meanwhile, or has become somebody else
    return bool(pids)


def hang_up(loop: Loop, session: int, steps: tuple[tuple[int, float], ...] = STEPS) -> None:
    """Signal all processes of a session, and again as long as there are any, by ``steps``."""
    if steps and signal_all(session, steps[0][0]):
        loop.call_later(steps[0][1], hang_up, loop, session, steps[1:])
