"""Chains and filters as text for a person (``sluice proxy check``, ``filters``)."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from sluice.proxy.model import ChainConfig
from sluice.proxy.schema import fields_of, show_type, show_value
from sluice.proxy.stage import FilterUse

WIDTH = 80


def chain_lines(chain: ChainConfig) -> Iterator[str]:
    """Yield a chain as it will run: rules, filters in order, all options with their values."""
    place = f"{chain.file}:{chain.line}" if chain.line else str(chain.file or "")
    yield f"chain {chain.name}  ({place})"
    if chain.description:
        yield from textwrap.wrap(
            chain.description, WIDTH, initial_indent="  ", subsequent_indent="  "
        )
    for key in ("sources", "targets", "services"):
        yield f"  {key + ':':10}{_who(chain, key)}"
    if chain.imported:
        yield "  imported from the earlier proxy: any call may use it"
    yield from _plugin_lines(chain)
    for number, use in enumerate(chain.uses, 1):
        yield f"  {number}. {use.name}  {_looks_at(use)}"
        for field in fields_of(use.cls.Options).values():
            value = getattr(use.options, field.name)
            mark = "" if field.name in use.values else "   (default)"
            yield f"       {field.name} = {show_value(field.type, value)}{mark}"
        describe = getattr(use.cls, "describe", None)
        if describe is not None:
            for line in describe(use.options):
                yield f"       {line}"
    if not chain.uses and chain.legacy is None:
        yield "  no filter: everything passes"


def element_names(chain: ChainConfig) -> list[str]:
    """Return the names of a chain's filters and plugins in order, with ends that are plugins."""
    return [
        part["plugin"] if "plugin" in part else chain.uses[part["use"]].name
        for part in _parts(chain)
    ]


def _parts(chain: ChainConfig) -> list[dict[str, Any]]:
    legacy = chain.legacy
    if legacy is None:
        return [{"use": place} for place in range(len(chain.uses))]
    return [part for part in (legacy["src"], *legacy["elements"], legacy["dst"]) if part]


def _plugin_lines(chain: ChainConfig) -> Iterator[str]:
    """Yield the order of a chain with plugins of the earlier proxy, and where these are."""
    if chain.legacy is None:
        return
    names = " > ".join(element_names(chain))
    yield f"  has plugins of the earlier proxy, in a process of its own: {names}"
    for part in _parts(chain):
        if "plugin" in part:
            yield f"  plugin {part['plugin']}  ({part['file']})"
            for key, value in part["config"].items():
                yield f"       {key} = {value!r}"


def _who(chain: ChainConfig, key: str) -> str:
    value = getattr(chain, key)
    if value is None:
        if key == "sources" or chain.imported:
            return "any"
        return "not given: no use where the source chooses it"
    return value if isinstance(value, str) else ", ".join(value) or "(nobody)"


def _looks_at(use: FilterUse) -> str:
    inspected = use.inspected()
    if not inspected:
        return "looks at no bytes"
    return "looks at " + " and ".join(direction.name for direction in inspected)


def summary(cls: type[Any]) -> str:
    """Return the first sentence of a filter's documentation."""
    text = inspect.getdoc(cls) or ""
    first = " ".join(text.split("\n\n")[0].split())
    sentence, stop, _ = first.partition(". ")
    return sentence + ("." if stop else "")


def filter_lines(cls: type[Any]) -> Iterator[str]:
    """Yield what there is to know of a filter: what it does, options with types and defaults."""
    yield cls.name
    yield ""
    for paragraph in (inspect.getdoc(cls) or "").split("\n\n"):
        yield from textwrap.wrap(" ".join(paragraph.replace("``", "'").split()), WIDTH)
        yield ""
    fields = fields_of(cls.Options)
    if not fields:
        yield "It has no options."
        return
    yield "Options:"
    for field in fields.values():
        yield f"  {field.name} = {show_value(field.type, field.default)}"
        about = f"{field.help}; {show_type(field.type)}" if field.help else show_type(field.type)
        yield from textwrap.wrap(about, WIDTH, initial_indent="      ", subsequent_indent="      ")
    aliases = getattr(cls, "aliases", ())
    if aliases:
        yield "Earlier names: " + ", ".join(f"{old} = {new}" for old, new in aliases)


def in_column(name: str, text: str, width: int) -> list[str]:
    """Return ``name`` and, in a column behind ``width`` characters, the text beside it."""
    column = min(width, WIDTH // 3) + 2
    lines = textwrap.wrap(text, WIDTH - column) or [""]
    if len(name) > column - 2:
        lines.insert(0, "")
    first, *more = lines
    return [f"{name:{column}}{first}".rstrip(), *(" " * column + line for line in more)]
