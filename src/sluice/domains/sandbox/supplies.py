"""What the AdminVM hands a domain at its start: an archive that process 1 lays inside.

Files of the system file, the skeleton of a home, the configuration of section 11. All of it is
read here, on the trusted side, and packed; nothing of it is ever written into a domain's tree from
outside. docs/spec/core-stack.md 2.7, 11, 12.4 step 9.
"""

from __future__ import annotations

import os
from pathlib import Path

from sluice.agent.inside import EACH_START, FIRST_START, OWNED_BY_USER, pack
from sluice.domains.model import DomainConfig
from sluice.domains.paths import Paths
from sluice.domains.sandbox import etc
from sluice.errors import LocalError, ResourceError

MAX_ARCHIVE = 32 << 20
CONFIGURATION = "/run/sluice/config"
SERVICE_FLAGS = "/run/qubes-service"
USRLOCAL = "/usr/local"

RC_LOCAL = """#!/bin/sh
# Run in this domain at each start, once it is executable (chmod +x).
"""


def supplies(domain: DomainConfig, paths: Paths) -> bytes:
    """Return the archive for one start. Raises LocalError for a file that cannot be read."""
    template = paths.template(domain.template or domain.name)
    skeleton = template / "etc/skel"
    home = etc.home(domain.default_user)
    archive = [
        *_tree(skeleton if skeleton.is_dir() else Path("/etc/skel"), home, OWNED_BY_USER),
        *_tree(template / "usr/local", USRLOCAL, 0),
        *_configuration(domain),
    ]
    for place, (mode, source) in domain.files.items():
        flags = EACH_START | (OWNED_BY_USER if place.startswith(home + "/") else 0)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise LocalError(f"{domain.name}: {source}: {error.strerror}") from error
        archive.append(pack(flags, mode, place, data))
    # Last, because its directory is the sign that the first start is over.
    archive.append(pack(FIRST_START, 0o644, "/rw/config/rc.local", RC_LOCAL.encode()))
    if sum(map(len, archive)) > MAX_ARCHIVE:
        raise ResourceError(f"{domain.name}: the files to lay are over {MAX_ARCHIVE >> 20} MiB")
    return b"".join(archive)


def _configuration(domain: DomainConfig) -> list[bytes]:
    entries = []
    for key, value in etc.configuration(domain).items():
        entries.append(pack(EACH_START, 0o644, f"{CONFIGURATION}/{key}", value.encode()))
        if key.startswith("qubes-service/") and value == "1":
            flag = f"{SERVICE_FLAGS}/{key.removeprefix('qubes-service/')}"
            entries.append(pack(EACH_START, 0o644, flag, b""))
    return entries


def _tree(source: Path, destination: str, flags: int) -> list[bytes]:
    """Pack the regular files of a directory for the first start; the operator wrote them."""
    entries = []
    for where, directories, files in os.walk(source):
        directories.sort()
        below = os.path.relpath(where, source)
        for name in sorted(files):
            path = Path(where) / name
            if not path.is_file() or path.is_symlink():
                continue
            mode = 0o755 if os.access(path, os.X_OK) else 0o644
            target = os.path.normpath(f"{destination}/{below}/{name}")
            try:
                data = path.read_bytes()
            except OSError as error:
                raise LocalError(f"{path}: {error.strerror}") from error
            entries.append(pack(FIRST_START | flags, mode, target, data))
    return entries
