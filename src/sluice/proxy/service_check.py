"""Whether the agent tells the raw socket who calls (docs/spec/proxy.md 2).

With ``skip-service-descriptor`` in its service configuration a socket service gets the source's
bytes first: the source could then write a descriptor of its own and be whoever it likes.
"""

from __future__ import annotations

import os

from sluice.errors import ConfigError
from sluice.service.configuration import (
    CONFIG_PATH_VARIABLE,
    DEFAULT_CONFIG_PATH,
    parse_configuration,
    read_file,
)


def skips_descriptor(service: str, path: str | None = None) -> str | None:
    """Return which file makes the agent skip the descriptor of ``service``; None if none does.

    Every file for the service or for the service with an argument counts, wherever it stands in
    the search list. One that cannot be read or understood counts as well.
    """
    if path is None:
        path = os.environ.get(CONFIG_PATH_VARIABLE, DEFAULT_CONFIG_PATH)
    for directory in path.split(":"):
        for file in _files(directory, service):
            try:
                if parse_configuration(read_file(file), file).skip_service_descriptor:
                    return f"{file} sets skip-service-descriptor"
            except (OSError, ConfigError) as error:
                return f"{file} cannot be judged: {error}"
    return None


def _files(directory: str, service: str) -> list[str]:
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    return [
        f"{directory}/{name}" for name in names if name == service or name.startswith(service + "+")
    ]
