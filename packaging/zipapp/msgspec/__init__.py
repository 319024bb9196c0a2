"""What the proxy uses of msgspec, in plain Python, for the single file: it holds nothing compiled.

A compiled library fits one version of Python; the single file runs with those of Debian and of
Fedora. Tests compare this with the real one: same values, refused alike, with the same words.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

__version__ = "0"


class MsgspecError(Exception):
    """What all errors have in common."""


class DecodeError(MsgspecError):
    """A value cannot be read."""


class ValidationError(DecodeError):
    """A value does not fit its type."""


class _NoDefault:
    def __repr__(self) -> str:
        return "NODEFAULT"


NODEFAULT: Any = _NoDefault()


class Meta(NamedTuple):
    """Bounds of a type, within ``Annotated``."""

    ge: Any = None
    gt: Any = None
    le: Any = None
    lt: Any = None
    min_length: int | None = None
    max_length: int | None = None
    title: str | None = None
    description: str | None = None


class FieldInfo(NamedTuple):
    """One field of a Struct."""

    name: str
    encode_name: str
    type: Any
    default: Any = NODEFAULT
    default_factory: Any = NODEFAULT


class _Factory(NamedTuple):
    make: Callable[[], Any]


def field(*, default: Any = NODEFAULT, default_factory: Any = NODEFAULT, name: Any = None) -> Any:
    """Give a field of a Struct a default."""
    return _Factory(default_factory) if default_factory is not NODEFAULT else default


class Struct:
    """A class with typed fields; built from keywords or in the order of its fields."""

    __struct_fields__: tuple[str, ...] = ()
    _defaults: dict[str, Any] = {}  # noqa: RUF012

    def __init_subclass__(cls, frozen: bool = False, **options: Any) -> None:
        """Collect the fields; of the options only ``frozen`` has an effect here."""
        super().__init_subclass__()
        # As an attribute: since Python 3.14 it is in no dictionary before somebody asks for it.
        names = [name for name in cls.__annotations__ if name[:2] != "__"]
        cls._defaults = dict(cls._defaults)
        for name in names:
            if name in vars(cls):
                default = vars(cls)[name]
                cls._defaults[name] = _as_factory(default)
                delattr(cls, name)
        cls.__struct_fields__ = (*cls.__struct_fields__, *names)
        if frozen:
            cls.__setattr__ = _refuse_setting  # type: ignore[assignment]

    def __init__(self, *given: Any, **named: Any) -> None:
        """Take the fields; those with a default may be left out."""
        values = dict(zip(self.__struct_fields__, given, strict=False))
        if len(given) > len(self.__struct_fields__) or values.keys() & named.keys():
            raise TypeError("too many arguments")
        values.update(named)
        for name in self.__struct_fields__:
            if name in values:
                value = values.pop(name)
            elif name in self._defaults:
                default = self._defaults[name]
                value = default.make() if isinstance(default, _Factory) else default
            else:
                raise TypeError(f"Missing required argument '{name}'")
            object.__setattr__(self, name, value)
        if values:
            raise TypeError(f"Unexpected keyword argument '{next(iter(values))}'")

    def __eq__(self, other: object) -> bool:
        """Compare field by field."""
        names = self.__struct_fields__
        return type(self) is type(other) and all(
            getattr(self, n) == getattr(other, n) for n in names
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Show the fields."""
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__struct_fields__)
        return f"{type(self).__name__}({shown})"


def _refuse_setting(self: Struct, name: str, value: Any) -> None:
    raise AttributeError(f"immutable type: '{type(self).__name__}'")


def _as_factory(default: Any) -> Any:
    """Each object gets a list, set or table of its own."""
    if isinstance(default, (list, dict, set)):
        return _Factory(default.copy)
    return default


_WORDS = {
    type(None): "null", bool: "bool", int: "int", float: "float", str: "str", bytes: "bytes",
    list: "array", tuple: "array", set: "array", frozenset: "array", dict: "object",
}  # fmt: skip


def convert(value: Any, type: Any) -> Any:
    """Return ``value`` as ``type``. Raises ValidationError."""
    return _convert(value, type, (), "$")


def _convert(value: Any, kind: Any, metas: tuple[Meta, ...], place: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        found = tuple(meta for meta in args[1:] if isinstance(meta, Meta))
        return _convert(value, args[0], metas + found, place)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, args, metas, place)
    if origin is Literal:
        return _convert_literal(value, args, place)
    plain = origin or kind
    if plain in (list, tuple, set, frozenset, dict):
        made = _convert_container(value, plain, args, kind, place)
    elif plain is float and type(value) is int:
        made = float(value)
    elif plain in (bool, int, float, str, bytes, None, type(None)):
        if type(value) is not (type(None) if plain is None else plain):
            raise _unexpected(value, _word(kind), place)
        made = value
    else:
        raise ValidationError(f"`{kind}` needs the library msgspec, which is missing here")
    for meta in metas:
        _check_bounds(made, meta, _word(kind), place)
    return made


