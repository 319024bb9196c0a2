"""From the text of one policy file to rules and directives (sections 4, 7 and 8.1). No I/O.

A file is a list of lines, and each line stands alone: a rule, a directive, a comment. Two passes
share the work. The *quick* one splits a line into five fields and looks each up among those that
were found good before: ten thousand lines use a few hundred words. Whatever is not plainly good
goes to the *careful* one, which checks everything in the order of section 4.3 and reports every
fault with its column. Only the careful one refuses; a test holds that the two agree.

Directives come back as values; following them is the loader's work. Faults come back as values too,
in their place in the list, so that the engine can stop at the first in reading order and the tools
can show all.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Collection, Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from sluice.policy.options import Word, parse_action, quick_action
from sluice.policy.problems import PolicyProblem, PolicySyntaxError
from sluice.policy.rules import OPT_IN, Action, Rule, Verb
from sluice.policy.tokens import DEFAULT, WILDCARD, Column, Token, TokenError, recognise

_WORD = re.compile(r"\S+")
_SERVICE_BAD = re.compile(r"[^A-Za-z0-9._-]")
_ARGUMENT_BAD = re.compile(r"[^A-Za-z0-9+._-]")


class Kind(Enum):
    """The directives of section 7, each with the number of its parameters."""

    INCLUDE = "!include"
    INCLUDE_DIR = "!include-dir"
    INCLUDE_SERVICE = "!include-service"
    COMPAT = "!compat-4.0"


_PARAMETERS = {Kind.INCLUDE: 1, Kind.INCLUDE_DIR: 1, Kind.INCLUDE_SERVICE: 3, Kind.COMPAT: 0}
_KINDS = {kind.value: kind for kind in Kind}


class Directive(NamedTuple):
    """A directive that stands where what it names is to be inserted."""

    kind: Kind
    path: str
    service: str
    """Of ``!include-service``, and of an include in a service-format file."""
    argument: str
    file: str
    line: int
    text: str
    """The line as it stands in the file, for the marks of errors."""
    start: int
    """Where in it the path begins, or the directive if it has none."""

    def error(self, message: str) -> PolicySyntaxError:
        """Return an error at this directive, with its path marked."""
        return PolicySyntaxError(
            message,
            file=self.file,
            line=self.line,
            column=self.start + 1,
            width=len(self.path or self.kind.value),
            text=self.text,
        )


Item = Rule | Directive | PolicyProblem


class Parsed(NamedTuple):
    """One file, parsed: its rules, directives and faults in the order of the file."""

    items: list[Item]
    extensions: bool
    """Whether the file opted into the extensions of section 31."""
    plain: bool
    """Whether all items are rules."""


def split_lines(text: str) -> list[str]:
    """Split at ``\\n``, ``\\r`` and ``\\r\\n``, and at nothing else (section 4.1)."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.split("\n")


def opts_in(text: str) -> bool:
    """Tell whether the very first line of the file is the one that opts in (section 31)."""
    end = len(OPT_IN)
    return text.startswith(OPT_IN) and not split_lines(text[end : end + 4096])[0].strip()


def parse_policy(text: str, file: str) -> Parsed:
    """Parse a file of the current format, five columns a line (section 4)."""
    return _Parser(file, extensions=opts_in(text)).parse(text)


def parse_service(text: str, file: str, service: str, argument: str) -> Parsed:
    """Parse a service-format file for a service and argument (section 8.1)."""
    return _Parser(file, extensions=opts_in(text), fixed=(service, argument)).parse(text)


def check_call(service: Word, argument: Word) -> Iterator[tuple[str, int, int]]:
    """Yield the faults of a service and argument column: rows 2 to 5 of section 4.3."""
    for word, pattern, what in (
        (service, _SERVICE_BAD, "service"),
        (argument, _ARGUMENT_BAD, "argument"),
    ):
        bad = [] if word.text == WILDCARD else list(pattern.finditer(word.text))
        if bad:
            characters = tuple(sorted({match[0] for match in bad}))
            message = f"{what} '{word.text}' contains invalid characters: {characters}"
            yield message, word.start + bad[0].start(), 1
    if argument.text != WILDCARD and argument.text[:1] != "+":
        message = f"argument '{argument.text}' does not start with +"
        yield message, argument.start, len(argument.text)
    elif service.text == WILDCARD and argument.text != WILDCARD:
        yield "only * argument allowed for * service", argument.start, len(argument.text)


