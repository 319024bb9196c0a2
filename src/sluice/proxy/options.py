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


def absolute(option: str, path: str) -> None:
    """Raise OptionError unless ``path`` is absolute, or empty: a call may begin anywhere."""
    if path and not path.startswith("/"):
        raise OptionError(option, f"'{path}' is no absolute path")


def either(options: Any, what: str) -> None:
    """Raise OptionError where a filter is given nothing to judge in any direction."""
    if not options.src2dst and not options.dst2src:
        raise OptionError("src2dst", f"{what} must be given, here or dst2src")


def idle(options: Any, *names: str) -> list[str]:
    """Return what ``describe`` says of a filter whose limits ``names`` are all unset."""
    unset = all(getattr(options, name) < 0 for name in names)
    return ["nothing is set: it hinders no call"] if unset else []


def with_values(options: type[Any], values: dict[str, Any]) -> Any:
    """Return an instance of a plain ``Options`` class with ``values``, defaults for the others.

    The values must have been validated (``sluice.proxy.schema``).
    """
    made = options()
    for name, value in values.items():
        setattr(made, name, value)
    return made
