"""Reading the configuration: TOML files, checked as a whole, errors with their place.

docs/spec/proxy.md 3. Large processes only; the program form uses what ``compiled.py`` keeps of it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from typing import Any

from sluice.errors import ConfigError
from sluice.proxy.loader import Filters
from sluice.proxy.model import ChainConfig, ChainTable, Configuration, ProxySettings
from sluice.proxy.names import is_valid_chain_name, is_valid_service_name, parse_target
from sluice.proxy.options import with_values
from sluice.proxy.paths import configuration_files
from sluice.proxy.places import Path, Places
from sluice.proxy.schema import FieldError, convert_table, suggest, use_filter
from sluice.proxy.settings import mistakes
from sluice.wire.names import is_valid_domain_name

_TABLES = ("proxy", "chains")
_MAX_FILE = 4 << 20


class _File:
    """One file: its tables, and where in it things stand."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            with open(path, "rb") as stream:
                raw = stream.read(_MAX_FILE + 1)
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", file=path) from None
        if len(raw) > _MAX_FILE:
            raise ConfigError(f"is larger than {_MAX_FILE} bytes", file=path)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise ConfigError("is not UTF-8", file=path, line=line) from None
        try:
            self.tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise _syntax_error(path, text, error) from None
        except RecursionError:
            raise ConfigError("is nested too deeply", file=path) from None
        self._places = Places(text)

    def error(
        self, path: Path, message: str, suggestion: str | None = None, key: Path | None = None
    ) -> ConfigError:
        """Return an error at the place of ``path``; ``key`` where another one is to be named."""
        return ConfigError(
            message,
            file=self.path,
            line=self._places.line(path),
            key=_show_key(key or path),
            suggestion=suggestion,
        )

    def line(self, path: Path) -> int | None:
        return self._places.line(path)


def _syntax_error(path: str, text: str, error: tomllib.TOMLDecodeError) -> ConfigError:
    message, _, place = str(error).partition(" (at ")
    line = None
    if place.startswith("line "):
        line = int(place[5:].split(",")[0])
    elif place.startswith("end of"):
        line = text.count("\n") + 1
    return ConfigError(f"no valid TOML: {message}", file=path, line=line)


def _show_key(path: Path) -> str:
    shown = ""
    for part in path:
        shown += f"[{part}]" if isinstance(part, int) else (f".{part}" if shown else str(part))
    return shown


def load(path: str | None = None) -> Configuration:
    """Read the whole configuration, from ``path`` or from the usual places.

    ``path`` is a TOML file, the earlier proxy's ``config.json``, or a directory with either.
    Raises ConfigError for the first mistake, with file, line, key and suggestion.
    """
    files = configuration_files(path)
    if len(files) == 1 and files[0].endswith(".json"):
        from sluice.proxy.legacy import load_legacy

        return load_legacy(files[0])
    read = [_File(file) for file in files]
    settings = _settings(read)
    filters = Filters(settings.filters)
    chains: dict[str, ChainConfig] = {}
    for file in read:
        for chain in _chains(file, filters, settings):
            if chain.name in chains:
                raise file.error(
                    ("chains", chain.name),
                    f"is defined already in {chains[chain.name].file}:{chains[chain.name].line}",
                )
            chains[chain.name] = chain
    return Configuration(settings, chains, files)


def _settings(files: list[_File]) -> ProxySettings:
    """Merge the tables ``[proxy]``: what comes later stands."""
    values: dict[str, Any] = {}
    for file in files:
        for name in file.tables:
            if name not in _TABLES:
                raise file.error((name,), "unknown table", suggest(name, _TABLES))
        table = file.tables.get("proxy", {})
        if not isinstance(table, dict):
            raise file.error(("proxy",), "must be a table", "[proxy]")
        try:
            given = convert_table(ProxySettings, table)
        except FieldError as error:
            raise file.error(
                ("proxy", error.field.split("[")[0]), error.message_only, error.hint
            ) from None
        for key, message, hint in mistakes(given):
            raise file.error(("proxy", *key), message, hint)
        values |= given
    made: ProxySettings = with_values(ProxySettings, values)
    return made


def _chains(file: _File, filters: Filters, settings: ProxySettings) -> Iterator[ChainConfig]:
    tables = file.tables.get("chains", {})
    if not isinstance(tables, dict):
        raise file.error(("chains",), "must be a table", "[chains.NAME]")
    for name, table in tables.items():
        path: Path = ("chains", name)
        if not is_valid_chain_name(name):
            raise file.error(path, "illegal name", "1 to 64 of A-Z a-z 0-9 _ . -")
        if not isinstance(table, dict):
            raise file.error(path, "must be a table", f"[chains.{name}]")
        yield _chain(file, name, table, filters, settings)


