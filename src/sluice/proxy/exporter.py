"""Metrics in the Prometheus text format, on a Unix socket or a loopback port (proxy.md 8).

No label has a value that a domain chose: chains and causes are ours, sources and services are in
the audit records.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from sluice.proxy.verdicts import DIRECTIONS

if TYPE_CHECKING:
    import asyncio

    from sluice.proxy.flow import Flow
    from sluice.proxy.link import Call
    from sluice.proxy.stage import Cause

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600, 3600)
_MAX_REQUEST = 8192
_MAX_CONNECTIONS = 8
_PATIENCE = 5.0
# Causes with which a call that began has ended; all others are refusals.
UNKNOWN = "unknown"


class Metrics:
    """The counters of a server. ``gauges`` returns name -> (help, value) of what is so now."""

    def __init__(self, gauges: Callable[[], dict[str, tuple[str, float]]]) -> None:
        """Begin at nought."""
        self.registry = CollectorRegistry()
        self._gauges = gauges
        self.registry.register(self)
        self._calls = Counter(
            "sluice_proxy_calls",
            "Calls that are over, by how they ended.",
            ["chain", "cause"],
            registry=self.registry,
        )
        self._refused = Counter(
            "sluice_proxy_refused",
            "Calls that were refused before they began.",
            ["cause"],
            registry=self.registry,
        )
        self._bytes = Counter(
            "sluice_proxy_bytes",
            "Bytes delivered, of calls that are over.",
            ["chain", "direction"],
            registry=self.registry,
        )
        self._open = Histogram(
            "sluice_proxy_open_seconds",
            "From the call's arrival until the far end was called.",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._length = Histogram(
            "sluice_proxy_call_seconds",
            "From the call's arrival to its end.",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._reloads = Counter(
            "sluice_proxy_reloads",
            "Readings of the configuration after the first.",
            ["result"],
            registry=self.registry,
        )

    def observe(self, call: Call, cause: Cause, flow: Flow | None) -> None:
        """Count a call that is over, or was refused."""
        if flow is None:
            self._refused.labels(cause.kind).inc()
            return
        chain = call.chain or UNKNOWN
        self._calls.labels(chain, cause.kind).inc()
        counters = flow.counters()
        for direction in DIRECTIONS:
            written = counters.get(direction.name, {}).get("written", 0)
            self._bytes.labels(chain, direction.name).inc(written)
        times = flow.times
        if "called" in times:
            self._open.observe(times["called"] - times["begun"])
        self._length.observe(times["ended"] - times["begun"])

    def reloaded(self, ok: bool) -> None:
        """Count a reading of the configuration."""
        self._reloads.labels("ok" if ok else "error").inc()

    def collect(self) -> Iterable[Metric]:
        """Yield the gauges, for the registry."""
        for name, (text, value) in self._gauges().items():
            yield GaugeMetricFamily(name, text, value=value)

    def describe(self) -> Iterable[Metric]:
        """Yield nothing: the names need not be known beforehand."""
        return ()

    def text(self) -> bytes:
        """Return all metrics in the text format."""
        return generate_latest(self.registry)


class MetricsPage:
    """Answers HTTP requests with one page; a connection serves one request."""

    def __init__(self, loop: asyncio.AbstractEventLoop, page: Callable[[], bytes]) -> None:
        """Take what returns the page."""
        self._loop = loop
        self._page = page
        self._open: dict[socket.socket, asyncio.TimerHandle] = {}

    def connection(self, sock: socket.socket) -> None:
        """Serve a connection."""
        if len(self._open) >= _MAX_CONNECTIONS:
            sock.close()
            return
        self._open[sock] = self._loop.call_later(_PATIENCE, self._close, sock)
        self._loop.add_reader(sock.fileno(), self._readable, sock, bytearray())

    def close(self) -> None:
        """Close all connections."""
        for sock in list(self._open):
            self._close(sock)

    def _close(self, sock: socket.socket) -> None:
        timer = self._open.pop(sock, None)
        if timer is not None:
            timer.cancel()
            self._loop.remove_reader(sock.fileno())
            self._loop.remove_writer(sock.fileno())
            sock.close()

    def _readable(self, sock: socket.socket, head: bytearray) -> None:
        try:
            data = sock.recv(_MAX_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        head += data
        if not data or len(head) > _MAX_REQUEST:
            self._close(sock)
        elif b"\r\n\r\n" in head or b"\n\n" in head:
            self._loop.remove_reader(sock.fileno())
            self._answer(sock, bytes(head))

    def _answer(self, sock: socket.socket, head: bytes) -> None:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD") or path not in (b"/", b"/metrics"):
            status, body = "404 Not Found", b"there is /metrics\n"
        else:
            status, body = "200 OK", self._page()
        answer = (
            f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE_LATEST}\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        ).encode()
        self._write(sock, memoryview(answer + (b"" if method == b"HEAD" else body)))

    def _write(self, sock: socket.socket, data: memoryview) -> None:
        try:
            data = data[sock.send(data) :]
        except BlockingIOError:
            pass
        except OSError:
            self._close(sock)
            return
        if data:
            self._loop.add_writer(sock.fileno(), self._write, sock, data)
        else:
            self._close(sock)
