"""Finding plugins of the earlier proxy, without running them (docs/spec/proxy.md 7)."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable

from sluice.errors import ConfigError

# What the class of a plugin NAME is called, by what it is.
CLASSES = {
    "proxy": "QrexecProxyPlugin_",
    "src": "QrexecSourcePlugin_",
    "dst": "QrexecDestinationPlugin_",
}
_MAX_FILE = 4 << 20


def plugin_file(plugin: str, directories: Iterable[str], kind: str) -> str | None:
    """Return the file that has a plugin of that name and kind; None where there is none.

    Raises ConfigError, with file and line, for one that is no Python.
    """
    if not plugin.isidentifier():
        return None
    for directory in directories:
        file = f"{directory}/{plugin}.py"
        if os.path.isfile(file) and CLASSES[kind] + plugin in names_in(file):
            return file
    return None


def names_in(file: str) -> set[str]:
    """Return the names that a Python file binds. Raises ConfigError where it is no Python."""
    try:
        with open(file, "rb") as stream:
            tree = ast.parse(stream.read(_MAX_FILE), file)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=file) from None
    except SyntaxError as error:
        raise ConfigError(f"syntax error: {error.msg}", file=file, line=error.lineno) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"no Python: {error}", file=file) from None
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found
