"""The file that describes a system: ``system.toml``.

One table ``[system]`` with defaults, and one ``[domains.NAME]`` a domain. Every key is checked; an
unknown or wrong one is an error with file, line, key and a suggestion, and nothing is started.
The directory of the file is the system's configuration directory: policy, the AdminVM's services
and additions to templates lie beside it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from sluice.domains.model import CLASSES, DOM0, HOST_TEMPLATE, LABELS, DomainConfig, name_error
from sluice.domains.registry import Registry
from sluice.domains.sandbox.limits import MAX_PIDS
from sluice.domains.sandbox.process import own_user
from sluice.domains.store import Store
from sluice.domains.toml_file import read
from sluice.errors import ConfigError
from sluice.wire.names import is_valid_domain_name

KINDS = ("bubblewrap", "process")
MAX_FILE = 1 << 20  # bytes of a file laid in a domain
PIDS_FEATURE = "sandbox.pids-max"
SANDBOX_FEATURES = (PIDS_FEATURE, "sandbox.allow-userns")
_TAG = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")
_FEATURE = re.compile(r"[A-Za-z0-9_.-]{1,256}\Z")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}\Z")
# Where a domain may have files laid: what persists and belongs to it.
_PLACES = ("/rw/", "/home/user/", "/usr/local/", "/run/qubes-rpc/", "/run/qubes/rpc-config/")


@dataclass(frozen=True)
class SystemDefaults:
    """The table ``[system]``."""

    kind: str = "bubblewrap"
    default_template: str = HOST_TEMPLATE
    default_dispvm: str | None = None
    uid_base: int | None = None
    ids: str = "auto"


@dataclass(frozen=True)
class SystemFile:
    """What a file says: the defaults, and each domain's settings without its identity."""

    path: Path
    defaults: SystemDefaults
    domains: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def registry(self, store: Store) -> Registry:
        """Join the settings with the identities that ``store`` keeps, making those missing."""
        made = []
        for name, settings in self.domains.items():
            if name == DOM0.name:
                continue
            identity = store.identity(name)
            made.append(
                DomainConfig(name=name, qid=identity.qid, uuid=identity.uuid, **dict(settings))
            )
        return Registry(made)


