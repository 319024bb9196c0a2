"""Command-line options with the conventions of GNU getopt, without the cost of a library.

Long options may be abbreviated as long as that is unambiguous and take their value behind ``=`` or
as the next word; short ones may be clustered and carry their value without a blank; ``--`` ends
them. Either options may follow positional arguments (the usual way) or parsing stops at the first
of those (qrexec-client-vm). docs/spec/wire-protocol.md 6.1, 7.1, 11.1.

Beside them, what else programs at a terminal have in common: how they end.
"""

from __future__ import annotations

import os

from sluice.wire.messages import EXIT_FAILURE, EXIT_LOCAL_FAILURE, EXIT_NOT_FOUND

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sluice.flow.channel import DataChannel


class UsageError(Exception):
    """Options that make no sense; the text is for the person who typed them."""


class Exit(Exception):
    """Ends the program with a status, after a message on stderr (maybe empty)."""

    def __init__(self, status: int, message: str = "") -> None:
        """Take both."""
        super().__init__(message)
        self.status = status


def has_standard_descriptors(program: str, first: int = 0) -> bool:
    """Tell whether 0, 1 and 2 are open; without one of them files would be taken for streams.

    Says so in the name of ``program`` where stderr can take it. ``first`` is the first looked at.
    """
    for fd in range(first, 3):
        try:
            os.fstat(fd)
        except OSError:
            write_error(f"{program}: descriptor 0, 1 or 2 is closed\n")
            return False
    return True


def write_error(text: str) -> None:
    """Write to stderr; that it cannot be written is no reason to fail otherwise."""
    try:  # noqa: SIM105
        os.write(2, text.encode("utf-8", "surrogateescape"))
    except OSError:
        pass


def explain_silence(channel: DataChannel, service: bytes, target: str) -> str:
    """Say what a caller knows of a call that failed without a word; empty for others.

    A service may end with 125 or 127 by its own will: one that wrote anything has begun.
    """
    code = channel.state.remote_status
    if not channel.lost and (code not in (EXIT_FAILURE, EXIT_NOT_FOUND) or channel.spoken):
        return ""
    # A module that no call in order needs.
    from sluice.wire.names import escape

    name = escape(service)
    if channel.lost:
        return f"the connection was lost before the exit status of {name} came"
    if code == EXIT_NOT_FOUND:
        proxied = service.startswith(b"qrexec-proxy+")
        behind = ", or what the proxy called has not" if proxied else ""
        return f"status {code}: {target} has no service {name}{behind}"
    return f"status {code}: {target} could not start {name}; its log says why"


def die_of_interrupt() -> None:
    """Let SIGINT end us as it ends any other program, instead of with a traceback of Python's.

    Where it is ignored (a background job of a shell) it stays so.
    """
    import _signal  # type: ignore[import-not-found]  # it has no stub

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def die_of_broken_pipe() -> None:
    """End as every program does whose output nobody takes: by SIGPIPE, which Python ignores."""
    import _signal

    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
    os.kill(os.getpid(), _signal.SIGPIPE)


def parse_number(text: str, complaint: str) -> int:
    """Read a number as C does: decimal, 0x hexadecimal, 0 octal; at most 2^31-1 (11.1, 12.1).

    Raises Exit with the complaint where it is none.
    """
    digits = text.lower()
    base = 16 if digits.startswith("0x") else 8 if digits.startswith("0") else 10
    digits = digits.removeprefix("0x")
    # Neither blanks nor signs nor the other prefixes and underscores that Python knows.
    valid = 0 < len(digits) < 1000 and not digits.strip("0123456789abcdef"[:base])
    number = int(digits, base) if valid else -1
    if not 0 <= number < 1 << 31:
        raise Exit(EXIT_LOCAL_FAILURE, complaint)
    return number


def parse_options(
    arguments: Sequence[str],
    short: Mapping[str, tuple[str, bool]],
    long: Mapping[str, tuple[str, bool]],
    *,
    stop_early: bool = False,
) -> tuple[list[tuple[str, str]], list[str]]:
    """Split arguments (without the program's name) into options and positionals.

    ``short`` maps a letter and ``long`` a name to (key, whether it takes a value). Returns the
    options in order as (key, value or empty) and the positional arguments. With ``stop_early``
    everything behind the first positional is positional. Raises UsageError.
    """
    options: list[tuple[str, str]] = []
    positionals: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return options, positionals + rest
        if word.startswith("--"):
            options.append(_long(word[2:], long, rest))
        elif word.startswith("-") and word != "-":
            _short(word[1:], short, rest, options)
        elif stop_early:
            return options, [word, *rest]
        else:
            positionals.append(word)
    return options, positionals


def _long(word: str, long: Mapping[str, tuple[str, bool]], rest: list[str]) -> tuple[str, str]:
    """Read one long option; takes its value from ``rest`` where it has none of its own."""
    name, equals, value = word.partition("=")
    meanings = {long[name]} if name in long else set()
    if not meanings:
        meanings = {long[full] for full in long if name and full.startswith(name)}
    if not meanings:
        raise UsageError(f"unrecognized option '--{name}'")
    if len(meanings) > 1:
        raise UsageError(f"option '--{name}' is ambiguous")
    key, takes_value = meanings.pop()
    if takes_value and not equals:
        if not rest:
            raise UsageError(f"option '--{name}' requires an argument")
        value = rest.pop(0)
    elif equals and not takes_value:
        raise UsageError(f"option '--{name}' doesn't allow an argument")
    return key, value


def _short(
    cluster: str,
    short: Mapping[str, tuple[str, bool]],
    rest: list[str],
    options: list[tuple[str, str]],
) -> None:
    """Read a cluster of short options, the last of which may take a value."""
    while cluster:
        letter, cluster = cluster[0], cluster[1:]
        if letter not in short:
            raise UsageError(f"invalid option -- '{letter}'")
        key, takes_value = short[letter]
        if not takes_value:
            options.append((key, ""))
            continue
        if not cluster and not rest:
            raise UsageError(f"option requires an argument -- '{letter}'")
        options.append((key, cluster or rest.pop(0)))
        return
