"""Which services a system is known to offer, by name: for tools that look for misspelt ones.

What domains installed for themselves is not among them: their trees are theirs, and nothing outside
opens a path in one (``sandbox.private``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sluice import runtime
from sluice.domains.paths import Paths
from sluice.domains.system_file import load

_SERVICES = "qubes-rpc"


def services(paths: Paths) -> set[str]:
    """Return names without arguments: of dom0, the templates, the package and ``system.toml``.

    Raises ConfigError where that file is wrong.
    """
    directories = [*paths.rpc, Path(runtime.package_directory()) / "rpc"]
    directories += paths.template("").glob(f"*/etc/{_SERVICES}")
    names = {name for directory in directories for name in _entries(directory)}
    for settings in load(paths.system_file).domains.values():
        places = (Path(place) for place in settings.get("files", {}))
        names |= {place.name for place in places if place.parent.name == _SERVICES}
    return {name.partition("+")[0] for name in names}


def _entries(directory: Path) -> Iterator[str]:
    try:
        yield from os.listdir(directory)
    except OSError:
        return
