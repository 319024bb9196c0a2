"""The earlier proxy's ``config.json`` (docs/spec/proxy.md 3).

A dict of chain name to ``{"plugins": [...], "config": {...}}``. Names and options with ``_`` are
aliases of ours. Where a chain names a plugin that is no filter of ours, it must be found in the
``plugins`` directory beside the file or in ``legacy_plugins``.
"""

from __future__ import annotations

import os
from typing import Any

from sluice.errors import ConfigError
from sluice.proxy.chain import FilterUse
from sluice.proxy.configuration import read_json
from sluice.proxy.loader import Filters
from sluice.proxy.model import ChainConfig, Configuration, ProxySettings
from sluice.proxy.names import is_valid_chain_name
from sluice.proxy.schema import FieldError, show_value, use_filter

# The ordinary ends of a call, in the words of the earlier proxy.
DEFAULT_END = "default"


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
    plugins, config = entry.get("plugins", []), entry.get("config", {})
    if not isinstance(plugins, list) or not all(isinstance(p, str) for p in plugins):
        raise wrong("plugins", "must be a list of names")
    if not isinstance(config, dict):
        raise wrong("config", "must be an object")
    ends, middle = split_ends(plugins)
    uses: list[FilterUse] = []
    own: dict[str, Any] = {}
    for place, plugin in middle:
        given = options_of(config, place, plugin)
        if not isinstance(given, dict):
            raise wrong(f"config.{plugin}", "must be an object")
        file = plugin_file(plugin, path, settings)
        if file is not None:
            own[str(place)] = {"plugin": plugin, "file": file, "config": given}
            continue
        try:
            use = use_filter(filters.get(plugin), _translated(plugin, given))
        except FieldError as error:
            raise wrong(f"config.{plugin}.{error.field}", error.message_only, error.hint) from None
        except ConfigError as error:
            raise wrong("plugins", error.message) from None
        uses.append(use)
    legacy = None
    if own or any(end != DEFAULT_END for end in ends.values()):
        legacy = {"plugins": plugins, "config": config, "own": own, "ends": ends}
    return ChainConfig(
        name,
        uses,
        description=str(entry.get("description", "")),
        require_exit_code=False,
        file=path,
        imported=True,
        legacy=legacy,
    )


def split_ends(plugins: list[str]) -> tuple[dict[str, str], list[tuple[int, str]]]:
    """Return the ends of the call and the plugins between them with their positions."""
    ends = {"src": DEFAULT_END, "dst": DEFAULT_END}
    middle = list(enumerate(plugins))
    if middle and is_source_plugin(middle[0][1]):
        ends["src"] = middle.pop(0)[1]
    if middle and is_destination_plugin(middle[-1][1]):
        ends["dst"] = middle.pop()[1]
    return ends, middle


def is_source_plugin(name: str) -> bool:
    """Tell whether a plugin, by its name, is a source."""
    return name == DEFAULT_END or name.startswith("src_")


def is_destination_plugin(name: str) -> bool:
    """Tell whether a plugin, by its name, is a destination."""
    return name == DEFAULT_END or name.startswith("dst_")


def options_of(config: dict[str, Any], place: int, plugin: str) -> Any:
    """Return a plugin's entry of ``config``: by its position first, then by its name."""
    position = str(place)
    return config[position] if position in config else config.get(plugin, {})


def plugin_file(plugin: str, path: str, settings: ProxySettings) -> str | None:
    """Return the file of a plugin of its owner's; None where a filter of ours is meant.

    A plugin of ours by name is ours even where the earlier program's file lies beside the
    configuration: that is what an old installation has.
    """
    from sluice.proxy.loader import BUILTIN

    if plugin.replace("_", "-") in BUILTIN:
        return None
    beside = os.path.dirname(os.path.abspath(path))
    for directory in (*settings.legacy_plugins, beside, beside + "/plugins"):
        file = f"{directory}/{plugin}.py"
        if plugin.isidentifier() and os.path.isfile(file):
            return file
    return None


def _translated(plugin: str, given: dict[str, Any]) -> dict[str, Any]:
    """Turn values that the earlier proxy took into ours."""
    made = dict(given)
    if plugin == "sniff" and made.get("decode") == "str":
        made["decode"] = "string"
    return {key: value for key, value in made.items() if value is not None}


def as_toml(configuration: Configuration) -> str:
    """Return the chains of an imported configuration as TOML (``sluice proxy import``)."""
    lines = [f"# Imported from {configuration.files[0]}.", ""]
    for chain in configuration.chains.values():
        lines.append(f"[chains.{_key(chain.name)}]")
        if chain.description:
            lines.append(f"description = {_string(chain.description)}")
        lines += [
            'services = "any"   # as before: say here which services may be called',
            'targets = "any"    # and where',
            "require_exit_code = false",
        ]
        if chain.legacy is not None:
            lines.append("# This chain has plugins of the earlier proxy: keep it in config.json.")
        elements = []
        for use in chain.uses:
            given = "".join(f", {option} = {_value(value)}" for option, value in use.values.items())
            elements.append(
                f'{{ use = "{use.cls.name}"{given} }}' if given else f'"{use.cls.name}"'
            )
        lines.append("filters = [" + "".join(f"\n  {element}," for element in elements) + "\n]")
        lines.append("")
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    return show_value(type(value), value)


def _string(text: str) -> str:
    import json

    return json.dumps(text)


def _key(name: str) -> str:
    return name if "." not in name else _string(name)
