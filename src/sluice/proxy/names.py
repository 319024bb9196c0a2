"""The name of a proxied call: ``CHAIN+TARGET+SERVICE[+ARGUMENT]`` (docs/spec/proxy.md 1).

It is the argument of the service ``qrexec-proxy`` and comes from the source domain, so nothing of
it is used before ``parse_call_name`` has looked at every character. Imports next to nothing: the
program form of the proxy starts for each call.
"""

from __future__ import annotations

from sluice.errors import LocalError
from sluice.wire.names import SAFE, escape, is_valid_domain_name

PROXY_SERVICE = "qrexec-proxy"
MAX_CHAIN_NAME = 64
# wire-protocol.md 9.1: names of services.
MAX_SERVICE_NAME = 255
MAX_ARGUMENT = 65536
_SERVICE = SAFE
# What an argument may hold: what the AdminVM lets through in a service descriptor (6.8 step 7).
_ARGUMENT = SAFE + b"+"


class CallNameError(LocalError):
    """The source asked for something that is no call; the text is escaped and fit for the log."""


class CallName:
    """A call that a source asked for, every part validated.

    ``target`` is spelt with ``@`` for keywords, whatever the source wrote. ``argument`` is None
    where the name had no third ``+``; the empty string is an argument.
    """

    __slots__ = ("argument", "chain", "service", "target")

    def __init__(self, chain: str, target: str, service: str, argument: str | None) -> None:
        """Keep the four parts; ``parse_call_name`` is what checks them."""
        self.chain = chain
        self.target = target
        self.service = service
        self.argument = argument

    @property
    def descriptor(self) -> str:
        """``SERVICE`` or ``SERVICE+ARGUMENT``: what the far end is asked for."""
        return self.service if self.argument is None else f"{self.service}+{self.argument}"

    def __repr__(self) -> str:
        """Show the parts, for tests and debuggers."""
        return f"CallName({self.chain!r}, {self.target!r}, {self.descriptor!r})"


def is_valid_chain_name(name: str) -> bool:
    """Tell whether ``name`` can name a chain: 1 to 64 of ``A-Z a-z 0-9 _ . -``."""
    raw = name.encode("utf-8", "surrogateescape")
    return 0 < len(raw) <= MAX_CHAIN_NAME and not raw.translate(None, SAFE)


def is_valid_service_name(name: str) -> bool:
    """Tell whether ``name`` can name a service: 1 to 255 safe characters, not ``.`` or ``..``."""
    raw = name.encode("utf-8", "surrogateescape")
    if not 0 < len(raw) <= MAX_SERVICE_NAME or name in (".", ".."):
        return False
    return not raw.translate(None, _SERVICE)


def parse_target(untrusted_target: str) -> str:
    """Return the target with ``@`` for keywords; raise CallNameError where it is illegal.

    A domain name cannot begin with ``-``, so the two spellings of a keyword cannot be mistaken
    for a name.
    """
    if is_valid_domain_name(untrusted_target):
        return untrusted_target
    if untrusted_target in ("@default", "-default", "@dispvm", "-dispvm"):
        return "@" + untrusted_target[1:]
    if untrusted_target.startswith(("@dispvm:", "-dispvm-")):
        template = untrusted_target[len("@dispvm:") :]
        if is_valid_domain_name(template):
            return "@dispvm:" + template
    raise CallNameError(f"illegal target '{escape(untrusted_target)}'")


def parse_call_name(untrusted_name: str | bytes, *, own_name: str | None = None) -> CallName:
    """Take the argument of a ``qrexec-proxy`` call apart (section 1).

    ``own_name`` is the proxy's own domain, where it is known: a call to ``qrexec-proxy`` there
    would be a loop. Raises CallNameError, with a text that is fit for a log.
    """
    if isinstance(untrusted_name, bytes):
        untrusted_name = untrusted_name.decode("utf-8", "surrogateescape")
    # A character may be one byte or more; the bound is on bytes.
    if len(untrusted_name.encode("utf-8", "surrogateescape")) > MAX_ARGUMENT:
        raise CallNameError(f"argument longer than {MAX_ARGUMENT} bytes")
    parts = untrusted_name.split("+", 2)
    if len(parts) < 3:
        raise CallNameError(
            f"'{escape(untrusted_name)}' is not of the form CHAIN+TARGET+SERVICE[+ARGUMENT]"
        )
    untrusted_chain, untrusted_target, untrusted_call = parts
    if not is_valid_chain_name(untrusted_chain):
        raise CallNameError(f"illegal chain name '{escape(untrusted_chain)}'")
    target = parse_target(untrusted_target)
    untrusted_service, plus, untrusted_argument = untrusted_call.partition("+")
    if not is_valid_service_name(untrusted_service):
        raise CallNameError(f"illegal service name '{escape(untrusted_service)}'")
    if untrusted_argument.encode("utf-8", "surrogateescape").translate(None, _ARGUMENT):
        raise CallNameError(f"illegal character in argument '{escape(untrusted_argument)}'")
    if untrusted_service == PROXY_SERVICE and own_name is not None and target == own_name:
        raise CallNameError("a call of the proxy to itself")
    argument = untrusted_argument if plus else None
    return CallName(untrusted_chain, target, untrusted_service, argument)


def is_valid_source(name: str) -> bool:
    """Tell whether ``name`` can be a source: a domain name (``dom0`` is one)."""
    return is_valid_domain_name(name)