def _chain(
    file: _File, name: str, table: dict[str, Any], filters: Filters, settings: ProxySettings
) -> ChainConfig:
    path: Path = ("chains", name)
    try:
        values = convert_table(ChainTable, table)
    except FieldError as error:
        field = error.field.split("[")[0]
        raise file.error((*path, field), error.message_only, error.hint) from None
    _check_names(file, path, values)
    uses: list[Any] = []
    given = values.pop("filters")
    plugins = _plugins(file, path, given, filters, settings) if settings.legacy_plugins else {}
    for place, element in enumerate(given):
        if place in plugins:
            continue
        uses.append(_use(file, (*path, "filters", place), element, filters))
        twice = [use.name for use in uses].count(uses[-1].name)
        if twice > 1:
            uses[-1].name = f"{uses[-1].name}#{twice}"
    legacy = None
    if plugins:
        from sluice.proxy.legacy import legacy_parts

        numbers = iter(range(len(uses)))
        elements = [
            plugins[place][1] if place in plugins else {"use": next(numbers)}
            for place in range(len(given))
        ]
        ends = {kind: part for kind, part in plugins.values() if kind != "proxy"}
        elements = [part for part in elements if not any(part is end for end in ends.values())]
        legacy = legacy_parts(elements, settings.legacy_plugins, ends)
    at = file.line(path)
    return ChainConfig(name, uses, file=file.path, line=at, legacy=legacy, **values)


def _plugins(
    file: _File, path: Path, elements: list[Any], filters: Filters, settings: ProxySettings
) -> dict[int, tuple[str, dict[str, Any]]]:
    """Return what of a chain are plugins of the earlier proxy: place -> kind and description.

    A name that a filter has means the filter. Only a first one can be the source (src), only a last
    one the destination (dst).
    """
    from sluice.proxy.plugin_files import plugin_file

    found = {}
    for place, element in enumerate(elements):
        given = {"use": element} if isinstance(element, str) else element
        name = given.get("use") if isinstance(given, dict) else None
        if not isinstance(name, str) or name.replace("_", "-") in filters.names():
            continue
        options = {key: value for key, value in given.items() if key != "use"}
        kinds = ["src"] * (place == 0) + ["dst"] * (place == len(elements) - 1) + ["proxy"]
        for kind in kinds:
            try:
                at = plugin_file(name, settings.legacy_plugins, kind)
            except ConfigError as error:
                raise file.error((*path, "filters", place), str(error)) from None
            if at is not None:
                found[place] = (kind, {"plugin": name, "file": at, "config": options})
                break
    return found


def _check_names(file: _File, path: Path, values: dict[str, Any]) -> None:
    """See that the lists of who may use a chain hold names that can exist."""
    for key, valid in (("sources", is_valid_domain_name), ("targets", _is_target)):
        for place, name in enumerate(_listed(values.get(key))):
            if name == "any":
                raise file.error((*path, key, place), "'any' stands alone", f'{key} = "any"')
            if not valid(name):
                raise file.error((*path, key, place), f"'{name}' is no legal name")
    for place, name in enumerate(_listed(values.get("services"))):
        if name == "any":
            raise file.error((*path, "services", place), "'any' stands alone", 'services = "any"')
        if not is_valid_service_name(name.partition("+")[0]):
            raise file.error((*path, "services", place), f"'{name}' is no legal service name")


def _listed(value: list[str] | str | None) -> list[str]:
    return value if isinstance(value, list) else []


def _is_target(name: str) -> bool:
    try:
        return parse_target(name) == name
    except ValueError:
        return False
    except Exception as error:
        return not error


def _use(file: _File, path: Path, element: Any, filters: Filters) -> Any:
    """Return one place of a chain from ``"name"`` or ``{ use = "name", ... }``."""
    if isinstance(element, str):
        element = {"use": element}
    if not isinstance(element, dict) or not isinstance(element.get("use"), str):
        raise file.error(path, "must be a filter's name or a table", '{ use = "timeout", ... }')
    given = dict(element)
    name = given.pop("use")
    try:
        cls = filters.get(name)
    except ConfigError as error:
        if error.file is not None:
            raise
        raise file.error(path, error.message, None) from None
    try:
        return use_filter(cls, given)
    except FieldError as error:
        raise file.error(
            (*path, error.field.split("[")[0].split(".")[0]),
            f"filter '{cls.name}': {error.message_only}",
            error.hint,
            key=(*path, error.field),
        ) from None


def read_json(path: str) -> Any:
    """Return what a JSON file holds. Raises ConfigError with its line."""
    try:
        with open(path, "rb") as stream:
            raw = stream.read(_MAX_FILE + 1)
        return json.loads(raw)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=path) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"no valid JSON: {error.msg}", file=path, line=error.lineno) from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"no valid JSON: {type(error).__name__}", file=path) from None
