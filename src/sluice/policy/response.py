"""What an answer means for the one who carries the call out, and its text (sections 13.1 to 15)."""

from __future__ import annotations

from typing import NamedTuple

from sluice.policy.resolution import Allow, Ask, Cause, Deny
from sluice.policy.system_info import SystemInfo, is_dom0
from sluice.policy.tokens import DISPVM_PREFIX

DENIED = "result=deny"
ALLOWED = "result=allow"


class Direction(NamedTuple):
    """Where an allowed call really goes: the fields of the answer's text (section 14)."""

    user: str
    """The account, ``DEFAULT`` where the rule names none."""
    target: str
    """``dom0``, a name, ``uuid:...``, or ``@dispvm:X``; of a RemoteVM its relay."""
    target_uuid: str | None
    """``uuid:...`` or ``@dispvm:uuid:...``; None for dom0 and domains without a UUID."""
    autostart: bool
    requested_target: str
    service: str | None
    """Replaces service and argument; only for a RemoteVM."""
    policy_source: str | None
    """Replaces the caller's name; only where a relay presented a source."""
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the text of section 14, without a final newline."""
        lines = [f"user={self.user}", ALLOWED, f"target={self.target}"]
        if self.target_uuid is not None:
            lines.append(f"target_uuid={self.target_uuid}")
        lines += [f"autostart={self.autostart}", f"requested_target={self.requested_target}"]
        if self.service is not None:
            lines.append(f"service={self.service}")
        if self.policy_source is not None:
            lines.append(f"policy_source={self.policy_source}")
        return "\n".join(lines)


def direct(allow: Allow, info: SystemInfo) -> Direction | Deny:
    """Turn an allowed call into where it goes; a Deny for loops and incomplete RemoteVMs."""
    target = allow.target
    if target == allow.source:
        return allow.deny(Cause.LOOPBACK, f"source and target are the same: {target}")
    requested_source = allow.source if allow.request.requested_source else None
    user = allow.user or "DEFAULT"
    common = (allow.autostart, allow.requested_target)
    if is_dom0(target):
        return Direction(user, "dom0", None, *common, None, None)
    if target.startswith(DISPVM_PREFIX):
        base = info.get(target[len(DISPVM_PREFIX) :])
        if base is None:
            message = (
                f"{target[len(DISPVM_PREFIX) :]} is not known: no disposable can be based on it"
            )
            return allow.deny(Cause.NOT_TEMPLATE, message)
        uuid = None if base.uuid is None else f"@dispvm:uuid:{base.uuid}"
        return Direction(user, target, uuid, *common, None, requested_source)
    domain = info.get(target)
    if domain is None:
        return allow.deny(Cause.NO_TARGET, f"{target} does not exist")
    if domain.klass == "RemoteVM":
        return _relay(allow, info)
    uuid = None if domain.uuid is None else f"uuid:{domain.uuid}"
    return Direction(user, target, uuid, *common, None, requested_source)


def _relay(allow: Allow, info: SystemInfo) -> Direction | Deny:
    """Direct a call of a RemoteVM to its relay (section 13.1)."""
    remote = info.get(allow.target)
    assert remote is not None
    relay = info.get(remote.relayvm) if remote.relayvm else None
    if relay is None:
        return allow.deny(Cause.NO_RELAY, f"RemoteVM {allow.target} has no relay")
    if not remote.transport_rpc:
        return allow.deny(Cause.NO_TRANSPORT, f"RemoteVM {allow.target} has no transport service")
    warnings: tuple[str, ...] = ()
    if allow.user:
        warnings = (f"user={allow.user} has no effect: {allow.target} is a RemoteVM",)
    request = allow.request
    service = f"{remote.transport_rpc}+{allow.requested_target}+{request.service}{request.argument}"
    return Direction(
        user="DEFAULT",
        target=relay.name,
        target_uuid=None if relay.uuid is None else f"uuid:{relay.uuid}",
        autostart=allow.autostart,
        requested_target=allow.requested_target,
        service=service,
        policy_source=allow.source if request.requested_source else None,
        warnings=warnings,
    )


def assume_yes(ask: Ask) -> Allow | Deny:
    """Answer a question with "yes" and the normalised request target (section 15, Q-14)."""
    return ask.chosen(ask.requested_target)


def encode(resolution: Allow | Deny | Direction, info: SystemInfo) -> str:
    """Return the full response text of a settled call (section 14), without a final newline."""
    if isinstance(resolution, Allow):
        resolution = direct(resolution, info)
    return DENIED if isinstance(resolution, Deny) else str(resolution)


def encode_evaluation(resolution: Allow | Ask | Deny, *, assume_yes_for_ask: bool) -> str:
    """Return the text of the mode just_evaluate (section 15): it skips the checks of direct()."""
    if isinstance(resolution, Ask) and assume_yes_for_ask:
        resolution = assume_yes(resolution)
    return ALLOWED if isinstance(resolution, Allow) else DENIED
