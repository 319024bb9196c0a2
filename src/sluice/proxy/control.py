"""The control socket of the resident form: looking at it, ending calls, reloading.

JSON lines over AF_UNIX: one request object a line, one answer object a line, in order::

    {"method": "calls"}                 {"ok": true, "result": [...]}
    {"method": "end", "id": "..."}      {"ok": false, "error": "there is no call of that name"}

========  =======  =================================================================================
method    fields   result
========  =======  =================================================================================
calls              a list of calls under way: id, form, source, target, service, argument, chain,
                   state, seconds, bytes (each way: read, written, spliced, discarded)
end       id       null; the call is aborted with the cause "killed"
status             pid, uptime (seconds), calls, max_calls, held (bytes), max_memory,
                   files (of the configuration in force), error (of the last reload, or null)
reload             null; raises what is wrong with the configuration as an error
========  =======  =================================================================================

Only the server's own user and root may speak here. ``ControlClient`` is the client.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

from sluice.errors import LocalError, SluiceError
from sluice.proxy import sockets

MAX_LINE = 4 << 20
MAX_REQUEST = 64 << 10
MAX_CONNECTIONS = 16


class ControlServer:
    """Answers requests by calling ``methods``: name -> function of the request's other fields."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, methods: dict[str, Callable[..., Any]]
    ) -> None:
        """Take the functions; what they raise of ours is the answer."""
        self._loop = loop
        self._methods = methods
        self._open: set[_Conversation] = set()

    def connection(self, sock: socket.socket) -> None:
        """Serve a connection."""
        if len(self._open) >= MAX_CONNECTIONS:
            sock.close()
            return
        self._open.add(_Conversation(self._loop, sock, self.answer, self._open.discard))

    def close(self) -> None:
        """Close all connections."""
        for conversation in list(self._open):
            conversation.close()

    def answer(self, line: bytes) -> dict[str, Any]:
        """Return the answer to a line; never raises."""
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise LocalError("a request is an object")
            name = request.pop("method", None)
            method = self._methods.get(name) if isinstance(name, str) else None
            if method is None:
                raise LocalError(f"there is no method {name!r}")
            return {"ok": True, "result": method(**request)}
        except SluiceError as error:
            return {"ok": False, "error": str(error)}
        except TypeError as error:
            return {"ok": False, "error": f"wrong fields: {error}"}
        except (ValueError, RecursionError) as error:
            return {"ok": False, "error": f"not JSON: {error}"}


class _Conversation:
    """One connection: lines in, lines out, both bounded."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        answer: Callable[[bytes], dict[str, Any]],
        on_close: Callable[[_Conversation], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._answer = answer
        self._on_close = on_close
        self._in = b""
        self._out = b""
        loop.add_reader(sock.fileno(), self._readable)

    def close(self) -> None:
        """Close it. May be repeated."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
            self._on_close(self)

    def _readable(self) -> None:
        try:
            data = self._sock.recv(MAX_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._in += data
        if not data or len(self._in) > MAX_REQUEST:
            self.close()
            return
        *lines, self._in = self._in.split(b"\n")
        for line in lines:
            self._out += json.dumps(self._answer(line)).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        """Send what waits; while a client does not read, it is not read either."""
        try:
            sent = self._sock.send(self._out) if self._out else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        self._out = self._out[sent:]
        if self._out:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.add_writer(self._sock.fileno(), self._write)
        else:
            self._loop.remove_writer(self._sock.fileno())
            self._loop.add_reader(self._sock.fileno(), self._readable)


class ControlClient:
    """A connection to the control socket of a running server. Blocking; each answer has a deadline.

    Use as a context manager, or ``close`` it.
    """

    def __init__(self, path: str | None = None, *, timeout: float = 10.0) -> None:
        """Connect. Raises LocalError where no server runs."""
        path = path or sockets.find(sockets.CONTROL)
        if path is None:
            raise LocalError("the proxy's server does not run: it has no socket")
        try:
            raw = sockets.connect(path, socket.SOCK_STREAM, timeout)
        except OSError as error:
            raise LocalError(f"the proxy's server does not run: {path}: {error.strerror}") from None
        self._sock = socket.socket(fileno=raw.detach())
        self._stream = self._sock.makefile("rb")

    def __enter__(self) -> ControlClient:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()
        self._sock.close()

    def request(self, method: str, **fields: Any) -> Any:
        """Ask, and return the result. Raises LocalError with what the server objects to."""
        try:
            self._sock.sendall(json.dumps({"method": method, **fields}).encode() + b"\n")
            line = self._stream.readline(MAX_LINE)
        except OSError as error:
            raise LocalError(f"the proxy's server is gone: {error.strerror}") from None
        if not line.endswith(b"\n"):
            raise LocalError("the proxy's server is gone")
        answer = json.loads(line)
        if not answer["ok"]:
            raise LocalError(answer["error"])
        return answer["result"]

    def calls(self) -> list[dict[str, Any]]:
        """Return the calls under way, the oldest first; see the table above."""
        found: list[dict[str, Any]] = self.request("calls")
        return found

    def end(self, ident: str) -> None:
        """End a call. Raises LocalError where there is none of that name."""
        self.request("end", id=ident)

    def status(self) -> dict[str, Any]:
        """Return the state of the server; see the table above."""
        found: dict[str, Any] = self.request("status")
        return found

    def reload(self) -> None:
        """Let the server read its configuration. Raises LocalError with what is wrong in it."""
        self.request("reload")
