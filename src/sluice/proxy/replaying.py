"""Making a recorded call again (``sluice proxy replay``, docs/spec/proxy.md 5.1)."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from sluice.errors import LocalError
from sluice.proxy import recording


class Recorded(NamedTuple):
    """What a record holds: who was called, and the bytes of each direction."""

    target: str
    descriptor: str
    said: bytes
    answered: bytes
    complete: bool


class Outcome(NamedTuple):
    """What came of a replay: the answer, the exit code, and where the answer first differs."""

    answer: bytes
    exit_code: int
    differs_at: int | None


def load(path: str) -> Recorded:
    """Read a record. Raises LocalError where it is none."""
    from sluice.proxy.names import (
        CallNameError,
        is_valid_service_name,
        parse_call_name,
        parse_target,
    )

    said, answered, complete = [], [], False
    try:
        with open(path, "rb") as stream:
            call, frames = recording.read(stream)
            for kind, _, payload in frames:
                if kind == 0:
                    said.append(payload)
                elif kind == 1:
                    answered.append(payload)
                complete = complete or kind == recording.END
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from None
    service, argument = call.get("service"), call.get("argument")
    if not isinstance(service, str) or not is_valid_service_name(service):
        raise LocalError(f"{path}: names no service")
    if argument is not None and not isinstance(argument, str):
        raise LocalError(f"{path}: is damaged")
    descriptor = service if argument is None else f"{service}+{argument}"
    try:
        # It is shown in a question and given to a program: only what a call may have.
        parse_call_name(f"-+@default+{descriptor}")
        target = parse_target(str(call.get("target")))
    except CallNameError as error:
        raise LocalError(f"{path}: {error}") from None
    return Recorded(target, descriptor, b"".join(said), b"".join(answered), complete)


def replay(recorded: Recorded, argv: Sequence[str], timeout: float) -> Outcome:
    """Say again what was said, to a program, and compare its answer.

    Raises LocalError where the program cannot be started or does not end in ``timeout`` seconds.
    """
    try:
        done = subprocess.run(
            argv, input=recorded.said, stdout=subprocess.PIPE, timeout=timeout, check=False
        )
    except OSError as error:
        raise LocalError(f"cannot start {argv[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise LocalError(f"the call has not ended after {timeout:g} s") from None
    return Outcome(done.stdout, done.returncode, _difference(done.stdout, recorded.answered))


def _difference(one: bytes, other: bytes) -> int | None:
    if one == other:
        return None
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
