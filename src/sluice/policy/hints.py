"""What to write instead: a line of advice for the errors of a policy, and for misspelt names.

The texts of errors are fixed, for programs match on them (section 4.3), and they say what is wrong,
not how it should be. These lines do, for whoever writes a first rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from sluice.errors import PolicyError
from sluice.policy.rules import OPT_IN
from sluice.policy.system_info import SystemInfo

_CHARACTERS = "letters, digits, - . _"
_USAGE = {
    "!include": "!include PATH",
    "!include-dir": "!include-dir PATH",
    "!include-service": "!include-service SERVICE ARGUMENT PATH",
    "!compat-4.0": "!compat-4.0 stands alone",
}
_OPTIONS = {
    "Allow": "allow takes target= user= notify= autostart=",
    "Ask": "ask takes target= default_target= user= notify= autostart=",
    "Deny": "deny takes notify= alone",
}


def hint(error: PolicyError) -> str:
    """Return advice for an error; empty where its text says it all."""
    for pattern, advice in _ADVICE:
        match = pattern.match(error.message)
        if match:
            return advice if isinstance(advice, str) else advice(match, getattr(error, "text", ""))
    return ""


def did_you_mean(name: str, info: SystemInfo) -> str:
    """Return `` (did you mean NAME?)`` for a domain that does not exist; empty if none is alike."""
    import difflib  # only for those who misspelt

    alike = difflib.get_close_matches(name, list(info.domains), 3)
    return f" (did you mean {', '.join(alike)}?)" if alike else ""


def _service(match: re.Match[str], line: str) -> str:
    if "+" in match[1]:
        return "the argument has a column of its own: SERVICE +ARGUMENT"
    return f"{_CHARACTERS}, or * for every service"


def _action(match: re.Match[str], line: str) -> str:
    if "," in match[1]:
        return "options are separated by spaces: allow target=NAME"
    return "allow, ask or deny, in lower case"


def _word(match: re.Match[str], line: str) -> str:
    if "#" in line[: line.find(match[1]) + 1]:
        return "a comment needs a line of its own, with # as its first character"
    return "options are KEY=VALUE"


def _options(match: re.Match[str], line: str) -> str:
    extended = re.search(r"'(?:via|limit|reason)=", match[2])
    if extended and not (match[1] == "Deny" and "'reason=" not in match[2]):
        return f"via=, limit= and reason= need {OPT_IN} as the very first line of the file"
    return _OPTIONS[match[1]]


def _parameters(match: re.Match[str], line: str) -> str:
    return _USAGE.get(line.split()[0] if line.strip() else "", "")


_Advice = str | Callable[[re.Match[str], str], str]
_DOMAIN = "a name, uuid:UUID, *, @anyvm, @adminvm, @tag:TAG, @type:CLASS"
_ADVICE: list[tuple[re.Pattern[str], _Advice]] = [
    (re.compile(pattern, re.DOTALL), advice)
    for pattern, advice in (
        (
            r"wrong number of fields",
            "a rule is SERVICE ARGUMENT SOURCE TARGET ACTION, ARGUMENT * for any "
            "(in service format SOURCE TARGET ACTION)",
        ),
        (r"service '(.*)' contains", _service),
        (r"argument '.*' contains", f"{_CHARACTERS} + after a +, or * for any argument"),
        (r"argument '.*' does not start", "+ARGUMENT, + alone for none, or * for any"),
        (r"invalid source token", f"a source is {_DOMAIN}"),
        (
            r"invalid target token",
            f"a target is {_DOMAIN}, @default, @dispvm, @dispvm:NAME or @dispvm:@tag:TAG",
        ),
        (
            r"invalid (?:empty )?redirect token",
            "one domain: a name, uuid:UUID, @adminvm, @dispvm or @dispvm:NAME",
        ),
        (r"invalid action: (.*)", _action),
        (r"invalid action parameter syntax: '(.*)'", _word),
        (r"invalid parameters for action (\w+): (.*)", _options),
        (r"allow action for @default", "add target=NAME: where a call goes that names no target"),
        (r"invalid directive", f"a line with ! is one of {', '.join(_USAGE)}"),
        (r"invalid number of params", _parameters),
        (r"not a (?:file|directory)", "a relative path begins at the policy directory"),
        (r"invalid filename", "small letters, digits, _ . - and the suffix .policy"),
    )
]
