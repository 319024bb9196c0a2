"""Policies that are not on a disk: for tools, tests, and for the check of a change before it."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping

from sluice.policy.evaluation import Policy
from sluice.policy.loader import Files, Loader

_DIRECTORY = "/policy.d"


class MemoryFiles:
    """Files given as a mapping of absolute paths to contents. Directories are implied by them.

    ``directories`` names further ones, which may be empty.
    """

    def __init__(self, files: Mapping[str, bytes | str], directories: tuple[str, ...] = ()) -> None:
        """Take the contents; texts are encoded as UTF-8."""
        self._files = {
            path: content.encode() if isinstance(content, str) else content
            for path, content in files.items()
        }
        self._directories = set(directories)
        for path in (*files, *directories):
            while path != "/":
                path = posixpath.dirname(path)
                self._directories.add(path)

    def entries(self, directory: str) -> list[str]:
        """Return the names directly inside."""
        if directory not in self._directories:
            raise FileNotFoundError(2, os.strerror(2), directory)
        inside = directory.rstrip("/") + "/"
        return list(
            {
                path[len(inside) :].partition("/")[0]
                for path in (*self._files, *self._directories)
                if path.startswith(inside) and path != inside
            }
        )

    def is_file(self, path: str) -> bool:
        """Tell whether there is such a file."""
        return path in self._files

    def is_directory(self, path: str) -> bool:
        """Tell whether there is such a directory."""
        return path in self._directories

    def resolve(self, path: str) -> str:
        """Collapse ``..``; there are no links here."""
        return posixpath.normpath(path)

    def read(self, path: str) -> bytes:
        """Return the content."""
        if path not in self._files:
            raise FileNotFoundError(2, os.strerror(2), path)
        return self._files[path]


class Overlay:
    """Other files with some replaced or, where the content is None, removed (section 22.3)."""

    def __init__(self, below: Files, changes: Mapping[str, bytes | None]) -> None:
        """Take what lies below and the changes by resolved path."""
        self._below = below
        self._changes = dict(changes)

    def entries(self, directory: str) -> list[str]:
        """Return the names, with the changes applied."""
        names = set(self._below.entries(directory))
        for path, content in self._changes.items():
            if posixpath.dirname(path) == directory:
                (names.discard if content is None else names.add)(posixpath.basename(path))
        return list(names)

    def is_file(self, path: str) -> bool:
        """Tell whether there is such a file after the changes."""
        if path in self._changes:
            return self._changes[path] is not None
        return self._below.is_file(path)

    def is_directory(self, path: str) -> bool:
        """Tell whether there is such a directory."""
        return self._below.is_directory(path)

    def resolve(self, path: str) -> str:
        """Resolve as below."""
        return self._below.resolve(path)

    def read(self, path: str) -> bytes:
        """Return the content after the changes."""
        content = self._changes.get(path)
        return self._below.read(path) if content is None else content


def parse_text(text: str | bytes, file: str = "policy") -> Policy:
    """Build a policy from one text without includes; ``file`` is what its rules are cited as.

    Raises PolicySyntaxError. For tests, examples and the smallest embedders.
    """
    content = text.encode() if isinstance(text, str) else text
    loaded = Loader(MemoryFiles({}, (_DIRECTORY,)), [_DIRECTORY]).load_text(
        content, file, _DIRECTORY
    )
    return Policy(loaded.rules, loaded.warnings)


def from_files(
    files: Mapping[str, bytes | str],
    directories: tuple[str, ...] = (_DIRECTORY,),
    legacy_directory: str = "/legacy",
) -> Policy:
    """Build a policy from files in memory, as from a disk. Raises PolicyError."""
    memory = MemoryFiles(files, directories)
    loaded = Loader(memory, directories, legacy_directory=legacy_directory).load()
    return Policy(loaded.rules, loaded.warnings)
