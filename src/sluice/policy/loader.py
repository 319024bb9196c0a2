"""From directories to one flat list of rules (sections 3 and 7). Pure: files are given to it.

The loader follows directives and keeps the order; how files are found and read is the business of a
``Files`` object, so that a set can come from the disk, from memory, or from the disk with some
files replaced (what the admin API validates). It stops at the first fault in reading order, as the
engine must, or hands every fault to ``report`` and goes on, as the tools want.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from sluice.errors import PolicyError
from sluice.policy.parser import Directive, Item, Kind, Parsed, parse_policy, parse_service
from sluice.policy.problems import PolicyLoadError, PolicyProblem
from sluice.policy.rules import Action, Rule, Verb
from sluice.policy.tokens import ADMINVM, ANYVM, WILDCARD, Token
from sluice.wire.names import escape

DIRECTORIES = ("/run/qubes/policy.d", "/etc/qubes/policy.d")
LEGACY_DIRECTORY = "/etc/qubes-rpc/policy"
SUFFIX = ".policy"

MAX_DEPTH = 32
MAX_FILES = 20_000
MAX_RULES = 1_000_000

_FILE_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_.-")
_LEGACY_NAME = _FILE_NAME | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ+")
_LEGACY_IGNORED = (".rpmsave", ".rpmnew", ".swp")
_LINE_END = re.compile(rb"\r\n|\r|\n")


def _raise(error: PolicyError) -> None:
    raise error


class Files(Protocol):
    """Where policies are read from. Paths are texts; errors of reading are OSError."""

    def entries(self, directory: str) -> list[str]:
        """Return the names in a directory."""

    def is_file(self, path: str) -> bool:
        """Tell whether it is a regular file, symlinks followed."""

    def is_directory(self, path: str) -> bool:
        """Tell whether it is a directory, symlinks followed."""

    def resolve(self, path: str) -> str:
        """Return the path with every symlink followed and ``..`` collapsed."""

    def read(self, path: str) -> bytes:
        """Return the content of a file."""


class Loaded(NamedTuple):
    """What a set of files says: its rules in order, and what to warn the operator of."""

    rules: list[Rule]
    warnings: list[str]


def select(
    names: Sequence[str],
    directory: str,
    files: Files,
    fault: Callable[[PolicyError], None] = _raise,
) -> list[str]:
    """Return the names of a directory that count as policies, sorted (section 3.2).

    A name with the suffix but an illegal character is a PolicyLoadError: better no policy than one
    without the file that somebody meant to be in it. Where ``fault`` returns, it is left out.
    """
    chosen = []
    for name in sorted(names):
        if not name.endswith(SUFFIX) or name[0] == ".":
            continue
        path = f"{directory}/{name}"
        if not files.is_file(path):
            continue
        if not _FILE_NAME.issuperset(name):
            shown = escape(path)
            fault(PolicyLoadError(f"invalid filename: {shown}", file=shown))
            continue
        chosen.append(name)
    return chosen


class Loader:
    """Reads one set. Use it once: ``Loader(files).load()``."""

    def __init__(
        self,
        files: Files,
        directories: Sequence[str] = DIRECTORIES,
        *,
        legacy_directory: str = LEGACY_DIRECTORY,
        report: Callable[[PolicyError], None] | None = None,
        parse: Callable[[str, bytes, tuple[str, str] | None], Parsed] | None = None,
    ) -> None:
        """Take where to read. With ``report`` faults are handed to it and reading goes on.

        ``parse`` may replace ``parse_file``, to keep what was parsed before; without a report.
        """
        self._files = files
        self._directories = list(directories)
        self._legacy = legacy_directory
        self._report = report
        self._parse = parse or (parse_file if report is None else parse_whole)
        self._rules: list[Rule] = []
        self._warnings: list[str] = []
        self._chain: list[str] = []  # resolved paths of the files being read
        self._read = 0

    def load(self) -> Loaded:
        """Read the set. Raises PolicySyntaxError or PolicyLoadError, unless there is a report."""
        taken: dict[str, str] = {}
        for directory in self._directories:
            try:
                names = self._files.entries(directory)
            except OSError as error:
                self._fault(_unreadable(directory, error))
                continue
            for name in select(names, directory, self._files, self._fault):
                taken.setdefault(name, directory)
        for name in sorted(taken):
            path = f"{taken[name]}/{name}"
            self._file(path, self._files.resolve(path), taken[name], False, None, None)
        return Loaded(self._rules, self._warnings)

    def load_text(self, text: bytes, path: str, directory: str) -> Loaded:
        """Read ``text`` as if it were the only policy, at ``path``; includes are followed."""
        self._items(path, self._files.resolve(path), text, directory, False, None, None)
        return Loaded(self._rules, self._warnings)

    def _fault(self, error: PolicyError) -> None:
        if self._report is None:
            raise error
        self._report(error)

    def _file(
        self,
        path: str,
        resolved: str,
        directory: str,
        opted_in: bool,
        fixed: tuple[str, str] | None,
        cause: Directive | None,
    ) -> None:
        """Read the file at ``path`` in the place of ``cause``, or as a file of its own."""
        self._read += 1
        if self._read > MAX_FILES:
            raise PolicyLoadError(f"more than {MAX_FILES} files", file=path)
        try:
            content = self._files.read(path)
        except OSError as error:
            self._fault(_unreadable(path, error))
            return
        self._items(path, resolved, content, directory, opted_in, fixed, cause)

    def _items(
        self,
        path: str,
        resolved: str,
        content: bytes,
        directory: str,
        opted_in: bool,
        fixed: tuple[str, str] | None,
        cause: Directive | None,
    ) -> None:
        parsed = self._parse(path, content, fixed)
        if cause is not None and parsed.extensions and not opted_in:
            message = f"the included file uses extensions, this one does not: {path}"
            self._fault(cause.error(message))
            return
        if len(self._rules) + len(parsed.items) > MAX_RULES:
            raise PolicyLoadError(f"more than {MAX_RULES} rules", file=path)
        if parsed.plain:
            self._rules.extend(parsed.items)  # type: ignore[arg-type]  # that is what plain says
            return
        self._chain.append(resolved)
        for item in parsed.items:
            self._item(item, directory, parsed.extensions, fixed)
        self._chain.pop()

    def _item(
        self, item: Item, directory: str, opted_in: bool, fixed: tuple[str, str] | None
    ) -> None:
        if isinstance(item, Rule):
            self._rules.append(item)
        elif isinstance(item, PolicyProblem):
            self._fault(item)
        elif len(self._chain) > MAX_DEPTH:
            self._fault(item.error(f"includes are nested more than {MAX_DEPTH} deep"))
        elif item.kind is Kind.COMPAT:
            self._warnings.append(f"{item.file}:{item.line}: !compat-4.0 is deprecated")
            self._compat(item)
        else:
            self._include(item, directory, opted_in, fixed)

    def _include(
        self,
        directive: Directive,
        directory: str,
        opted_in: bool,
        fixed: tuple[str, str] | None,
    ) -> None:
        path = self._files.resolve(os.path.join(directory, directive.path))
        if directive.kind is Kind.INCLUDE_DIR:
            self._include_dir(directive, path, directory, opted_in)
            return
        if not self._files.is_file(path):
            self._fault(directive.error(f"not a file: {path}"))
            return
        if path in self._chain:
            self._fault(directive.error(f"include loop: {path} is being read already"))
            return
        if directive.kind is Kind.INCLUDE_SERVICE:
            fixed = (directive.service, directive.argument)
        self._file(path, path, directory, opted_in, fixed, directive)

    def _include_dir(self, directive: Directive, path: str, directory: str, opted_in: bool) -> None:
        if not self._files.is_directory(path):
            self._fault(directive.error(f"not a directory: {path}"))
            return
        try:
            names = self._files.entries(path)
        except OSError as error:
            self._fault(_unreadable(path, error))
            return
        for name in select(names, path, self._files, self._fault):
            inner = f"{path}/{name}"
            resolved = self._files.resolve(inner)
            if resolved in self._chain:
                self._fault(directive.error(f"include loop: {resolved} is being read already"))
                continue
            self._file(inner, resolved, directory, opted_in, None, directive)

    def _compat(self, directive: Directive) -> None:
        """Insert the legacy directory in the place of ``!compat-4.0`` (sections 8.2 and 8.3)."""
        try:
            names = self._files.entries(self._legacy)
        except OSError as error:
            self._fault(_unreadable(self._legacy, error))
            return
        for name, service, argument in sorted_legacy(names):
            path = f"{self._legacy}/{name}"
            if not self._files.is_file(path):
                continue
            resolved = self._files.resolve(path)
            if resolved in self._chain:
                self._fault(directive.error(f"include loop: {resolved} is being read already"))
                continue
            # Not an include in the sense of section 31: these files stand for themselves.
            self._file(path, resolved, self._legacy, True, (service, argument), None)
            if argument != WILDCARD:
                self._rules += implied_denials(service, argument, path)


def sorted_legacy(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return (name, service, argument) of the legacy files among ``names``, in order (8.2).

    Services ascend, arguments of a service ascend, the file without an argument comes last.
    """
    chosen = []
    for name in names:
        if name.startswith(".") or name.endswith(_LEGACY_IGNORED) or not name:
            continue
        if not _LEGACY_NAME.issuperset(name):
            continue
        service, plus, argument = name.partition("+")
        if service:
            chosen.append((name, service, plus + argument or WILDCARD))
    return sorted(chosen, key=lambda entry: (entry[1], entry[2] == WILDCARD, entry[2]))


