"""The last columns of a rule: action word and options, to an Action (sections 4.3, 6 and 31).

``parse_action`` finds all faults of a rule's options, each with its place, in the checking order of
section 4.3, so that the first one is the one that the engine cites. ``quick_action`` does the same
for options that have none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sluice.policy.rules import Action, Hop, Limit, Verb
from sluice.policy.tokens import DISPVM_PREFIX, Column, TokenError, check
from sluice.wire.names import is_valid_domain_name

MAX_CALLS = 100_000
MAX_SECONDS = 366 * 86400

_YES_NO = {"yes": True, "no": False}
_VERBS = {verb.value: verb for verb in Verb}
_ALLOWED: dict[Verb, frozenset[str]] = {
    Verb.ALLOW: frozenset({"target", "user", "notify", "autostart"}),
    Verb.ASK: frozenset({"target", "default_target", "user", "notify", "autostart"}),
    Verb.DENY: frozenset({"notify"}),
}
_EXTENSIONS = {"via": (Verb.ALLOW, Verb.ASK), "limit": (Verb.ALLOW, Verb.ASK)}
_REASON = "reason="
_CHAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LIMIT = re.compile(r"([0-9]{1,9})/([0-9]{1,9})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Word(NamedTuple):
    """One word of a line and the character that it begins at, counted from 0."""

    text: str
    start: int


Report = Callable[[str, int, int], None]
"""Takes a message, the offset of what is wrong in the line, and its width."""


def parse_action(
    words: Sequence[Word], line: str, report: Report, *, extensions: bool
) -> Action | None:
    """Turn the action word and the options of ``line`` into an Action.

    Every fault is reported in checking order (rows 9 to 14 of section 4.3); None if there was one.
    """
    faults = 0

    def fault(message: str, start: int, width: int) -> None:
        nonlocal faults
        faults += 1
        report(message, start, width)

    verb = _VERBS.get(words[0].text)
    if verb is None:
        fault(f"invalid action: {words[0].text}", words[0].start, len(words[0].text))
        return None
    options, reason = _cut_reason(words[1:], line) if extensions else (list(words[1:]), None)
    given = _pairs(options, fault)
    flags = {key: _flag(key, given[key], fault) for key in ("notify", "autostart") if key in given}
    allowed = _ALLOWED[verb]
    if extensions:
        allowed = allowed | {key for key, verbs in _EXTENSIONS.items() if verb in verbs}
    _reject_others(given, allowed, verb, options, fault)
    for key in ("target", "default_target"):
        if key in given and key in allowed:
            value = given[key]
            try:
                check(value.text, Column.REDIRECT)
            except TokenError as error:
                fault(str(error), value.start + error.offset, error.width)
    hops = _hops(given["via"], fault) if "via" in given and "via" in allowed else ()
    limit = _limit(given["limit"], fault) if "limit" in given and "limit" in allowed else None
    if faults:
        return None
    texts = {key: word.text for key, word in given.items()}
    return Action(
        verb,
        target=texts.get("target"),
        default_target=texts.get("default_target"),
        user=texts.get("user") or None,
        notify=flags.get("notify", verb is Verb.DENY),
        autostart=flags.get("autostart", True),
        via=hops,
        limit=limit,
        reason=reason,
    )


def quick_action(rest: str) -> Action | None:
    """Return the Action for the text of action word and options, or None if in any doubt.

    For lines without extensions and without faults, at a tenth of the cost of ``parse_action``.
    """
    word, *options = rest.split()
    verb = _VERBS.get(word)
    if verb is None:
        return None
    target = default = user = notify = autostart = None
    for option in options:
        key, _, value = option.partition("=")
        if key == "notify" and notify is None:
            notify = _YES_NO.get(value)
            if notify is None:
                return None
        elif verb is Verb.DENY:
            return None
        elif key == "target" and target is None:
            check(value, Column.REDIRECT)
            target = value
        elif key == "user" and user is None and "=" in option:
            user = value
        elif key == "autostart" and autostart is None:
            autostart = _YES_NO.get(value)
            if autostart is None:
                return None
        elif key == "default_target" and default is None and verb is Verb.ASK:
            check(value, Column.REDIRECT)
            default = value
        else:
            return None
    if notify is None:
        notify = verb is Verb.DENY
    fields = (verb, target, default, user or None, notify, autostart is not False, (), None, None)
    return tuple.__new__(Action, fields)


def _cut_reason(words: Sequence[Word], line: str) -> tuple[list[Word], str | None]:
    # reason= takes the rest of the line as it stands, so whatever follows it is no option.
    for number, word in enumerate(words):
        if word.text.startswith(_REASON):
            return list(words[:number]), line[word.start + len(_REASON) :].strip() or None
    return list(words), None


def _pairs(words: Sequence[Word], fault: Report) -> dict[str, Word]:
    given: dict[str, Word] = {}
    for word in words:
        key, equals, value = word.text.partition("=")
        if not equals:
            fault(f"invalid action parameter syntax: '{word.text}'", word.start, len(word.text))
        elif key in given:
            fault(f"parameter given twice: '{key}'", word.start, len(word.text))
        else:
            given[key] = Word(value, word.start + len(key) + 1)
    return given


def _flag(key: str, value: Word, fault: Report) -> bool:
    if value.text not in _YES_NO:
        message = f"'{key}' is '{value.text}', but can be only 'yes' or 'no'"
        fault(message, value.start, len(value.text))
    return _YES_NO.get(value.text, False)


def _reject_others(
    given: dict[str, Word],
    allowed: frozenset[str],
    verb: Verb,
    options: Sequence[Word],
    fault: Report,
) -> None:
    # One report for all of them: the canonical text lists every option word of the rule.
    wrong = [key for key in given if key not in allowed]
    if wrong:
        name = verb.value.capitalize()
        message = f"invalid parameters for action {name}: {[word.text for word in options]}"
        start = given[wrong[0]].start - len(wrong[0]) - 1
        fault(message, start, len(wrong[0]) + 1 + len(given[wrong[0]].text))


def _hops(value: Word, fault: Report) -> tuple[Hop, ...]:
    hops = []
    start = value.start
    for text in value.text.split(","):
        proxy, plus, chain = text.partition("+")
        name = proxy.removeprefix(DISPVM_PREFIX)
        if not plus or not is_valid_domain_name(name):
            fault(f"invalid via: '{text}' is not DOMAIN+CHAIN", start, max(1, len(text)))
        elif not _CHAIN.fullmatch(chain):
            fault(f"invalid chain in via: '{chain}'", start + len(proxy) + 1, max(1, len(chain)))
        else:
            hops.append(Hop(proxy, chain))
        start += len(text) + 1
    return tuple(hops)


def _limit(value: Word, fault: Report) -> Limit | None:
    match = _LIMIT.fullmatch(value.text)
    if match is None:
        message = f"invalid limit: '{value.text}' is not N/DURATION, such as 10/1h"
        fault(message, value.start, max(1, len(value.text)))
        return None
    calls, seconds = int(match[1]), int(match[2]) * _SECONDS[match[3]]
    if not 1 <= calls <= MAX_CALLS or not 1 <= seconds <= MAX_SECONDS:
        message = f"invalid limit: '{value.text}' (1 to {MAX_CALLS} calls, 1s to 366d)"
        fault(message, value.start, len(value.text))
        return None
    return Limit(calls, seconds, value.text)
