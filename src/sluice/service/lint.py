"""Finding mistakes in services and their settings before a call does.

Theory. What the agent would refuse is an *error*; what it would do although nobody can have meant
it is a *warning*. Both are found by the very code that serves calls, so that the two cannot differ.
docs/spec/wire-protocol.md 9.2 to 9.4.
"""

from __future__ import annotations

import os
import pwd
import stat

from sluice.errors import ConfigError
from sluice.service.address import tcp_address
from sluice.service.command import ServiceError, parse_command
from sluice.service.configuration import (
    ServiceConfiguration,
    parse_configuration,
    read_file,
)
from sluice.service.executable import check_program
from sluice.service.lookup import EXECUTABLE, Found, find_service, split_path
from sluice.wire.messages import EXIT_NOT_FOUND, NAME_MAX
from sluice.wire.names import SERVICE_CHARACTERS, escape

ERROR = "error"
WARNING = "warning"


class Finding:
    """One remark: ``severity`` (error or warning) and a text that begins with the file."""

    __slots__ = ("severity", "text")

    def __init__(self, severity: str, text: str) -> None:
        """Keep both."""
        self.severity = severity
        self.text = text


def lint_services(service_path: str, config_path: str) -> list[Finding]:
    """Look at every service and every settings file of the two search lists."""
    findings: list[Finding] = []
    for directory in split_path(service_path):
        for name in _entries(directory, findings):
            findings += _lint_service(directory, name)
    for directory in split_path(config_path):
        for name in _entries(directory, findings):
            findings += lint_settings(directory + b"/" + name, service_path)
    return findings


def _entries(directory: bytes, findings: list[Finding]) -> list[bytes]:
    """List a directory; one that does not exist is empty."""
    try:
        return sorted(os.listdir(directory or b"/"))
    except FileNotFoundError:
        return []
    except OSError as error:
        findings.append(Finding(ERROR, f"{escape(directory)}: {error.strerror}"))
        return []


def _lint_service(directory: bytes, name: bytes) -> list[Finding]:
    """Look at one entry of a service directory."""
    path = directory + b"/" + name
    shown = escape(path)
    if name.endswith(b"~") or name.startswith(b".") or b".dpkg-" in name or b".rpm" in name:
        return [Finding(WARNING, f"{shown}: looks like a left-over; no call can mean it")]
    findings = []
    if name.translate(None, SERVICE_CHARACTERS) or name.startswith(b"+"):
        findings.append(
            Finding(ERROR, f"{shown}: no call can have this name (letters, digits, _-.+ only)")
        )
    if len(name) > NAME_MAX:
        findings.append(Finding(ERROR, f"{shown}: the name is too long"))
    if findings:
        return findings
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            target = os.readlink(path)
            if target == b"/dev/tcp" or target.startswith(b"/dev/tcp/"):
                return _lint_tcp(shown, name, target)
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return [Finding(WARNING, f"{shown}: leads nowhere (yet); calls pass it over")]
    except OSError as error:
        return [Finding(ERROR, f"{shown}: {error.strerror}")]
    return _lint_kind(path, shown, mode)


def _lint_tcp(shown: str, name: bytes, target: bytes) -> list[Finding]:
    """Check a link to /dev/tcp, with an argument where it needs one."""
    rest = target[len(b"/dev/tcp") :]
    # What the argument of a real call will be is not known, unless the name says it.
    argument: bytes | None = name.partition(b"+")[2] or None
    if argument is None and rest.count(b"/") < 2:
        argument = b"127.0.0.1+80" if not rest else b"80"
    if rest == b"/":
        return [Finding(ERROR, f"{shown}: a link to /dev/tcp/ names no address")]
    try:
        host, _ = tcp_address(target, argument)
    except ServiceError as error:
        return [Finding(ERROR, f"{shown}: {error}")]
    if host.strip(b"0123456789.") and b":" not in host:
        return [Finding(ERROR, f"{shown}: {escape(host)} is no numeric address")]
    return []


def _lint_kind(path: bytes, shown: str, mode: int) -> list[Finding]:
    """Check that something can be executed or connected to."""
    if stat.S_ISSOCK(mode):
        return []
    if stat.S_ISDIR(mode):
        return [Finding(ERROR, f"{shown}: is a directory")]
    if not stat.S_ISREG(mode) or not mode & 0o111:
        return [Finding(ERROR, f"{shown}: is not executable (chmod 755), nor a socket")]
    findings = []
    if mode & 0o002:
        findings.append(Finding(WARNING, f"{shown}: everybody may write it"))
    try:
        check_program(path)
    except ServiceError as error:
        findings.append(Finding(ERROR, str(error)))
    return findings


def lint_settings(path: bytes, service_path: str) -> list[Finding]:
    """Check one settings file, also against the service that it is for."""
    warnings: list[str] = []
    shown = escape(path)
    try:
        settings = parse_configuration(read_file(path), shown, warnings.append)
    except ConfigError as error:
        return [Finding(ERROR, str(error))]
    except FileNotFoundError:
        return [Finding(WARNING, f"{shown}: leads nowhere; calls pass it over")]
    except OSError as error:
        return [Finding(ERROR, f"{shown}: {error.strerror}")]
    findings = [Finding(WARNING, text) for text in warnings]
    if settings.force_user is not None:
        try:
            pwd.getpwnam(os.fsdecode(settings.force_user))
        except (KeyError, ValueError):
            name = escape(settings.force_user)
            findings.append(Finding(WARNING, f"{shown}: force-user: there is no user {name!r}"))
    return findings + _lint_match(os.path.basename(path), shown, settings, service_path)


def _lint_match(
    name: bytes, shown: str, settings: ServiceConfiguration, service_path: str
) -> list[Finding]:
    """Check that there is such a service, and that it is of the kind that the settings are for."""
    found: Found | None = None
    try:
        found = find_service(parse_command(b"QUBESRPC %s x" % name, with_user=False), service_path)
    except ServiceError as error:
        if error.code == EXIT_NOT_FOUND:
            return [Finding(WARNING, f"{shown}: there is no service {escape(name)}")]
    ignored = settings.socket_only()
    if ignored and found is not None and found.kind == EXECUTABLE:
        text = f"{shown}: {', '.join(ignored)} ignored: {escape(found.path)} is a program"
        return [Finding(WARNING, text)]
    if settings.force_user is not None and found is not None and found.kind != EXECUTABLE:
        text = f"{shown}: force-user ignored: {escape(found.path)} is a socket"
        return [Finding(WARNING, text)]
    return []
