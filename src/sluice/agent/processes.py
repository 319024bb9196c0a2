"""The processes that an agent started, and the signals that tell of them.

Theory. One process serves all calls, so it must say of each signal which call it is about. SIGCHLD
arrives through the interpreter's wake-up descriptor and is answered by reaping everything there
is: as process 1 of a domain the agent inherits orphans too. SIGUSR1 (section 10.6: "my output
comes over my stdin from now on") is blocked and read from a signalfd, which tells the sender's
process id. The sender may be any descendant of a service: services are session leaders, so the
sender's session names the call, and where it has made a session of its own, the chain of its
parents does. A service may end its output right behind the signal: whoever is about to act on an
end calls ``hear_switches`` first.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # it has no stub
import os

from sluice.agent.procfs import stat_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.flow.reactor import Loop


# sizeof(struct signalfd_siginfo), and of glibc's sigset_t.
SIGINFO_SIZE = 128
SIGSET_SIZE = 128


class ProcessTable:
    """Knows the processes that are ours to wait for."""

    def __init__(self, loop: Loop, on_terminate: Callable[[], None] | None = None) -> None:
        """Take over SIGCHLD, and SIGTERM where ``on_terminate`` is given. Main thread only."""
        self._loop = loop
        self._exits: dict[int, Callable[[int], None] | None] = {}
        self._switches: dict[int, Callable[[], None]] = {}
        self._handlers: dict[int, Callable[[], None]] = {}
        self._wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        _signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        # A handler in Python must exist, or the signal keeps its default; the byte on the
        # wake-up descriptor is what we act on.
        _signal.signal(_signal.SIGCHLD, _nothing)
        if on_terminate is not None:
            self.on_signal(_signal.SIGTERM, on_terminate)
        loop.add_reader(self._wake_read, self.hear_signals)
        # What ended before the handler stood: process 1 may have had another life before.
        loop.call_soon(self._reap)
        self._usr1 = -1

    def on_signal(self, number: int, callback: Callable[[], None]) -> None:
        """Call ``callback()`` in the loop whenever signal ``number`` comes, whoever sends it."""
        self._handlers[number] = callback
        _signal.signal(number, _nothing)

    def watch(
        self,
        pid: int,
        on_exit: Callable[[int], None] | None,
        on_switch: Callable[[], None] | None = None,
    ) -> None:
        """Wait for ``pid``: ``on_exit(0..255 or 128 + signal)``; ``on_switch()`` at its SIGUSR1."""
        self._exits[pid] = on_exit
        if on_switch is not None:
            self._switches[pid] = on_switch

    def forget(self, pid: int) -> None:
        """Reap ``pid`` when it ends, but tell nobody."""
        if pid in self._exits:
            self._exits[pid] = None
        self._switches.pop(pid, None)

    @property
    def live(self) -> list[int]:
        """The processes that were started and have not ended."""
        return list(self._exits)

    def hear_signals(self) -> None:
        """Act on the signals that have arrived, before they would come up by themselves."""
        try:
            numbers = os.read(self._wake_read, 512)
        except BlockingIOError:
            return
        for number, callback in list(self._handlers.items()):
            if number in numbers:
                callback()
        if _signal.SIGCHLD in numbers:
            # Not from within whatever the caller is doing.
            self._loop.call_soon(self._reap)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.hear_switches()
            self._switches.pop(pid, None)
            on_exit = self._exits.pop(pid, None)
            if on_exit is not None:
                on_exit(exit_status(status))

    # --- SIGUSR1 -------------------------------------------------------------------------------

    def listen_for_switches(self) -> None:
        """Begin to hear SIGUSR1; harmless when called again. Call before the first service."""
        if self._usr1 >= 0:
            return
        _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGUSR1})
        self._usr1 = open_signalfd(_signal.SIGUSR1)
        self._loop.add_reader(self._usr1, self.hear_switches)

    def hear_switches(self) -> None:
        """Act on every SIGUSR1 that has been sent so far."""
        if self._usr1 < 0:
            return
        try:
            data = os.read(self._usr1, 8 * SIGINFO_SIZE)
        except BlockingIOError:
            return
        for at in range(0, len(data), SIGINFO_SIZE):
            # ssi_pid is the fourth 32-bit field of struct signalfd_siginfo.
            sender = int.from_bytes(data[at + 12 : at + 16], "little")
            try:
                session = os.getsid(sender) if sender else 0
            except OSError:
                session = 0
            on_switch = self._find_switch(sender, session)
            if on_switch is not None:
                on_switch()

    def _find_switch(self, sender: int, session: int) -> Callable[[], None] | None:
        """Find the call that a sender of SIGUSR1 belongs to, or None."""
        for pid in (session, sender):
            if pid in self._switches:
                return self._switches.pop(pid)
        chain = parents(sender)
        for ancestor in (*chain, *parents(session)):
            if ancestor in self._switches:
                return self._switches.pop(ancestor)
        # Gone before anybody could look (a kill program ends at once): with a single candidate
        # there is no doubt all the same.
        if not chain and len(self._switches) == 1:
            return self._switches.popitem()[1]
        return None


def _nothing(_number: int, _frame: object) -> None:
    """Handle a signal by doing nothing: the wake-up descriptor has its number."""


def open_signalfd(number: int) -> int:
    """Return a descriptor that signal ``number``, which must be blocked, can be read from.

    Python has no signalfd of its own. The bare core of ctypes is loaded for it: a quarter of a
    millisecond and 70 KiB, once an agent has something to start.
    """
    import _ctypes

    class Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
        _type_ = "i"

    class Function(_ctypes.CFuncPtr):
        _flags_ = _ctypes.FUNCFLAG_CDECL
        _restype_ = Int

    program = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]
    signalfd = Function(_ctypes.dlsym(program, "signalfd"))
    mask = (1 << (number - 1)).to_bytes(SIGSET_SIZE, "little")
    fd: int = signalfd(-1, mask, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise OSError("signalfd failed")
    return fd


def exit_status(wait_status: int) -> int:
    """Turn a wait status into 0..255, or 128 + signal (section 10.7)."""
    code = os.waitstatus_to_exitcode(wait_status)
    return 128 - code if code < 0 else code


def parents(pid: int) -> list[int]:
    """Return the chain of parents of ``pid``, nearest first, as far as /proc tells."""
    chain: list[int] = []
    while pid > 1 and len(chain) < 64:
        try:
            fields = stat_fields(pid)
        except OSError:
            break
        pid = int(fields[1])
        chain.append(pid)
    return chain
