"""Where Sluice itself lies: the package, its small programs and the libraries it uses.

On the host these are found from the place of this file: a checkout with its virtual environment,
an installation, or a Debian package. Inside a domain they are always below ``INSIDE``, read-only.
The small programs load this module, so it imports only ``sys`` and ``os``.
docs/spec/core-stack.md 12.4.1.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# What a domain sees. Each is read-only inside.
INSIDE = "/usr/lib/sluice"
INSIDE_PACKAGE = INSIDE + "/sluice"
INSIDE_SITE = INSIDE + "/site-packages"
INSIDE_BIN = INSIDE + "/bin"

# The interpreter that runs everything, because it is the one a domain sees.
INTERPRETER = "/usr/bin/python3"

# Where Debian keeps the libraries of its own packages. Fedora's are found by the interpreter's
# version, and nothing of ours needs them there.
DIST_PACKAGES = "/usr/lib/python3/dist-packages"


def package_directory() -> str:
    """Return the directory of the package ``sluice`` that is running, without links."""
    return os.path.dirname(os.path.realpath(__file__))


def bin_directory() -> str:
    """Return the directory of the launchers (``qrexec-agent``, ``qrexec-client-vm``, ...)."""
    return package_directory() + "/bin"


def launcher(name: str) -> str:
    """Return the path of one launcher on the host, whether it exists or not."""
    return bin_directory() + "/" + name


def program(name: str) -> "list[str]":
    """Return the command line that starts one of the programs of ours, arguments to be added.

    Where the proxy is a single file, or that file unpacked, there are no launchers: its entry does
    what they do (packaging/zipapp).
    """
    whole = os.path.dirname(package_directory())
    if os.path.isfile(whole) or os.path.isfile(whole + "/__main__.py"):
        return [INTERPRETER, "-IS", whole, "--program", name]
    return [launcher(name)]


def _candidates() -> "Iterable[str]":
    parent = os.path.dirname(package_directory())
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    yield parent + "/site-packages"  # inside a domain; also a Debian package's private copy
    if sys.prefix != sys.base_prefix:  # an interpreter of the virtual environment runs us
        yield f"{sys.prefix}/lib/{version}/site-packages"
    if os.path.basename(parent) in ("site-packages", "dist-packages"):
        yield parent  # an ordinary installation
    if os.path.basename(parent) == "src":  # a checkout: make builds the environment beside it
        yield f"{os.path.dirname(parent)}/.venv/lib/{version}/site-packages"


def site_packages() -> "str | None":
    """Return the directory that holds the libraries, or None where the system's own are used."""
    for candidate in _candidates():
        if os.path.isdir(candidate):
            return candidate
    return None


def add_site_packages() -> None:
    """Put the libraries on ``sys.path``; for large programs that were started with ``-I -S``.

    The directory is appended as it stands: its ``.pth`` files are not run, which saves their time
    and their power. After it come the system's ``dist-packages``: filters and bindings (systemd)
    that the distribution installed are found there, and no library of ours is replaced by them.
    """
    found = site_packages()
    for directory in (found, DIST_PACKAGES):
        if directory and directory not in sys.path:
            sys.path.append(directory)