def _convert_union(value: Any, args: tuple[Any, ...], metas: tuple[Meta, ...], place: str) -> Any:
    # The type that the value has already comes first: 1 stays 1 in float | int.
    for kind in sorted(args, key=lambda kind: (typing.get_origin(kind) or kind) is not type(value)):
        try:
            return _convert(value, kind, metas, place)
        except ValidationError as error:
            if "Expected `" not in str(error) or not str(error).endswith(_at(place)):
                raise
            if _accepts_kind(value, kind):
                raise
    raise _unexpected(value, " | ".join(dict.fromkeys(_word(kind) for kind in args)), place)


def _accepts_kind(value: Any, kind: Any) -> bool:
    plain = typing.get_origin(kind) or kind
    return plain in (list, tuple, set, frozenset, dict) and isinstance(value, (list, tuple, dict))


def _convert_literal(value: Any, known: tuple[Any, ...], place: str) -> Any:
    kinds = list(dict.fromkeys(type(choice) for choice in known))
    if type(value) not in kinds:
        raise _unexpected(value, " | ".join(_WORDS[kind] for kind in kinds), place)
    for choice in known:
        if type(choice) is type(value) and choice == value:
            return choice
    shown = f"'{value}'" if isinstance(value, str) else str(value)
    raise ValidationError(f"Invalid enum value {shown}{_at(place)}")


def _convert_container(value: Any, plain: Any, args: tuple[Any, ...], kind: Any, place: str) -> Any:
    if plain is dict:
        if not isinstance(value, dict):
            raise _unexpected(value, "object", place)
        key_kind, value_kind = args or (Any, Any)
        return {
            _convert(key, key_kind, (), f"key` in `{place}"): _convert(
                item, value_kind, (), f"{place}[...]"
            )
            for key, item in value.items()
        }
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise _unexpected(value, "array", place)
    items = list(value)
    if plain is tuple and args and args[-1] is not Ellipsis:
        if len(items) != len(args):
            text = f"Expected `array` of length {len(args)}, got {len(items)}"
            raise ValidationError(text + _at(place))
        return tuple(
            _convert(item, one, (), f"{place}[{number}]")
            for number, (item, one) in enumerate(zip(items, args, strict=True))
        )
    inner = args[0] if args else Any
    return plain(
        _convert(item, inner, (), f"{place}[{number}]") for number, item in enumerate(items)
    )


def _check_bounds(value: Any, meta: Meta, word: str, place: str) -> None:
    for name, sign, fits in (
        ("ge", ">=", lambda bound: value >= bound),
        ("gt", ">", lambda bound: value > bound),
        ("le", "<=", lambda bound: value <= bound),
        ("lt", "<", lambda bound: value < bound),
    ):
        bound = getattr(meta, name)
        if bound is not None and not fits(bound):
            if word == "int" and len(sign) == 1:
                # As the real one says it of whole numbers.
                sign, bound = sign + "=", bound + (1 if sign == ">" else -1)
            raise ValidationError(f"Expected `{word}` {sign} {bound}{_at(place)}")
    if meta.min_length is not None and len(value) < meta.min_length:
        text = f"Expected `{word}` of length >= {meta.min_length}"
        raise ValidationError(text + _at(place))
    if meta.max_length is not None and len(value) > meta.max_length:
        text = f"Expected `{word}` of length <= {meta.max_length}"
        raise ValidationError(text + _at(place))


def _word(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _word(args[0])
    if origin is Literal:
        return " | ".join(dict.fromkeys(_WORDS[type(choice)] for choice in args))
    return _WORDS.get(origin or (type(None) if kind is None else kind), "any")


def _unexpected(value: Any, word: str, place: str) -> ValidationError:
    return ValidationError(f"Expected `{word}`, got `{_WORDS.get(type(value), 'any')}`{_at(place)}")


def _at(place: str) -> str:
    return "" if place == "$" else f" - at `{place}`"


from . import structs  # noqa: E402

__all__ = [
    "NODEFAULT", "DecodeError", "Meta", "MsgspecError", "Struct", "ValidationError", "convert",
    "field", "structs",
]  # fmt: skip


# Defined last: the import above asks for the name before it looks for the file.
def __getattr__(name: str) -> Any:
    """Tell that what is not here is missing, as if the library itself were."""
    if name.startswith("__"):
        raise AttributeError(name)
    raise ModuleNotFoundError(f"msgspec.{name} needs the library msgspec", name="msgspec")
