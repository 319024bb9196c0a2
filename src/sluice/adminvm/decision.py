"""What policy answered, as a value; and the command lines that carry an allowed call out.

The text form is what a policy daemon or a policy program prints (docs/spec/wire-protocol.md
6.9.2); inside the AdminVM the same value is made from a ``Resolution`` without the detour. Imports
little: ``qrexec-client`` uses the commands.
"""

from __future__ import annotations

from sluice.errors import LocalError, RemoteError, SluiceError
from sluice.wire.messages import MAX_COMMAND
from sluice.wire.names import DOM0_NAMES

MAX_REPLY = 4095

_NEEDED = ("user", "target", "requested_target", "autostart")
_KNOWN = ("result", *_NEEDED, "target_uuid", "service", "policy_source")


class Refused(SluiceError):
    """The call is refused; the text is the cause for log and audit, never for the source."""

    exit_code = 126
    public = "Request refused"


class Decision:
    """One answer of policy: a refusal, or everything that is needed to carry the call out."""

    __slots__ = (
        "allowed",
        "autostart",
        "policy_source",
        "requested_target",
        "service",
        "target",
        "target_uuid",
        "unknown_keys",
        "user",
    )

    def __init__(
        self,
        allowed: bool,
        *,
        user: str = "",
        target: str = "",
        target_uuid: str | None = None,
        requested_target: str = "",
        autostart: bool = False,
        service: str | None = None,
        policy_source: str | None = None,
        unknown_keys: tuple[str, ...] = (),
    ) -> None:
        """Keep the fields; ``service`` and ``policy_source`` replace those asked for, if given."""
        self.allowed = allowed
        self.user = user
        self.target = target
        self.target_uuid = target_uuid
        self.requested_target = requested_target
        self.autostart = autostart
        self.service = service
        self.policy_source = policy_source
        self.unknown_keys = unknown_keys

    @property
    def selected(self) -> str:
        """The name by which the target is looked for: its UUID where there is one (6.9.6)."""
        return self.target_uuid or self.target

    @property
    def is_dom0(self) -> bool:
        """Whether the AdminVM itself answers the call (6.9.4)."""
        return self.target in DOM0_NAMES


def parse_reply(reply: bytes) -> Decision:
    """Read a reply of the policy daemon or program (6.9.2). Raises RemoteError if malformed."""
    if not reply or len(reply) > MAX_REPLY or b"\0" in reply:
        raise RemoteError(f"a policy reply of {len(reply)} bytes is empty, too long or has a NUL")
    values: dict[str, str] = {}
    unknown: list[str] = []
    body = reply[:-1] if reply.endswith(b"\n") else reply
    for line in body.split(b"\n"):
        raw_key, equals, raw_value = line.partition(b"=")
        if not equals:
            raise RemoteError("a policy reply has a line without '='")
        key = raw_key.decode("utf-8", "surrogateescape")
        if key not in _KNOWN:
            unknown.append(key)
            continue
        if key in values:
            raise RemoteError(f"a policy reply has {key} twice")
        values[key] = raw_value.decode("utf-8", "surrogateescape")
    return _decide(values, tuple(unknown))


def _decide(values: dict[str, str], unknown: tuple[str, ...]) -> Decision:
    result = values.get("result")
    given = [key for key in _NEEDED if key in values]
    if result == "deny":
        if given:
            raise RemoteError(f"a policy reply denies and gives {given[0]}")
        return Decision(False, unknown_keys=unknown)
    if result != "allow":
        raise RemoteError("a policy reply has no valid result")
    if len(given) < len(_NEEDED):
        missing = next(key for key in _NEEDED if key not in values)
        raise RemoteError(f"a policy reply allows without {missing}")
    if values["autostart"] not in ("True", "False"):
        raise RemoteError("a policy reply has an autostart that is neither True nor False")
    return Decision(
        True,
        user=values["user"],
        target=values["target"],
        target_uuid=values.get("target_uuid"),
        requested_target=values["requested_target"],
        autostart=values["autostart"] == "True",
        service=values.get("service"),
        policy_source=values.get("policy_source"),
        unknown_keys=unknown,
    )


def descriptor(service: str) -> str:
    """Return ``service`` with its ``+``, which calls between domains always have (6.9.4)."""
    return service if "+" in service else service + "+"


def command_for_dom0(service: str, source: str, requested_target: str) -> bytes:
    """Return the command of a call that the AdminVM answers, with its NUL (6.9.5)."""
    kind = "name"
    if requested_target.startswith("@"):
        kind, requested_target = "keyword", requested_target[1:]
    text = f"QUBESRPC {descriptor(service)} {source} {kind} {requested_target}"
    return _checked(text)


def command_for_vm(user: str, service: str, source: str) -> bytes:
    """Return the command of a call that a domain answers, with its NUL (6.9.6).

    Raises LocalError where it is longer than the protocol allows.
    """
    return _checked(f"{user}:QUBESRPC {descriptor(service)} {source}")


def _checked(text: str) -> bytes:
    command = text.encode("utf-8", "surrogateescape") + b"\0"
    if not 2 <= len(command) <= MAX_COMMAND or b"\0" in command[:-1]:
        raise LocalError(f"a command of {len(command)} bytes cannot be sent")
    return command