def _calls_are_legal(services: Collection[str], arguments: Collection[str]) -> bool:
    """Tell whether each is legal by itself: rows 2 to 4 of section 4.3, all at once."""
    named = [service for service in services if service != WILDCARD]
    given = [argument for argument in arguments if argument != WILDCARD]
    return not (
        _SERVICE_BAD.search("".join(named))
        or _ARGUMENT_BAD.search("".join(given))
        or any(argument[0] != "+" for argument in given)
    )


def _words(line: str) -> list[Word]:
    return [Word(match[0], match.start()) for match in _WORD.finditer(line)]


@contextlib.contextmanager
def not_collecting() -> Iterator[None]:
    """Keep the cyclic garbage collector from running: many tuples are made here, and no cycle.

    Otherwise it looks several times through all that the process has, at up to half of the cost.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Parser:
    """Parses one file; keeps the words that were found good."""

    def __init__(
        self, file: str, *, extensions: bool, fixed: tuple[str, str] | None = None
    ) -> None:
        self.file = file
        self.extensions = extensions
        self.fixed = fixed
        self.items: list[Item] = []
        self.sources: dict[str, Token] = {}
        self.targets: dict[str, Token] = {}
        self.actions: dict[str, Action] = {}

    def parse(self, text: str) -> Parsed:
        lines = split_lines(text)
        if self.fixed is None:
            with not_collecting():
                self._parse_rules(lines)
        else:
            for number, line in enumerate(lines, 1):
                self._service_line(line, number, *self.fixed)
        plain = all(type(item) is Rule for item in self.items)
        return Parsed(self.items, self.extensions, plain)

    def _parse_rules(self, lines: Sequence[str]) -> None:
        """Parse the lines, trusting services and arguments at first: they are checked all at once.

        If one is wrong everything is done again, checking each. Most files are not wrong.
        """
        for trusting in (True, False):
            services: set[str] = set()
            arguments: set[str] = set()
            self.items.clear()
            self._quick_pass(lines, services, arguments, trusting)
            if _calls_are_legal(services, arguments):
                return

    def _quick_pass(
        self, lines: Sequence[str], services: set[str], arguments: set[str], trusting: bool
    ) -> None:
        sources, targets, actions = self.sources, self.targets, self.actions
        file, items, new = self.file, self.items, tuple.__new__
        for number, line in enumerate(lines, 1):
            fields = line.split(None, 4)
            if not fields:
                continue
            try:
                service, argument, source, target, rest = fields
                if rest not in actions:
                    action = quick_action(rest)
                    if action is not None:
                        actions[rest] = action
                if source not in sources:
                    self._learn_token(source, Column.SOURCE, sources)
                if target not in targets:
                    self._learn_token(target, Column.TARGET, targets)
                action = actions[rest]
                # Not Rule(...): its generated constructor costs as much as all the rest.
                rule = (service, argument, sources[source], targets[target], action, file, number)
            except (ValueError, KeyError):
                self._careful_line(line, fields, number)
                continue
            if (
                service[0] not in "#!"
                and (service != WILDCARD or argument == WILDCARD)
                and (target != DEFAULT or action.target or action.verb is not Verb.ALLOW)
                and (trusting or _calls_are_legal((service,), (argument,)))
            ):
                services.add(service)
                arguments.add(argument)
                items.append(new(Rule, rule))
            else:
                self._careful_line(line, fields, number)

    def _learn_token(self, word: str, column: Column, known: dict[str, Token]) -> None:
        token = recognise(word, column, extensions=self.extensions)
        if DEFAULT not in token.parts or token.text == DEFAULT:
            # A conjunction with @default would escape the quick pass's check of row 15.
            known[word] = token

    def _careful_line(self, line: str, fields: list[str], number: int) -> None:
        if fields[0][0] == "#":
            return
        words = _words(line)
        if fields[0][0] == "!":
            self._directive(words, line, number)
            return
        if len(words) < 5:
            self._fault("wrong number of fields", number, line, words[0].start, 0)
            return
        before = len(self.items)
        for fault in check_call(words[0], words[1]):
            self._fault(fault[0], number, line, fault[1], fault[2])
        self._rule(words[0].text, words[1].text, words[2:], line, number, before)

    def _rule(
        self,
        service: str,
        argument: str,
        words: list[Word],
        line: str,
        number: int,
        before: int,
        *,
        read: str | None = None,
    ) -> None:
        """Check source, target, action and options (rows 6 to 15); add the rule if all is well.

        ``read`` is the line with the replacements of the service format, where there are any.
        """

        def report(message: str, start: int, width: int) -> None:
            self._fault(message, number, line, start, width)

        tokens = []
        for word, column in zip(words, (Column.SOURCE, Column.TARGET), strict=False):
            try:
                tokens.append(recognise(word.text, column, extensions=self.extensions))
            except TokenError as error:
                report(str(error), word.start + error.offset, error.width)
        text = line if read is None else read
        action = parse_action(words[2:], text, report, extensions=self.extensions)
        if len(self.items) > before or action is None:
            return
        source, target = tokens
        if action.verb is Verb.ALLOW and action.target is None and DEFAULT in target.parts:
            message = "allow action for @default rule must specify target= option"
            report(message, words[1].start, len(words[1].text))
            return
        self.items.append(Rule(service, argument, source, target, action, self.file, number))

    def _directive(self, words: list[Word], line: str, number: int) -> None:
        kind = _KINDS.get(words[0].text)
        if kind is None:
            self._fault("invalid directive", number, line, words[0].start, len(words[0].text))
            return
        if len(words) - 1 != _PARAMETERS[kind]:
            extra = words[min(len(words) - 1, _PARAMETERS[kind] + 1)]
            self._fault("invalid number of params", number, line, extra.start, len(extra.text))
            return
        service = argument = ""
        if kind is Kind.INCLUDE_SERVICE:
            faults = list(check_call(words[1], words[2]))
            for fault in faults:
                self._fault(fault[0], number, line, fault[1], fault[2])
            if faults:
                return
            service, argument = words[1].text, words[2].text
        last = words[-1]
        path = "" if kind is Kind.COMPAT else last.text
        place = (self.file, number, line, last.start)
        self.items.append(Directive(kind, path, service, argument, *place))

    def _service_line(self, line: str, number: int, service: str, argument: str) -> None:
        stripped = line.strip()
        if not stripped or stripped[0] == "#":
            return
        # Each replacement keeps the length, so that columns are those of the file (section 8.1).
        text = line.replace("$include:", "!include ").replace("$", "@").replace(",", " ")
        words = _words(text)
        if text[len(line) - len(line.lstrip())] == "!":
            if words[0].text != Kind.INCLUDE.value:
                self._fault("invalid directive", number, line, words[0].start, len(words[0].text))
            elif len(words) != 2:
                start, width = words[0].start, len(words[0].text)
                self._fault("invalid number of params", number, line, start, width)
            else:
                path, start = words[1]
                place = (self.file, number, line, start)
                self.items.append(Directive(Kind.INCLUDE, path, service, argument, *place))
        elif len(words) < 3:
            start = words[0].start if words else 0
            self._fault("wrong number of fields", number, line, start, 0)
        else:
            self._rule(service, argument, words, line, number, len(self.items), read=text)

    def _fault(self, message: str, number: int, line: str, start: int, width: int) -> None:
        column = start + 1 if width else 0
        self.items.append(
            PolicySyntaxError(
                message, file=self.file, line=number, column=column, width=width, text=line
            )
        )
