"""The AdminVM's own socket, for the ``sluice`` command.

JSON lines over AF_UNIX: one request object a line, one answer object a line, in order::

    {"method": "start", "name": "work"}
    {"ok": true, "result": null}
    {"ok": false, "error": "there is no domain work", "kind": "LocalError"}

========  ======================  =============================================================
method    fields                  result
========  ======================  =============================================================
ping                              {"pid": N, "uptime": seconds, "calls": N}
list                              a list of domains: name, qid, uuid, class, label, kind, template,
                                  state, pid, calls, limits
state     name                    "Running", "Halted", ...
start     name                    null, once the agent answers
stop      name                    null, once nothing of it is left
kill      name                    likewise, without asking the agent
limits    name, [memory],         null; sets other limits (MiB, numbers) while the domain runs
          [processes], [cpus]
run       name, command, [user]   {"status": N, "stdout": TEXT, "stderr": TEXT}; for small outputs
shutdown                          null; the AdminVM ends then
========  ======================  =============================================================

The socket has mode 0600 from its first moment and the peer's user is checked as well: only the
AdminVM's own user and root may speak here. ``request`` is the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

from sluice.errors import LocalError, SluiceError

if TYPE_CHECKING:
    from sluice.adminvm.supervisor import Supervisor
    from sluice.adminvm.system import AdminVM

MAX_LINE = 1 << 20
MAX_CONNECTIONS = 64


class ApiServer:
    """Serves the socket; each connection is one supervised task."""

    def __init__(self, adminvm: AdminVM, path: str, tasks: Supervisor) -> None:
        """Replace and bind ``path``. Raises LocalError where that cannot be."""
        self._adminvm = adminvm
        self._path = path
        self._tasks = tasks
        self._open = 0
        self._loop = asyncio.get_running_loop()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        previous = os.umask(0o177)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self._listener.bind(path)
            self._listener.listen(MAX_CONNECTIONS)
        except OSError as error:
            self._listener.close()
            raise LocalError(f"cannot listen on {path}: {error.strerror}") from error
        finally:
            os.umask(previous)
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Take no more connections and remove the socket. May be repeated."""
        if self._listener.fileno() < 0:
            return
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EINTR):
                # No descriptor is left: look again in a moment instead of all the time.
                self._loop.remove_reader(self._listener.fileno())
                self._loop.call_later(0.1, self._accept_again)
            return
        if not _is_ours(sock) or self._open >= MAX_CONNECTIONS:
            sock.close()
            return
        self._open += 1
        if self._tasks.spawn(self._serve(sock), "connection of the sluice command") is None:
            self._open -= 1
            sock.close()

    def _accept_again(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE)
        except OSError:
            sock.close()
            self._open -= 1
            return
        try:
            while line := await reader.readline():
                answer = await self._answer(line)
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):
            pass  # gone, or a line over the bound
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise LocalError("a request is an object")
            return {"ok": True, "result": await self._call(request)}
        except (SluiceError, TimeoutError) as error:
            return {"ok": False, "error": str(error), "kind": type(error).__name__}
        except ValueError as error:
            return {"ok": False, "error": f"not JSON: {error}", "kind": "LocalError"}

    async def _call(self, request: dict[str, Any]) -> Any:
        method = request.get("method")
        adminvm = self._adminvm
        match method:
            case "ping":
                calls = len(adminvm.dispatcher.numbers)
                return {"pid": os.getpid(), "uptime": adminvm.uptime, "calls": calls}
            case "list":
                return adminvm.describe()
            case "state":
                return adminvm.state(_text(request, "name"))
            case "start":
                await adminvm.start_domain(_text(request, "name"))
            case "stop" | "kill":
                await adminvm.stop_domain(_text(request, "name"), kill=method == "kill")
            case "limits":
                adminvm.change_limits(
                    _text(request, "name"),
                    memory=_number(request, "memory"),
                    processes=_number(request, "processes"),
                    cpus=_number(request, "cpus"),
                )
            case "run":
                return await self._run(request)
            case "shutdown":
                adminvm.request_stop()
            case _:
                raise LocalError(f"there is no method {method!r}")
        return None

    async def _run(self, request: dict[str, Any]) -> dict[str, Any]:
        user = request.get("user", "DEFAULT")
        completed = await self._adminvm.run(
            _text(request, "name"), _text(request, "command"), user=str(user)
        )
        return {
            "status": completed.status,
            "stdout": completed.stdout.decode("utf-8", "replace"),
            "stderr": completed.stderr.decode("utf-8", "replace"),
        }


def _text(request: dict[str, Any], key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str) or not value:
        raise LocalError(f"the request needs {key!r}")
    return value


def _number(request: dict[str, Any], key: str) -> int | None:
    value = request.get(key)
    if value is not None and (type(value) is not int or not 0 < value < 1 << 32):
        raise LocalError(f"{key!r} must be a number above 0")
    return value


def _is_ours(sock: socket.socket) -> bool:
    peer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", peer)[1] in (0, os.geteuid())


class NotRunningError(LocalError):
    """No AdminVM listens where it was looked for."""


def request(path: str | os.PathLike[str], method: str, timeout: float = 90.0, **fields: Any) -> Any:
    """Ask the AdminVM whose socket is ``path`` and return its result; for the command line.

    Raises NotRunningError where nobody answers there, and LocalError with the AdminVM's own words
    where it refuses; its attribute ``kind`` is then the name of the error's class.
    """
    line = json.dumps({"method": method, **fields}).encode() + b"\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(os.fspath(path))
            sock.sendall(line)
            with sock.makefile("rb") as stream:
                answer = json.loads(stream.readline() or b"null")
        except TimeoutError:
            raise LocalError(f"no answer within {timeout:g} seconds") from None
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
                raise NotRunningError("no AdminVM runs here (start it with `sluice up`)") from None
            raise LocalError(f"the AdminVM cannot be asked: {error.strerror}") from error
    if not isinstance(answer, dict):
        raise LocalError("the AdminVM gave no answer")
    if not answer.get("ok"):
        failure = LocalError(str(answer.get("error")))
        failure.kind = str(answer.get("kind"))  # type: ignore[attr-defined]
        raise failure
    return answer.get("result")
