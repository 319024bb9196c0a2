"""The launcher of the resident form: hands a call to the server and exits with its code.

``argv[1]`` is CHAIN+TARGET+SERVICE[+ARGUMENT], ``QREXEC_REMOTE_DOMAIN`` the source, stdin and
stdout the call, as in the program form. It starts for each call and imports next to nothing; what
is asked for is judged by the server. A server that is not there, does not answer or goes away in
the middle of a call: 125. docs/spec/proxy.md 2.
"""

from __future__ import annotations

import _socket
import os
import sys

from sluice.proxy.handover import TAKEN, decode_end, encode_request, send_request
from sluice.proxy.sockets import LAUNCHER, connect, find, set_timeout

TROUBLE = 125
# How long the server may take to say that it has the call.
PATIENCE = 10.0


def main(argv: list[str] | None = None) -> int:
    """Have one call served and return the exit code for the source."""
    argv = sys.argv if argv is None else argv
    _to_nowhere(2)
    source = os.environ.get("QREXEC_REMOTE_DOMAIN", "")
    # The server refuses what is no call, and records it.
    argument = argv[1] if len(argv) == 2 else ""
    path = find(LAUNCHER)
    if path is None:
        return _trouble("the server does not run: it has no socket")
    try:
        sock = connect(path, _socket.SOCK_SEQPACKET, PATIENCE)
    except OSError as error:
        return _trouble(f"the server does not run: {path}: {error.strerror}")
    try:
        send_request(sock, encode_request(source, argument), 0, 1)
        # What we keep open the server cannot close: the source would see no end-of-file.
        _to_nowhere(0)
        _to_nowhere(1)
        if sock.recv(16) != TAKEN:
            return _trouble("the server did not take the call")
        set_timeout(sock, 0)
        code = decode_end(sock.recv(16))
    except OSError as error:
        return _trouble(f"the server is gone: {error.strerror}")
    if code is None:
        return _trouble("the server is gone")
    return code


def _to_nowhere(fd: int) -> None:
    """Put /dev/null in the place of a descriptor, so that its number is not given out again."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, fd)
    os.close(null)


def _trouble(text: str) -> int:
    """Say in the log why the call is not made; return the exit code."""
    from sluice.proxy.log import ERROR, Log
    from sluice.proxy.paths import state_directory

    log = Log("auto", stderr=False, fallback=state_directory("") + "/proxy.log")
    log.write(f"launcher: call not made: {text}", ERROR)
    return TROUBLE