class _Reader:
    """Checks one parsed file; knows where in it a key stands."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.lines = text.splitlines()

    def fail(self, key: str, message: str, suggestion: str | None = None) -> NoReturn:
        raise ConfigError(
            message, file=str(self.path), line=self.line(key), key=key, suggestion=suggestion
        )

    def line(self, key: str) -> int | None:
        """Find the line of ``system.kind`` or ``domains.work.label``; tomllib does not tell."""
        here = ""
        header_line = None
        for number, line in enumerate(self.lines, 1):
            text = line.strip()
            header = re.match(r"\[\s*([^\]]+?)\s*\]", text)
            if header:
                here = header.group(1).replace('"', "").replace("'", "")
                if here == key or (key + ".").startswith(here + ".") or here.startswith(key + "."):
                    header_line = number if header_line is None or here == key else header_line
            elif key.startswith(here + "."):
                # The rest may hold dots itself: a path, the name of a feature.
                last = re.escape(key[len(here) + 1 :])
                if re.match(rf"[\"']?{last}[\"']?\s*=", text):
                    return number
                if header_line is None or self.lines[header_line - 1].count(".") < here.count("."):
                    header_line = number - 1
        return header_line

    def unknown(self, key: str, name: str, known: list[str]) -> NoReturn:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(sorted(known))
        self.fail(key, "is not a setting", hint)

    def one_of(self, *choices: str) -> Callable[[str, Any], str]:
        def check(key: str, value: Any) -> str:
            if value not in choices:
                close = difflib.get_close_matches(str(value), choices, 1)
                hint = f"did you mean {close[0]!r}?" if close else "one of " + ", ".join(choices)
                self.fail(key, f"{value!r} is not possible", hint)
            return str(value)

        return check

    def number(self, low: int, high: int) -> Callable[[str, Any], int]:
        def check(key: str, value: Any) -> int:
            if type(value) is not int or not low <= value <= high:
                self.fail(key, f"must be a whole number from {low} to {high}")
            return int(value)

        return check

    def truth(self, key: str, value: Any) -> bool:
        if not isinstance(value, bool):
            self.fail(key, "must be true or false")
        return bool(value)

    def domain(self, key: str, value: Any) -> str | None:
        if value in ("", None):
            return None
        if not isinstance(value, str) or not is_valid_domain_name(value):
            self.fail(key, "must be the name of a domain")
        return value

    def word(self, pattern: re.Pattern[str], what: str) -> Callable[[str, Any], str]:
        def check(key: str, value: Any) -> str:
            if not isinstance(value, str) or not pattern.match(value):
                self.fail(key, f"{value!r} is not {what}")
            return value

        return check

    def tags(self, key: str, value: Any) -> frozenset[str]:
        if not isinstance(value, list):
            self.fail(key, "must be a list of words")
        check = self.word(_TAG, "a tag (letters, digits, '_.-')")
        return frozenset(check(key, item) for item in value)

    def features(self, key: str, value: Any) -> Mapping[str, str]:
        if not isinstance(value, dict):
            self.fail(key, "must be a table of names and values")
        check = self.word(_FEATURE, "a feature's name (letters, digits, '_.-')")
        made: dict[str, str] = {}
        for name, item in value.items():
            if isinstance(item, bool):
                item = "1" if item else ""
            if not isinstance(item, str | int) or len(str(item)) > 4096 or "\0" in str(item):
                self.fail(f"{key}.{name}", "must be text, a number, true or false")
            if name.startswith("sandbox."):
                self._of_sandbox(f"{key}.{name}", name, str(item))
            made[check(f"{key}.{name}", name)] = str(item)
        return MappingProxyType(made)

    def _of_sandbox(self, key: str, name: str, value: str) -> None:
        """These are ours: a limit that is misspelt must not simply not hold."""
        if name not in SANDBOX_FEATURES:
            self.unknown(key, name, list(SANDBOX_FEATURES))
        if name == PIDS_FEATURE and not (
            value.isascii() and value.isdigit() and 0 < int(value) <= MAX_PIDS
        ):
            self.fail(key, f"must be a whole number from 1 to {MAX_PIDS}")

    def files(self, key: str, value: Any) -> Mapping[str, tuple[int, str]]:
        if not isinstance(value, dict):
            self.fail(key, "must be a table of places inside and files outside")
        made: dict[str, tuple[int, str]] = {}
        for place, source in value.items():
            name = f"{key}.{place}"
            if not place.startswith(_PLACES) or os.path.normpath(place) != place:
                self.fail(name, "is no place for a file", "below " + ", ".join(_PLACES))
            if not isinstance(source, str):
                self.fail(name, "must be the path of a file")
            path = self.path.parent / source
            try:
                found = os.stat(path)
            except OSError as error:
                self.fail(name, f"{path}: {error.strerror}")
            if not os.path.isfile(path) or found.st_size > MAX_FILE:
                self.fail(name, f"{path}: must be a file of at most {MAX_FILE} bytes")
            made[place] = (0o755 if found.st_mode & 0o111 else 0o644, str(path))
        return MappingProxyType(made)


def _domain_checks(reader: _Reader) -> dict[str, tuple[str, Callable[[str, Any], Any]]]:
    """Return key in the file -> (field of DomainConfig, check)."""
    seconds = reader.number(1, 86400)
    return {
        "class": ("klass", reader.one_of(*[c for c in CLASSES if c != "AdminVM"])),
        "kind": ("kind", reader.one_of(*KINDS)),
        "label": ("label", reader.one_of(*LABELS)),
        "template": ("template", reader.domain),
        "tags": ("tags", reader.tags),
        "features": ("features", reader.features),
        "default_user": ("default_user", reader.word(_USER, "a user name")),
        "autostart": ("autostart", reader.truth),
        "qrexec_timeout": ("qrexec_timeout", seconds),
        "shutdown_timeout": ("shutdown_timeout", seconds),
        "memory": ("memory", reader.number(16, 1 << 20)),
        "maxmem": ("maxmem", reader.number(0, 1 << 20)),
        "vcpus": ("vcpus", reader.number(1, 1024)),
        "template_for_dispvms": ("template_for_dispvms", reader.truth),
        "default_dispvm": ("default_dispvm", reader.domain),
        "guivm": ("guivm", reader.domain),
        "netvm": ("netvm", reader.domain),
        "provides_network": ("provides_network", reader.truth),
        "relayvm": ("relayvm", reader.domain),
        "transport_rpc": ("transport_rpc", reader.word(_TAG, "a service name")),
        "remote_name": ("remote_name", reader.word(_TAG, "a name")),
        "debug": ("debug", reader.truth),
        "files": ("files", reader.files),
    }


def _system(reader: _Reader, table: Any) -> SystemDefaults:
    checks: dict[str, Callable[[str, Any], Any]] = {
        "kind": reader.one_of(*KINDS),
        "default_template": reader.domain,
        "default_dispvm": reader.domain,
        "uid_base": reader.number(65536, 0xFFFF0000 - 65536),
        "ids": reader.one_of("auto", "single"),
    }
    if not isinstance(table, dict):
        reader.fail("system", "must be a table")
    values = {}
    for name, value in table.items():
        if name not in checks:
            reader.unknown(f"system.{name}", name, list(checks))
        values[name] = checks[name](f"system.{name}", value)
    return SystemDefaults(**values)


def _domain(reader: _Reader, name: str, table: Any, defaults: SystemDefaults) -> dict[str, Any]:
    key = f"domains.{name}"
    error = name_error(name)
    if error:
        reader.fail(key, error)
    if name == DOM0.name:
        reader.fail(key, "dom0 always exists and has no settings here")
    if not isinstance(table, dict):
        reader.fail(key, "must be a table")
    checks = _domain_checks(reader)
    settings: dict[str, Any] = {}
    for word, value in table.items():
        if word not in checks:
            reader.unknown(f"{key}.{word}", word, list(checks))
        field_name, check = checks[word]
        settings[field_name] = check(f"{key}.{word}", value)
    settings.setdefault("kind", defaults.kind)
    if settings.get("klass", "AppVM") in ("AppVM", "DispVM"):
        settings.setdefault("template", defaults.default_template)
    settings.setdefault("default_dispvm", defaults.default_dispvm)
    # What is in the file is meant to run, unless it says otherwise; templates and disposables wait.
    ordinary = settings.get("klass", "AppVM") in ("AppVM", "StandaloneVM")
    settings.setdefault("autostart", ordinary and not settings.get("template_for_dispvms", False))
    if settings["kind"] == "process":
        settings.setdefault("default_user", own_user())
    return settings


def _check_references(
    reader: _Reader, defaults: SystemDefaults, domains: Mapping[str, Mapping[str, Any]]
) -> None:
    names = {DOM0.name, *domains}
    if defaults.default_dispvm is not None and defaults.default_dispvm not in names:
        reader.fail("system.default_dispvm", f"there is no domain {defaults.default_dispvm!r}")
    for name, settings in domains.items():
        for reference in ("default_dispvm", "netvm", "relayvm"):
            other = settings.get(reference)
            if other is not None and other not in names:
                reader.fail(f"domains.{name}.{reference}", f"there is no domain {other!r}")
        template = settings.get("template")
        if template not in (None, HOST_TEMPLATE) and template not in names:
            reader.fail(f"domains.{name}.template", f"there is no domain {template!r}")
        if settings.get("klass") == "DispVM" and not domains.get(template or "", {}).get(
            "template_for_dispvms"
        ):
            reader.fail(
                f"domains.{name}.template",
                f"template for disposable ({template}) needs to have template_for_dispvms=True",
            )


def load(path: Path | str) -> SystemFile:
    """Read and check a system file. Raises ConfigError with the place of what is wrong."""
    path = Path(os.path.abspath(path))
    text, data = read(path)
    reader = _Reader(path, text)
    for name in data:
        if name not in ("system", "domains"):
            reader.unknown(name, name, ["system", "domains"])
    defaults = _system(reader, data.get("system", {}))
    tables = data.get("domains", {})
    if not isinstance(tables, dict):
        reader.fail("domains", "must be a table of domains")
    domains = {name: _domain(reader, name, table, defaults) for name, table in tables.items()}
    _check_references(reader, defaults, domains)
    for settings in domains.values():
        if settings.get("klass") == "DispVM":
            # A disposable begins with the files of what it was made from.
            template = domains[settings["template"]]
            files = {**template.get("files", {}), **settings.get("files", {})}
            settings["files"] = MappingProxyType(files)
    return SystemFile(path, defaults, MappingProxyType(domains))
