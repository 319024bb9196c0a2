"""``sluice cp``: copy files between the host and a domain.

Theory. The domain's end is a program inside the domain, with the domain's powers: whatever links
and names are there, they lead nowhere else. It sends and takes a plain sequence of entries, of
which the host trusts nothing: names are one component, kinds are file or directory, numbers are
bounded. The host's end never uses a path that came from the domain; it makes each entry relative to
an open directory, as something new, and follows no link.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import threading

import click

from sluice import runtime
from sluice.agent.copying import CopyError, receive, send
from sluice.cli.common import make_running, places, root_option, tell_errors
from sluice.cli.run import client
from sluice.domains.model import name_error
from sluice.domains.paths import Paths
from sluice.errors import LocalError, RemoteError
from sluice.wire.names import escape

LAST_WORDS = 1.0  # seconds that a sender may take to end whose stream made no sense


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option("--user", "-u", default="DEFAULT", help="Be this user of the domain.")
@root_option
@tell_errors
def command(source: str, destination: str, user: str, root: str | None) -> None:
    """Copy a file or directory: `sluice cp FILE NAME:PATH`, or `sluice cp NAME:PATH FILE`.

    A PATH that is not absolute begins in the user's home. Into a directory that exists the copy
    goes under its own name. Existing files are not replaced.
    """
    paths = places(root)
    from_domain, to_domain = split(source), split(destination)
    if (from_domain is None) == (to_domain is None):
        raise LocalError("one of the two must be NAME:PATH, the other a file here")
    if to_domain is not None:
        copy_in(paths, source, *to_domain, user)
    elif from_domain is not None:
        copy_out(paths, *from_domain, destination, user)


def split(word: str) -> tuple[str, str] | None:
    """Return domain and path of ``NAME:PATH``, or None for a place on the host."""
    name, colon, path = word.partition(":")
    if not colon or "/" in name or name_error(name):
        return None
    return name, path or "."


def _program(paths: Paths, name: str, *words: str) -> str:
    from sluice.cli.shell import in_process_domain

    directory = runtime.INSIDE_BIN
    if in_process_domain(paths, name):
        directory = runtime.bin_directory()
    return shlex.join([f"{directory}/sluice-copy", *words])


def copy_in(paths: Paths, source: str, name: str, path: str, user: str) -> None:
    """Send ``source`` into a domain. Raises LocalError or RemoteError."""
    make_running(paths, name)
    if not os.path.lexists(source):
        raise LocalError(f"{source}: no such file")
    own_name = os.path.basename(os.path.abspath(source))
    words = ["receive", path, own_name] if own_name else ["receive", path]
    command = client(paths, name, _program(paths, name, *words), user, hangup=True)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    said = LastWords(process)
    left_out: list[str] = []
    with process:
        try:
            with process.stdin as stream:
                left_out = send(stream.fileno(), source)
        except BrokenPipeError:
            pass  # it says itself why it stopped
        except CopyError as error:
            raise LocalError(str(error)) from error
        finally:
            last = said.text()
    _check(process.returncode, name, last)
    for skipped in left_out:
        print(f"sluice: left out (not a file or directory): {escape(skipped)}", file=sys.stderr)


def copy_out(paths: Paths, name: str, path: str, destination: str, user: str) -> None:
    """Receive from a domain, as ``destination``. Raises LocalError or RemoteError."""
    own_name = os.path.basename(os.path.normpath(path))  # ours: the domain does not choose it
    if os.path.isdir(destination) and own_name in ("", ".", "..", "~"):
        raise LocalError(f"{destination}: is a directory; say what the copy is to be called")
    make_running(paths, name)
    command = client(paths, name, _program(paths, name, "send", path), user, hangup=True)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    words = LastWords(process)
    failure = ""
    with process:
        try:
            with process.stdout as stream:
                receive(stream.fileno(), destination, own_name, reserve=True)
        except CopyError as error:
            failure = str(error)
            # It would go on sending for as long as it likes. Where it has ended it says why.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
            process.kill()
        finally:
            said = words.text()
    if failure and not said.strip():  # else it says itself why it stopped
        raise RemoteError(f"{name}: {escape(failure)}")
    _check(process.returncode, name, said)
    if failure:
        raise RemoteError(f"{name}: {escape(failure)}")
    if said.strip():
        print(f"sluice: {name}: {escape(said.strip())}", file=sys.stderr)


class LastWords:
    """Reads what a process says on stderr while other things go on; keeps the end of it.

    A domain that floods it must not stop the copy, which waits for nobody to read it.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Begin to read the process's ``stderr`` pipe."""
        self._process = process
        self._kept = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        while piece := os.read(self._process.stderr.fileno(), 65536):
            self._kept = (self._kept + piece)[-4096:]

    def text(self) -> bytes:
        """Wait for the end and return the last of it, at most 4096 bytes."""
        self._thread.join()
        return self._kept


def _check(status: int, name: str, untrusted_said: bytes) -> None:
    if status:
        said = escape(untrusted_said.strip().split(b"\n")[-1]) or f"ended with {status}"
        print(f"sluice: {name}: {said}", file=sys.stderr)
        sys.exit(status)
