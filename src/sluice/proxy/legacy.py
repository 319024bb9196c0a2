"""The earlier proxy's ``config.json`` (docs/spec/proxy.md 3).

A dict of chain name to ``{"plugins": [...], "config": {...}}``. Names and options with ``_`` are
aliases of ours. Where a chain names a plugin that is no filter of ours, it must be found in the
``plugins`` directory beside the file or in ``legacy_plugins``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from sluice.errors import ConfigError
from sluice.proxy.configuration import read_json
from sluice.proxy.loader import Filters
from sluice.proxy.model import ChainConfig, Configuration, ProxySettings
from sluice.proxy.names import is_valid_chain_name
from sluice.proxy.plugin_files import plugin_file
from sluice.proxy.schema import FieldError, did_you_mean, show_value, use_filter
from sluice.proxy.stage import FilterUse

# The ordinary ends of a call, in the words of the earlier proxy.
DEFAULT_END = "default"
# Its own plugins, which are filters of ours (section 5.1): ours also where its files lie about.
EARLIER = (
    "pass", "byte_limit", "stop_src", "stop_dst", "timeout", "count", "sniff", "streamline",
)  # fmt: skip


def load_legacy(path: str, settings: ProxySettings | None = None) -> Configuration:
    """Read ``config.json``. Raises ConfigError where it cannot be what was meant."""
    settings = settings or ProxySettings()
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ConfigError("must be an object of chains", file=path)
    filters = Filters(settings.filters)
    chains = {}
    for name, entry in raw.items():
        # "description" and the like: the earlier program ignored them as well.
        if isinstance(entry, dict):
            chains[name] = _chain(path, name, entry, filters, settings)
    return Configuration(settings, chains, [path])


def _chain(
    path: str, name: str, entry: dict[str, Any], filters: Filters, settings: ProxySettings
) -> ChainConfig:
    def wrong(key: str, message: str, hint: str | None = None) -> ConfigError:
        return ConfigError(message, file=path, key=f"{name}.{key}", suggestion=hint)

    if not is_valid_chain_name(name):
        raise ConfigError("illegal name of a chain", file=path, key=name)
    plugins, config = _parts(entry, wrong)
    directories = plugin_directories(path, settings)
    ends, middle = split_ends(plugins, directories)
    uses: list[FilterUse] = []
    elements: list[dict[str, Any]] = []
    for place, plugin in enumerate(middle):
        given = options_of(config, place, plugin)
        if not isinstance(given, dict):
            raise wrong(f"config.{plugin}", "must be an object")
        file = None if plugin in EARLIER else plugin_file(plugin, directories, "proxy")
        if file is not None:
            elements.append({"plugin": plugin, "file": file, "config": given})
            continue
        try:
            use = use_filter(filters.get(plugin), _translated(plugin, given))
        except FieldError as error:
            raise wrong(f"config.{plugin}.{error.field}", error.message_only, error.hint) from None
        except ConfigError as error:
            raise wrong("plugins", error.message) from None
        elements.append({"use": len(uses)})
        uses.append(use)
    own_ends = {
        kind: {"plugin": end, "file": file, "config": config.get(f"{kind}_plugin", {})}
        for kind, (end, file) in ends.items()
        if file is not None
    }
    legacy = None
    if own_ends or any("plugin" in element for element in elements):
        legacy = legacy_parts(elements, directories, own_ends)
    return ChainConfig(
        name,
        uses,
        description=str(entry.get("description", "")),
        require_exit_code=False,
        file=path,
        imported=True,
        legacy=legacy,
    )


def _parts(
    entry: dict[str, Any], wrong: Callable[..., ConfigError]
) -> tuple[list[str], dict[str, Any]]:
    """Return the names of plugins and the options of a chain, seen to be such."""
    plugins, config = entry.get("plugins", []), entry.get("config", {})
    if not isinstance(plugins, list) or not all(isinstance(p, str) for p in plugins):
        raise wrong("plugins", "must be a list of names")
    if not isinstance(config, dict):
        raise wrong("config", "must be an object")
    for key, hint in misspelt(entry, ("plugins", "config", "description")):
        raise wrong(key, "unknown key", hint)
    for key, hint in misspelt(config, (*plugins, "src_plugin", "dst_plugin")):
        raise wrong(f"config.{key}", "unknown key", hint)
    return plugins, config


def legacy_parts(
    elements: list[dict[str, Any]], directories: list[str], ends: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return what ``ChainConfig.legacy`` keeps of a chain with plugins.

    ``elements`` are in order, each a plugin (plugin, file, config) or the place of a filter among
    the chain's uses (use); ``ends`` has the plugins that are source (src) and destination (dst).
    """
    return {
        "elements": elements,
        "directories": directories,
        "src": ends.get("src"),
        "dst": ends.get("dst"),
    }


