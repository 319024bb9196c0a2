"""From what a person wrote to typed values, with errors that help (docs/spec/proxy.md 3).

Used for the options of filters and for the tables of the configuration. Large processes only: it
loads msgspec. What it validated can be kept and used without it (``compiled.py``).
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
import typing
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from sluice.errors import ConfigError
from sluice.proxy import options as kinds
from sluice.proxy.options import OptionError, with_values
from sluice.proxy.stage import FilterUse, where_raised
from sluice.proxy.units import parse_duration, parse_size, show_duration, show_size

_Size: Any = kinds.Size
_SizeLimit: Any = kinds.SizeLimit
_Duration: Any = kinds.Duration
_DurationLimit: Any = kinds.DurationLimit

MISSING = object()

# What built-in filters use beside msgspec: compiled, so the single file of the proxy lacks it.
NEEDS = {"lines": ("re2", "google-re2"), "json": ("jsonschema_rs", "jsonschema-rs")}


class Field(typing.NamedTuple):
    """One option: its name, its type, its default (MISSING for none), a line of help."""

    name: str
    type: Any
    default: Any
    help: str


class FieldError(ConfigError):
    """A key or value that does not fit; ``field`` names it, ``hint`` says what would."""

    def __init__(self, field: str, message: str, hint: str | None = None) -> None:
        """Take the key within its table."""
        super().__init__(message, key=field, suggestion=hint)
        self.field = field
        self.message_only = message
        self.hint = hint


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Return ``did you mean 'x'?`` for the nearest known name; None where none is near."""
    near = difflib.get_close_matches(word, sorted(known), 1, 0.6)
    return f"did you mean '{near[0]}'?" if near else None


def suggest(word: str, known: Iterable[str]) -> str | None:
    """Return ``did you mean 'x'?`` for the nearest known name, or a list of what there is."""
    names = sorted(known)
    near = did_you_mean(word, names)
    if near is not None or not names:
        return near
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"known: {shown}"


def fields_of(declared: type[Any]) -> dict[str, Field]:
    """Return the options that a class declares, in order.

    Raises TypeError or NameError where its annotations cannot be understood.
    """
    module = sys.modules.get(declared.__module__)
    names = {
        **vars(typing),
        **{name: getattr(kinds, name) for name in vars(kinds) if name[:1].isupper()},
        "Literal": Literal,
    }
    hints = typing.get_type_hints(
        declared, globalns={**names, **(vars(module) if module else {})}, include_extras=True
    )
    helps = _help_lines(declared)
    found = {}
    defaults = _defaults(declared)
    for name, kind in hints.items():
        if not name.startswith("_"):
            default = defaults.get(name, MISSING)
            found[name] = Field(name, kind, default, helps.get(name, ""))
    return found


def _defaults(declared: type[Any]) -> dict[str, Any]:
    if issubclass(declared, msgspec.Struct):
        made = {}
        for field in msgspec.structs.fields(declared):
            if field.default is not msgspec.NODEFAULT:
                made[field.name] = field.default
            elif field.default_factory is not msgspec.NODEFAULT:
                made[field.name] = field.default_factory()
        return made
    return {name: value for cls in declared.__mro__[::-1] for name, value in vars(cls).items()}


def _help_lines(declared: type[Any]) -> dict[str, str]:
    """Read ``name: help`` out of a docstring; lines that are further in go on."""
    helps: dict[str, str] = {}
    last = None
    for line in (declared.__doc__ or "").splitlines():
        name, colon, text = line.strip().partition(": ")
        if colon and name.isidentifier():
            helps[name] = text
            last = name
        elif last and line.startswith(" " * 12) and line.strip():
            helps[last] += " " + line.strip()
        else:
            last = None
    return helps


def convert(field: Field, value: Any) -> Any:
    """Return ``value`` as the field's type. Raises FieldError."""
    try:
        return _convert(value, field.type)
    except (msgspec.ValidationError, ValueError) as error:
        text = str(error)
        place = ""
        if " - at `$" in text:
            text, _, place = text.partition(" - at `$")
            place = place.rstrip("`")
        hint = f"it takes {show_type(field.type)}"
        known = [choice for choice in _choices(field.type) if isinstance(choice, str)]
        if known and isinstance(value, str):
            # Where other values are good as well, a list of the words would not be all.
            advise = suggest if typing.get_origin(field.type) is Literal else did_you_mean
            hint = advise(value, known) or hint
            text = f"'{value}' is not one of its values"
        raise FieldError(field.name + place, text, hint) from None


def _choices(kind: Any) -> tuple[Any, ...]:
    """Return the words that a type takes: a Literal, or one among other types."""
    if typing.get_origin(kind) is Literal:
        return typing.get_args(kind)
    return tuple(choice for arg in typing.get_args(kind) for choice in _choices(arg))


