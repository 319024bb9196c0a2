"""What the packages carry: the files of Sluice itself and of the libraries that it uses.

The libraries are those of the environment that runs this, with which the tests were made. Nothing
is fetched.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "sluice"

# rich loads these only to colour source code and to show Markdown, which nothing here asks of it;
# they are 10 MB.
NOT_CARRIED = {"pygments", "markdown-it-py"}


class File(NamedTuple):
    """One file to carry: its name below the directory of libraries, and where it lies now."""

    name: str
    source: Path


class Library(NamedTuple):
    """One library with its files."""

    name: str
    version: str
    licence: str
    licence_texts: list[str]
    files: list[File]

    @property
    def compiled(self) -> bool:
        """Tell whether a part of it fits one kind of machine only."""
        return any(file.name.endswith(".so") for file in self.files)


def project() -> dict[str, object]:
    """Return the table ``[project]`` of pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as stream:
        table = tomllib.load(stream)["project"]
    assert isinstance(table, dict)
    return table


def canonical(name: str) -> str:
    """Return the name of a distribution as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required(names: list[str]) -> list[str]:
    """Return the distributions that are needed to use ``names``, sorted, without extras."""
    found: set[str] = set()
    waiting = [canonical(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found or name in NOT_CARRIED:
            continue
        found.add(name)
        for line in metadata.distribution(name).requires or []:
            wanted, _, condition = line.partition(";")
            match = re.match(r"[A-Za-z0-9._-]+", wanted)
            if match and _applies(condition):
                waiting.append(canonical(match[0]))
    return sorted(found)


def _applies(condition: str) -> bool:
    """Judge the conditions that occur: extras are not used; versions and systems are ours."""
    condition = condition.strip()
    if not condition:
        return True
    if "extra" in condition:
        return False
    match = re.fullmatch(r"python_(?:full_)?version (<|<=|>=|>) ['\"]([0-9.]+)['\"]", condition)
    if match:
        bound = tuple(map(int, match[2].split(".")))
        ours = sys.version_info[: len(bound)]
        return {"<": ours < bound, "<=": ours <= bound, ">=": ours >= bound, ">": ours > bound}[
            match[1]
        ]
    return "win32" not in condition and "Windows" not in condition


def libraries(names: list[str]) -> list[Library]:
    """Return the libraries that ``names`` (as in pyproject.toml) need, with themselves."""
    plain = [re.split(r"[<>=!~ \[;]", name)[0] for name in names]
    return [_library(metadata.distribution(name)) for name in required(plain)]


def used() -> set[str]:
    """Return the top-level names that some module of Sluice imports."""
    found: set[str] = set()
    for file in own_files():
        if file.name.endswith(".py"):
            for node in ast.walk(ast.parse(file.source.read_bytes())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.split(".")[0])
    return found


def used_libraries(names: list[str]) -> list[Library]:
    """Return those of ``names`` that are used, with what they need."""
    modules = used()
    wanted = []
    for name in names:
        plain = re.split(r"[<>=!~ \[;]", name)[0]
        tops = {file.name.split("/")[0] for file in _library(metadata.distribution(plain)).files}
        if modules & {top.removesuffix(".py") for top in tops}:
            wanted.append(name)
    return libraries(wanted)


def _library(found: metadata.Distribution) -> Library:
    files, texts = [], []
    for path in found.files or []:
        name = path.as_posix()
        source = Path(str(found.locate_file(path)))
        if re.search(r"\.dist-info/(licenses/|sboms/)?.*(LICEN|COPYING|NOTICE)", name, re.I):
            texts.append(source.read_text("utf-8", "replace"))
        if _carried(name):
            files.append(File(name, source))
    about = found.metadata
    licence = about.get("License-Expression") or about.get("License") or ""
    if not licence or "\n" in licence:
        kinds = [c for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
        licence = kinds[0].rpartition(":: ")[2] if kinds else "see the text"
    return Library(canonical(about["Name"]), found.version, licence, texts, sorted(files))


def _carried(name: str) -> bool:
    if name.startswith(("../", "/")) or "__pycache__" in name:
        return False
    if ".dist-info/" in name:
        # The version, and where filters are found as entry points.
        return name.endswith(("/METADATA", "/entry_points.txt"))
    return name.endswith((".py", ".so")) and "/tests/" not in name


def own_files() -> Iterator[File]:
    """Give the files of the package ``sluice`` that git knows or that are not ignored, sorted."""
    for directory, below, names in os.walk(SOURCE):
        below[:] = sorted(name for name in below if name != "__pycache__")
        for name in sorted(names):
            if not name.endswith((".pyc", "~", ".swp")):
                path = Path(directory, name)
                yield File("sluice/" + path.relative_to(SOURCE).as_posix(), path)


def epoch() -> int:
    """Return the time that everything built bears: SOURCE_DATE_EPOCH, or the changelog's last."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return int(given)
    changelog = (ROOT / "packaging/debian/changelog").read_text()
    date = re.search(r"^ -- .*>  (.*)$", changelog, re.M)
    assert date, "the changelog has no date"
    done = subprocess.run(
        ["date", "-u", "-d", date[1], "+%s"], check=True, capture_output=True, text=True
    )
    return int(done.stdout)
