"""Configuration of a single service: the little ``key = value`` files beside the services.

Theory. The syntax is a small subset of TOML, and what it leaves out is an error on purpose: a
file that two programs could read differently must not decide who runs what. The value is checked
before the key, so that a bad value is an error even behind a key that nobody knows.
docs/spec/wire-protocol.md 9.4.
"""

from __future__ import annotations

import os

from sluice.errors import ConfigError
from sluice.service.command import Command, ServiceError
from sluice.service.lookup import search, split_path
from sluice.wire.names import escape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Value = bool | int | bytes
    Warn = Callable[[str], None]

DEFAULT_CONFIG_PATH = "/run/qubes/rpc-config:/usr/local/etc/qubes/rpc-config:/etc/qubes/rpc-config"
CONFIG_PATH_VARIABLE = "QUBES_RPC_CONFIG_PATH"
MAX_FILE = 1 << 20

_BLANKS = b" \t"
_LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DIGITS = b"0123456789"
_KEY_BYTES = _LETTERS + _DIGITS + b".-_"


class ServiceConfiguration:
    """The settings of one service, at their defaults until told otherwise (9.4)."""

    __slots__ = (
        "exit_on_client_eof",
        "exit_on_service_eof",
        "file",
        "force_user",
        "skip_service_descriptor",
        "wait_for_session",
    )

    def __init__(self) -> None:
        """Begin with the defaults; ``force_user`` is None where it is not set."""
        self.wait_for_session = False
        self.force_user: bytes | None = None
        self.skip_service_descriptor = False
        self.exit_on_client_eof = False
        self.exit_on_service_eof = False
        self.file: str | None = None

    def socket_only(self) -> list[str]:
        """Name the settings in force that mean something for socket and TCP services only."""
        return [key for key in SOCKET_KEYS if getattr(self, key.replace("-", "_"))]


SOCKET_KEYS = ("skip-service-descriptor", "exit-on-client-eof", "exit-on-service-eof")
KNOWN_KEYS = ("wait-for-session", "force-user", *SOCKET_KEYS)


def parse_configuration(data: bytes, file: str, warn: Warn | None = None) -> ServiceConfiguration:
    """Read the text of a configuration file; ``file`` is for messages.

    Unknown keys with a valid value are reported to ``warn`` as ``file:line: text``. Raises
    ConfigError with file, line and key for everything else that is wrong.
    """
    configuration = ServiceConfiguration()
    configuration.file = file
    seen: dict[str, int] = {}
    lines = data.split(b"\n")
    for number, raw in enumerate(lines, 1):
        line = raw[:-1] if raw.endswith(b"\r") else raw
        if b"\0" in line:
            raise ConfigError("a NUL byte", file=file, line=number)
        if not line or line.startswith(b"#"):
            continue
        key, value = _parse_line(line, file, number)
        if key not in KNOWN_KEYS:
            if warn is not None:
                warn(f"{file}:{number}: unknown setting {key} is ignored")
            continue
        if key in seen:
            raise ConfigError(f"already set in line {seen[key]}", file=file, line=number, key=key)
        seen[key] = number
        _store(configuration, key, value, file, number)
    conflicts = configuration.socket_only()
    if configuration.force_user is not None and conflicts:
        raise ConfigError(
            f"cannot be used together with {conflicts[0]}",
            file=file,
            line=seen["force-user"],
            key="force-user",
            suggestion="force-user is for programs, the other setting for sockets",
        )
    return configuration


def _parse_line(line: bytes, file: str, number: int) -> tuple[str, Value]:
    """Split one setting into key and value."""

    def bad(message: str, key: str | None = None, suggestion: str | None = None) -> ConfigError:
        return ConfigError(message, file=file, line=number, key=key, suggestion=suggestion)

    if line[:1] in (b" ", b"\t"):
        raise bad("the line begins with a blank", None, "empty lines must be really empty")
    if line[:1] == b"[":
        raise bad("sections are not supported", None, "write the settings without a header")
    size = 0
    while size < len(line) and line[size] in _KEY_BYTES:
        size += 1
    if not size or line[0] not in _LETTERS:
        raise bad(f"no setting can begin with '{escape(line[:1])}'")
    key = line[:size].decode("ascii")
    rest = line[size:].lstrip(_BLANKS)
    if rest[:1] != b"=":
        raise bad("no = behind the name of the setting", key)
    text = rest[1:].strip(_BLANKS)
    if text[:1] == b"'":
        end = text.find(b"'", 1)
        if end < 0:
            raise bad("the string has no closing quote", key)
        value: Value = text[1:end]
        tail = text[end + 1 :]
    else:
        end = 0
        while end < len(text) and text[end] not in b" \t#":
            end += 1
        word, tail = text[:end], text[end:]
        parsed = _parse_word(word)
        if parsed is None:
            hint = "strings are written in single quotes" if word else None
            raise bad(f"bad value '{escape(word)}'" if word else "no value", key, hint)
        value = parsed
    tail = tail.lstrip(_BLANKS)
    if tail and tail[:1] != b"#":
        raise bad(f"unexpected text behind the value: {escape(tail)}", key)
    return key, value


def _parse_word(word: bytes) -> bool | int | None:
    """Read ``true``, ``false`` or a decimal integer of at most 64 bits; None for others."""
    if word == b"true":
        return True
    if word == b"false":
        return False
    if not word or len(word) > 19 or word.strip(_DIGITS):
        return None
    if word[:1] == b"0" and len(word) > 1:
        return None
    number = int(word)
    return number if number < 1 << 63 else None


def _store(
    configuration: ServiceConfiguration, key: str, value: Value, file: str, number: int
) -> None:
    """Check the type of a known setting and keep it."""
    if key == "force-user":
        if not isinstance(value, bytes):
            raise ConfigError("must be a string in single quotes", file=file, line=number, key=key)
        configuration.force_user = value
        return
    if key == "wait-for-session" and not isinstance(value, bytes) and value in (0, 1):
        value = bool(value)
    if not isinstance(value, bool):
        raise ConfigError("must be true or false", file=file, line=number, key=key)
    setattr(configuration, key.replace("-", "_"), value)


def load_configuration(
    command: Command, path: str | None = None, warn: Warn | None = None
) -> ServiceConfiguration:
    """Find and read the configuration of a service call (9.4); defaults where there is none.

    ``path`` replaces the search list of QUBES_RPC_CONFIG_PATH or the default. Raises
    ServiceError with code 125 for every error, its text naming file and line.
    """
    if path is None:
        path = os.environ.get(CONFIG_PATH_VARIABLE, DEFAULT_CONFIG_PATH)
    found = search((command.lookup, command.service), split_path(path), tcp=False)
    if found is None:
        return ServiceConfiguration()
    file = os.fsdecode(found[0])
    shown = escape(file)
    try:
        data = read_file(found[0])
        return parse_configuration(data, shown, warn)
    except OSError as error:
        raise ServiceError(f"{shown}: {error.strerror}") from error
    except ConfigError as error:
        raise ServiceError(str(error)) from error


def read_file(path: bytes | str) -> bytes:
    """Read a configuration file whole; one over a MiB is refused with OSError (EFBIG)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        chunks = []
        size = 0
        while chunk := os.read(descriptor, 65536):
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_FILE:
                raise OSError(27, os.strerror(27))
    finally:
        os.close(descriptor)
    return b"".join(chunks)