def _convert(value: Any, kind: Any) -> Any:
    """Convert the kinds of our own, alone or inside of others; msgspec does the rest."""
    if kind in (_SizeLimit, _DurationLimit) and type(value) in (int, float) and value == -1:
        return -1
    if kind in (_Size, _SizeLimit):
        return parse_size(value)
    if kind in (_Duration, _DurationLimit):
        if not isinstance(value, (int, float, str)):
            raise ValueError("must be a duration such as 5, 0.5, '500ms', '5s', '2m' or '1h'")
        return parse_duration(value)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if not any(_is_ours(arg) for arg in args):
        return msgspec.convert(value, kind)
    if origin is list and isinstance(value, list):
        return [_convert(item, args[0]) for item in value]
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(item, args[1]) for key, item in value.items()}
    ours = [arg for arg in args if _is_ours(arg)]
    if origin in (list, dict) or not ours:
        raise ValueError(f"got {type(value).__name__}")
    return _convert(value, ours[0])


def _is_ours(kind: Any) -> bool:
    return kind in (_Size, _SizeLimit, _Duration, _DurationLimit)


def convert_table(
    declared: type[Any], given: dict[str, Any], aliases: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return the validated values of a table, by name; defaults are left out.

    Raises FieldError for unknown keys, missing ones, and values of a wrong type or range.
    """
    fields = fields_of(declared)
    aliases = aliases or {}
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = aliases.get(key, key)
        if name not in fields:
            name = aliases.get(key.replace("_", "-"), key.replace("-", "_"))
        if name not in fields:
            raise FieldError(key, "unknown key", suggest(key, fields) or "it takes no options")
        if name in values:
            raise FieldError(key, f"is given twice ('{name}' is the same)")
        values[name] = convert(fields[name], value)
    for name, field in fields.items():
        if field.default is MISSING and name not in values:
            raise FieldError(name, "is missing", f"it takes {show_type(field.type)}")
    return values


def use_filter(cls: type[Any], given: dict[str, Any], name: str | None = None) -> FilterUse:
    """Return a place of a chain: ``cls`` with the validated options.

    Raises FieldError, also for what the filter's own ``check`` finds.
    """
    _find_library(cls)
    values = convert_table(cls.Options, given, dict(getattr(cls, "aliases", ())))
    made = make_options(cls.Options, values)
    use = FilterUse(cls, made, name)
    use.values = values
    try:
        if hasattr(cls, "check"):
            cls.check(made)
        use.inspected()
    except OptionError as error:
        raise FieldError(error.option, str(error)) from None
    except (Exception, SystemExit) as error:
        text = f"cannot judge its options: {type(error).__name__}: {error}{where_raised(error)}"
        raise FieldError("use", text) from error
    return use


def _find_library(cls: type[Any]) -> None:
    """Raise FieldError where a built-in filter cannot work for want of a library."""
    module, library = NEEDS.get(cls.name, ("", ""))
    if not module or not cls.__module__.startswith("sluice.proxy.filters."):
        return
    if importlib.util.find_spec(module) is None:
        raise FieldError(
            "use",
            f"it needs the library {library}, which this installation lacks",
            "the Debian package carries it; the single file holds no compiled libraries",
        )


def make_options(declared: type[Any], values: dict[str, Any]) -> Any:
    """Return the options object that a filter sees."""
    if issubclass(declared, msgspec.Struct):
        return declared(**values)
    return with_values(declared, values)


def show_type(kind: Any) -> str:
    """Describe a type to a person."""
    simple = {
        _Size: "a size (64k, 10M)",
        _SizeLimit: "a size (64k, 10M) or -1",
        _Duration: "a duration (500ms, 5s, 2m)",
        _DurationLimit: "a duration (500ms, 5s, 2m) or -1",
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "nothing",
        Any: "anything",
    }
    if kind in simple:
        return simple[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " / ".join(str(choice) for choice in args)
    if origin is typing.Annotated:
        return show_type(args[0])
    if origin is list or origin is tuple:
        inner = show_type(args[0]) if args else "anything"
        return f"a list of {inner.removeprefix('a ')}"
    if origin is dict:
        return f"a table of {show_type(args[1]).removeprefix('a ')}"
    if args:
        return " or ".join(show_type(arg) for arg in args if arg is not type(None))
    return getattr(kind, "__name__", str(kind))


def show_value(kind: Any, value: Any) -> str:
    """Write a value of a type as it would stand in the configuration."""
    if value is MISSING:
        return "(required)"
    if value is None:
        return "(none)"
    if value == -1 and kind in (_SizeLimit, _DurationLimit):
        return "-1"
    if kind in (_Duration, _DurationLimit):
        return show_duration(value)
    if kind in (_Size, _SizeLimit):
        return show_size(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, dict):
        pairs = (f"{key} = {show_value(type(item), item)}" for key, item in value.items())
        return "{ " + ", ".join(pairs) + " }" if value else "{}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show_value(type(item), item) for item in value) + "]"
    return str(value)