def split_ends(
    plugins: list[str], directories: list[str]
) -> tuple[dict[str, tuple[str, str | None]], list[str]]:
    """Return the ends of the call (name, file of a plugin) and the plugins between them.

    A first plugin that is a source plugin, and a last one that is a destination plugin, are ends.
    """
    ends: dict[str, tuple[str, str | None]] = {}
    middle = plugins[:]
    for kind, place in (("src", 0), ("dst", -1)):
        ends[kind] = (DEFAULT_END, None)
        if not middle:
            continue
        name = middle[place]
        file = None if name in EARLIER else plugin_file(name, directories, kind)
        if name == DEFAULT_END or file is not None:
            ends[kind] = (middle.pop(place), None if name == DEFAULT_END else file)
    return ends, middle


def plugin_directories(path: str, settings: ProxySettings) -> list[str]:
    """Return where plugins may lie: as configured, beside the file, in ``plugins`` beside it."""
    beside = os.path.dirname(os.path.abspath(path))
    found = [*settings.legacy_plugins, beside + "/plugins", beside]
    return [directory for directory in found if os.path.isdir(directory)]


def misspelt(given: dict[str, Any], known: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the keys that mean nothing but nearly do, each with what it may be meant for.

    The earlier program ignored whatever it did not know, and files may rely on it.
    """
    for key in given:
        meant = key in known or key in EARLIER or key.isdigit()
        hint = None if meant else did_you_mean(key, known)
        if hint is not None:
            yield key, hint


def options_of(config: dict[str, Any], place: int, plugin: str) -> Any:
    """Return a plugin's entry of ``config``: by its position first, then by its name.

    ``place`` counts from 0 among the plugins between the ends.
    """
    position = str(place)
    return config[position] if position in config else config.get(plugin, {})


def _translated(plugin: str, given: dict[str, Any]) -> dict[str, Any]:
    """Turn values that the earlier proxy took into ours."""
    made = dict(given)
    if plugin == "sniff" and made.get("decode") == "str":
        made["decode"] = "string"
    return {key: value for key, value in made.items() if value is not None}


def as_toml(configuration: Configuration) -> str:
    """Return the chains of an imported configuration as TOML (``sluice proxy import``)."""
    lines = [f"# Imported from {configuration.files[0]}.", ""]
    directories = {
        directory: None
        for chain in configuration.chains.values()
        if chain.legacy is not None
        for directory in chain.legacy["directories"]
    }
    if directories:
        lines += ["[proxy]", f"legacy_plugins = {_value(list(directories))}", ""]
    for chain in configuration.chains.values():
        lines.append(f"[chains.{_key(chain.name)}]")
        if chain.description:
            lines.append(f"description = {_string(chain.description)}")
        lines += [
            'services = "any"   # as before: say here which services may be called',
            'targets = "any"    # and where',
            "require_exit_code = false",
        ]
        lines.append("filters = [")
        for name, given in _elements(chain):
            if given is None:
                lines.append(f"  # {name}")
                continue
            options = "".join(f", {_key(key)} = {_value(value)}" for key, value in given.items())
            lines.append(f"  {{ use = {_string(name)}{options} }}," if given else f'  "{name}",')
        lines += ["]", ""]
    return "\n".join(lines)


def _elements(chain: ChainConfig) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield what stands in a chain in order: name and options; a remark has None."""
    from sluice.proxy.loader import BUILTIN

    legacy = chain.legacy or legacy_parts([{"use": n} for n in range(len(chain.uses))], [], {})
    for part in (legacy["src"], *legacy["elements"], legacy["dst"]):
        if part is None:
            continue
        if "use" in part:
            use = chain.uses[part["use"]]
            yield use.cls.name, use.values
            continue
        if part["plugin"].replace("_", "-") in BUILTIN:
            yield f"the plugin {part['file']} must get another name: this one is a filter's", None
        yield part["plugin"], {key: v for key, v in part["config"].items() if v is not None}


def _value(value: Any) -> str:
    """Write a value as TOML; ``null``, which TOML has not, is left out of lists and tables."""
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value if item is not None) + "]"
    if isinstance(value, dict):
        pairs = (f"{_key(str(k))} = {_value(v)}" for k, v in value.items() if v is not None)
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    return show_value(type(value), value)


def _string(text: str) -> str:
    import json

    # Not JSON's pairs of surrogates, and DEL may not stand in TOML as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    bare = name.replace("-", "").replace("_", "")
    return name if bare.isascii() and bare.isalnum() else _string(name)