def implied_denials(service: str, argument: str, path: str) -> list[Rule]:
    """Return the two rules that follow a legacy file with an argument (section 8.3)."""
    anyvm, adminvm = Token(ANYVM, (ANYVM,)), Token(ADMINVM, (ADMINVM,))
    deny = Action(Verb.DENY, notify=True)
    return [Rule(service, argument, anyvm, target, deny, path, None) for target in (anyvm, adminvm)]


def parse_file(path: str, content: bytes, fixed: tuple[str, str] | None) -> Parsed:
    """Decode and parse the content of a file; ``fixed`` is the call of a service-format file.

    Raises PolicyLoadError for bytes that are not UTF-8 (Q-2), marking the first bad one.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise next(_undecodable(path, content)) from None
    return parse_policy(text, path) if fixed is None else parse_service(text, path, *fixed)


def parse_whole(path: str, content: bytes, fixed: tuple[str, str] | None) -> Parsed:
    """Do what ``parse_file`` does, but with an item for each line that cannot be decoded.

    They come before all others, as the engine sees them first.
    """
    try:
        return parse_file(path, content, fixed)
    except PolicyLoadError:
        bad = list(_undecodable(path, content))
    parsed = parse_file(path, content.decode("utf-8", "replace").encode(), fixed)
    lines = {error.line for error in bad}
    good = [item for item in parsed.items if item.line not in lines]
    return Parsed([*bad, *good], parsed.extensions, plain=False)


def _undecodable(path: str, content: bytes) -> Iterator[PolicyLoadError]:
    # Line ends are never part of a longer character, so each line can be looked at by itself.
    for number, line in enumerate(_LINE_END.split(content), 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield PolicyLoadError(
                f"not valid UTF-8: byte 0x{line[error.start]:02x}",
                file=path,
                line=number,
                column=len(line[: error.start].decode("utf-8")) + 1,
                width=1,
                text=line.decode("utf-8", "replace"),
            )


def _unreadable(path: str, error: OSError) -> PolicyLoadError:
    return PolicyLoadError(f"cannot be read: {error.strerror or error}", file=path)
