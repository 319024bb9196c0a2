"""Writes the pages of the filters from their classes: ``python docs/filters/build.py``.

A test sees that what lies here is what it would write.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from sluice.proxy.loader import BUILTIN, Filters
from sluice.proxy.schema import fields_of, show_type, show_value
from sluice.proxy.show import summary

HERE = Path(__file__).resolve().parent


def markdown(text: str) -> str:
    """Turn the double back-quotes of docstrings into single ones."""
    return re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)


def page(cls: type[Any]) -> str:
    """Return the page of one filter."""
    lines = [f"# {cls.name}", "", markdown(inspect.getdoc(cls) or ""), ""]
    fields = fields_of(cls.Options)
    if fields:
        lines += ["| option | default | takes | what it does |", "| --- | --- | --- | --- |"]
        for field in fields.values():
            default = show_value(field.type, field.default).replace("|", "\\|")
            takes = show_type(field.type).replace("|", "\\|")
            lines.append(f"| `{field.name}` | `{default}` | {takes} | {field.help} |")
    else:
        lines.append("It has no options.")
    inspects = cls.inspects
    if not callable(inspects):
        looked = " and ".join(direction.name for direction in inspects)
        lines += ["", f"It looks at {looked}." if looked else "It looks at no bytes."]
    else:
        lines += ["", "Which directions it looks at follows from its options."]
    aliases = getattr(cls, "aliases", ())
    if aliases:
        earlier = ", ".join(f"`{old}` is `{new}`" for old, new in aliases)
        lines += ["", f"Names of the earlier proxy: {earlier}."]
    use = f'{{ use = "{cls.name}", ... }}' if fields else f'"{cls.name}"'
    lines += ["", "```toml", f"filters = [{use}]", "```", ""]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Return file name -> text of all pages."""
    known = Filters()
    classes = [known.get(name) for name in sorted(BUILTIN)]
    index = [
        "# Built-in filters", "",
        "Made from the classes by `build.py`. `sluice proxy filters NAME` prints the same.", "",
        "| filter | what it does |", "| --- | --- |",
        *(f"| [{cls.name}]({cls.name}.md) | {markdown(summary(cls))} |" for cls in classes),
        "", "[Writing a filter](../writing-a-filter.md)", "",
    ]  # fmt: skip
    return {"index.md": "\n".join(index), **{f"{cls.name}.md": page(cls) for cls in classes}}


def main() -> None:
    """Write all pages."""
    for name, text in pages().items():
        (HERE / name).write_text(text)


if __name__ == "__main__":
    main()
