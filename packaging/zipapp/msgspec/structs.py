"""Looking into a Struct."""

from __future__ import annotations

from typing import Any

from . import NODEFAULT, FieldInfo, Struct, _Factory


def fields(declared: Any) -> tuple[FieldInfo, ...]:
    """Return the fields of a class derived from Struct, in order."""
    cls = declared if isinstance(declared, type) else type(declared)
    assert issubclass(cls, Struct)
    kinds: dict[str, Any] = {}
    for base in cls.__mro__[::-1]:
        kinds.update(getattr(base, "__annotations__", {}))
    found = []
    for name in cls.__struct_fields__:
        default = cls._defaults.get(name, NODEFAULT)
        made = isinstance(default, _Factory)
        found.append(
            FieldInfo(
                name,
                name,
                kinds[name],
                NODEFAULT if made else default,
                default.make if made else NODEFAULT,
            )
        )
    return tuple(found)
