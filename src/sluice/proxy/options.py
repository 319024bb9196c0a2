"""How a filter declares its options.

A filter has a nested class ``Options``: annotated names, most with a default, and a docstring with
one line ``name: what it does`` for each. Built-in filters use a plain class, which costs the
program form of the proxy nothing; a ``msgspec.Struct`` does as well. The types here may be used
next to ``str``, ``int``, ``float``, ``bool``, ``list[...]``, ``dict[...]`` and ``Literal[...]``.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    Size: TypeAlias = int
    SizeLimit: TypeAlias = int
    Duration: TypeAlias = float
    DurationLimit: TypeAlias = float
else:

    class Size:
        """Bytes: a number, or ``64k 10M 1G``. The filter sees an int."""

    class SizeLimit:
        """A Size, or -1 for no limit."""

    class Duration:
        """Seconds: a number, or ``500ms 5s 2m 1h``. The filter sees a float."""

    class DurationLimit:
        """A Duration, or -1 for never."""


class OptionError(ValueError):
    """What a filter's ``check`` raises: an option has a value that cannot work."""

    def __init__(self, option: str, message: str) -> None:
        """Take the option's name and what is wrong."""
        super().__init__(message)
        self.option = option


def with_values(options: type[Any], values: dict[str, Any]) -> Any:
    """Return an instance of a plain ``Options`` class with ``values``, defaults for the others.

    The values must have been validated (``sluice.proxy.schema``).
    """
    made = options()
    for name, value in values.items():
        setattr(made, name, value)
    return made
