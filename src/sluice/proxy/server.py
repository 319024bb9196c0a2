"""The resident form: one process for all calls (docs/spec/proxy.md 2, 4, 8 and 10).

Theory. The server goes through

    starting   configuration, service configuration, sockets: what is wrong ends it here
    serving    connections become calls (intake.py), calls have places (underway.py)
    draining   after SIGTERM or SIGINT: no new calls; those under way have ``grace`` seconds
    ending     what still runs is aborted; when the last process is reaped all is gone

A call keeps the session, and with it the chain, that it began with. A change of the configuration
that does not validate is reported and forgotten. It all happens on one asyncio loop, whose
callbacks move the bytes; nothing here waits for anything but the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from sluice.errors import ConfigError, LocalError, SluiceError
from sluice.proxy import sockets
from sluice.proxy.configuration import load
from sluice.proxy.control import ControlServer
from sluice.proxy.intake import PATIENCE, Intake
from sluice.proxy.link import Memory
from sluice.proxy.listening import Listener, bind, inherited
from sluice.proxy.log import ERROR, WARNING, Log
from sluice.proxy.model import Configuration
from sluice.proxy.names import PROXY_SERVICE
from sluice.proxy.reload import Watcher, directories
from sluice.proxy.service_check import skips_descriptor
from sluice.proxy.session import Session
from sluice.proxy.settings import parse_address
from sluice.proxy.stage import Cause
from sluice.proxy.systemd import Notifier, listen_fds
from sluice.proxy.underway import Calls

GRACE = 5.0
# Descriptors that one call may have open here: its ends, pipes, a pidfd, the launcher.
_DESCRIPTORS_EACH = 12
_DESCRIPTORS_BESIDE = 64
# Read once, when the server starts.
_FIXED = ("log", "metrics")


class Server:
    """The resident proxy. ``await start()``, then ``await run()`` until it was told to end."""

    def __init__(
        self,
        path: str | None = None,
        *,
        directory: str | None = None,
        grace: float = GRACE,
        patience: float = PATIENCE,
        log: Log | None = None,
    ) -> None:
        """Take the configuration's path (None: the usual places) and the sockets' directory.

        ``grace`` is what calls under way get at the end, ``patience`` what a connection gets to
        say what it wants (seconds). Raises ConfigError where the configuration is wrong.
        """
        self._path = path
        self._directory = directory
        self._grace = grace
        self._patience = patience
        self.configuration = load(path)
        self.log = log or Log(self.configuration.settings.log)
        self.memory = Memory(self.configuration.settings.max_memory)
        self.calls = Calls(self._empty)
        self.error: str | None = None
        self._began = time.monotonic()
        self._notifier = Notifier()
        self._listeners: list[Listener] = []
        self._closing: list[Callable[[], None]] = []
        self._watcher: Watcher | None = None
        self._metrics: Any = None
        self._told = asyncio.Event()
        self._gone = asyncio.Event()

    # --- starting -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the sockets and serve. Raises LocalError or ConfigError where that cannot be."""
        self.loop = asyncio.get_running_loop()
        objection = skips_descriptor(PROXY_SERVICE)
        if objection is not None:
            raise ConfigError(objection, suggestion="remove it: the source's word would count")
        self._make_room()
        self.loop.set_exception_handler(self._exception)
        self._open_metrics()
        self.session = self._make_session(self.configuration)
        # Each time some of the calls in which a server before this one was killed.
        while self.session.unfinished.collect():
            pass
        self.intake = Intake(
            self.loop,
            self.calls,
            lambda: self.session,
            patience=self._patience,
            most=2 * self.configuration.settings.max_calls,
            objection=lambda: skips_descriptor(PROXY_SERVICE),
        )
        self._control = ControlServer(self.loop, self._methods())
        self._closing += [self._control.close, self.intake.close]
        try:
            self._listen()
        except BaseException:
            self._stop_listening()
            raise
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self.stop)
        self.loop.add_signal_handler(signal.SIGHUP, self.reload)
        self._watch()
        self.log.write(f"serving {len(self.configuration.chains)} chains")
        self._notifier.ready(self._status_line())

    def _listen(self) -> None:
        """Use what systemd opened; bind what it did not."""
        handlers: dict[str, tuple[socket.SocketKind, Callable[[socket.socket], None]]] = {
            sockets.LAUNCHER: (socket.SOCK_SEQPACKET, self.intake.launcher),
            sockets.RAW: (socket.SOCK_STREAM, self.intake.raw),
            sockets.CONTROL: (socket.SOCK_STREAM, self._control.connection),
        }
        given: set[str] = set()
        for label, fd in listen_fds():
            sock = inherited(fd)
            name = f"{label}.sock" if f"{label}.sock" in handlers else _name_by_kind(sock)
            if name in given or sock.type != handlers[name][0]:
                raise LocalError(f"systemd handed over a socket '{label}' that does not fit")
            given.add(name)
            self._listeners.append(Listener(self.loop, sock, handlers[name][1], self._report))
        # Under socket activation only the control socket is ours to make, and may be missing.
        missing = [name for name in handlers if name not in given]
        if given:
            missing = [name for name in missing if name == sockets.CONTROL]
        directory = self._directory or sockets.make_directory()
        if directory is None:
            if not given:
                tried = ", ".join(sockets.directories())
                raise LocalError(f"no directory for the sockets; tried {tried}")
            return
        for name in missing:
            kind, handler = handlers[name]
            self._add_listener(f"{directory}/{name}", kind, handler)

    def _add_listener(
        self, path: str, kind: socket.SocketKind, handler: Callable[[socket.socket], None]
    ) -> None:
        sock = bind(path, kind)
        self._listeners.append(Listener(self.loop, sock, handler, self._report, path=path))

    def _open_metrics(self) -> None:
        """Count, and serve the counters, where the configuration wants it."""
        setting = self.configuration.settings.metrics
        if not setting:
            return
        try:
            from sluice.proxy.exporter import Metrics, MetricsPage
        except ImportError as error:
            text = f"needs a library that is not installed: {error.name}"
            raise ConfigError(text, key="proxy.metrics") from None
        self._metrics = Metrics(self._gauges)
        page = MetricsPage(self.loop, self._metrics.text)
        self._closing.append(page.close)
        address = parse_address(setting)
        if isinstance(address, str):
            self._add_listener(address, socket.SOCK_STREAM, page.connection)
            return
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen(8)
        except OSError as error:
            sock.close()
            raise LocalError(f"cannot serve metrics on {setting}: {error.strerror}") from None
        self._listeners.append(Listener(self.loop, sock, page.connection, self._report))

    def _make_room(self) -> None:
        """See that there are descriptors for as many calls as may be under way."""
        needed = self.configuration.settings.max_calls * _DESCRIPTORS_EACH + _DESCRIPTORS_BESIDE
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < needed and soft != resource.RLIM_INFINITY:
            soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < needed and soft != resource.RLIM_INFINITY:
            self.log.write(
                f"{soft} descriptors are too few for max_calls = "
                f"{self.configuration.settings.max_calls}: {needed} may be needed",
                WARNING,
            )

    def _make_session(self, configuration: Configuration) -> Session:
        session = Session(self.loop, configuration, self.log, memory=self.memory)
        if self._metrics is not None:
            session.observer = self._metrics.observe
        return session

    # --- the configuration ----------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            self._watcher = Watcher(self.loop, self.reload)
            self._watcher.watch(directories(self.configuration, self._path))
        except OSError as error:
            self._report(f"changes of the configuration are not seen: {error.strerror}; use SIGHUP")

    def reload(self) -> None:
        """Read the configuration again; one that does not validate leaves the old in force."""
        self._notifier.reloading()
        try:
            configuration = load(self._path)
        except SluiceError as error:
            self.error = str(error)
            if self._metrics is not None:
                self._metrics.reloaded(False)
            self.log.write(f"the configuration is left as it was: {error}", ERROR)
        else:
            self._put_in_force(configuration)
        if self._watcher is not None:
            with contextlib.suppress(OSError):
                self._watcher.watch(directories(self.configuration, self._path))
        self._notifier.ready(self._status_line())

    def _put_in_force(self, configuration: Configuration) -> None:
        for name in _FIXED:
            old = getattr(self.configuration.settings, name)
            if getattr(configuration.settings, name) != old:
                self._report(f"'{name}' takes effect when the server is started again")
        self.error = None
        self.configuration = configuration
        self.memory.set_limit(configuration.settings.max_memory)
        self.session = self._make_session(configuration)
        if self._metrics is not None:
            self._metrics.reloaded(True)
        self.log.write(f"the configuration was read: {len(configuration.chains)} chains")

    # --- ending -------------------------------------------------------------------------------

    def stop(self) -> None:
        """Begin to end: no new calls. A second time: calls under way are aborted at once."""
        if self._told.is_set():
            self._abort_all()
        self._told.set()

    async def run(self) -> None:
        """Serve until ``stop``, then drain; everything is gone afterwards."""
        await self._told.wait()
        self.calls.stopping = True
        self._stop_listening()
        self._notifier.stopping(f"{len(self.calls)} calls under way")
        if len(self.calls):
            self.log.write(f"ending: {len(self.calls)} calls have {self._grace:g} s")
            timer = self.loop.call_later(self._grace, self._abort_all)
            await self._gone.wait()
            timer.cancel()
        self.log.write("ended")

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.close()
        for close in self._closing:
            close()
        if self._watcher is not None:
            self._watcher.close()

    def _abort_all(self) -> None:
        self.calls.end_all(Cause("shutdown", "the server ends"))

    def _empty(self) -> None:
        if self._told.is_set():
            self._gone.set()

    # --- what there is to see -----------------------------------------------------------------

    def _methods(self) -> dict[str, Callable[..., Any]]:
        return {
            "calls": self.calls.describe,
            "end": self._end,
            "status": self.status,
            "reload": self._reload_or_raise,
        }

    def _end(self, id: str) -> None:
        if not self.calls.end(id, Cause("killed", "by the operator")):
            raise LocalError("there is no call of that name")

    def _reload_or_raise(self) -> None:
        self.reload()
        if self.error is not None:
            raise LocalError(self.error)

    def status(self) -> dict[str, Any]:
        """Return the state of the server as plain values (control.py)."""
        settings = self.configuration.settings
        return {
            "pid": os.getpid(),
            "uptime": round(time.monotonic() - self._began, 3),
            "calls": len(self.calls),
            "max_calls": settings.max_calls,
            "held": self.memory.held,
            "max_memory": self.memory.limit,
            "files": self.configuration.files,
            "error": self.error,
        }

    def _status_line(self) -> str:
        count = len(self.configuration.chains)
        return f"{count} chains" + (f"; not read: {self.error}" if self.error else "")

    def _gauges(self) -> dict[str, tuple[str, float]]:
        return {
            "sluice_proxy_calls_active": ("Calls under way.", len(self.calls)),
            "sluice_proxy_held_bytes": ("Bytes that all calls hold.", self.memory.held),
            "sluice_proxy_held_bytes_max": ("The bound of held bytes.", self.memory.limit),
            "sluice_proxy_configuration_valid": (
                "1, or 0 where the files do not validate and older ones are in force.",
                float(self.error is None),
            ),
        }

    def _report(self, text: str) -> None:
        self.log.write(text, WARNING)

    def _exception(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what a callback raised: a defect of ours, told with its place."""
        error = context.get("exception")
        place = ""
        trace = error.__traceback__ if error is not None else None
        while trace is not None:
            place = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
            trace = trace.tb_next
        self.log.write(f"internal error: {context.get('message')}: {error!r}{place}", ERROR)


def _name_by_kind(sock: socket.socket) -> str:
    """Return which of our sockets one without a known name must be."""
    return sockets.LAUNCHER if sock.type == socket.SOCK_SEQPACKET else sockets.RAW


async def serve(
    path: str | None = None, *, directory: str | None = None, grace: float = GRACE
) -> None:
    """Run a server until SIGTERM (``sluice proxy serve``)."""
    server = Server(path, directory=directory, grace=grace)
    await server.start()
    await server.run()
