"""A request, normalised: what the rules are matched against (sections 9 and 13.2)."""

from __future__ import annotations

from typing import NamedTuple

from sluice.policy.resolution import Cause, Deny
from sluice.policy.rules import Request
from sluice.policy.system_info import SystemInfo, is_dom0
from sluice.policy.tokens import (
    ADMINVM,
    DEFAULT,
    DISPVM,
    DISPVM_PREFIX,
    Column,
    TokenError,
    check,
)
from sluice.wire.names import escape


class Call(NamedTuple):
    """A request that passed the checks of section 9, with everything that matching needs."""

    request: Request
    source: str
    """The policy source."""
    target: str
    """The normalised target."""
    base: str | None
    """The default disposable base of the policy source, as text."""
    source_facets: tuple[str, ...]
    target_facets: tuple[str, ...]
    warnings: tuple[str, ...]


class NotTemplate(Exception):
    """``@dispvm:X`` where X is unknown or not marked as a disposable base."""


def normalise_target(target: str, info: SystemInfo) -> str:
    """Apply step 3 of section 9 to a legal token; raise NotTemplate where it denies."""
    if target in (ADMINVM, DEFAULT, DISPVM):
        return target
    if target.startswith(DISPVM_PREFIX):
        base = info.get(target[len(DISPVM_PREFIX) :])
        if base is None or not base.template_for_dispvms:
            raise NotTemplate(f"{escape(target[len(DISPVM_PREFIX) :])} is not a disposable base")
        return target
    return target if target in info else DEFAULT


def normalise(request: Request, info: SystemInfo) -> Call | Deny:
    """Check and normalise a request (sections 9 and 13.2); a Deny where a step refuses it."""

    def deny(cause: Cause, message: str, target: str, *, notify: bool = True) -> Deny:
        return Deny(request, request.source, target, None, cause, notify, (), message)

    given = request.target or DEFAULT
    try:
        check(given, Column.REQUEST)
    except TokenError as error:
        # A syntax error without a place, as section 9 wants it; the target is the caller's text.
        message = f"<unknown>:0: {escape(str(error))}"
        return deny(Cause.BAD_TARGET, message, given, notify=False)
    try:
        target = normalise_target(given, info)
    except NotTemplate as error:
        return deny(Cause.NOT_TEMPLATE, str(error), given)
    warnings: tuple[str, ...] = ()
    if target == DEFAULT != given:
        warnings = (f"target {escape(given)} does not exist, using @default instead",)
    source = request.source
    if request.requested_source:
        source = request.requested_source
        refused = _check_requested_source(request.source, source, info)
        if refused is not None:
            return deny(refused[0], refused[1], target)
    domain = info.get(source)
    base = None if domain is None else domain.default_dispvm
    return Call(
        request,
        source,
        target,
        base,
        info.source_facets(source),
        info.target_facets(target, base),
        warnings,
    )


def _check_requested_source(
    relay: str, requested: str, info: SystemInfo
) -> tuple[Cause, str] | None:
    shown = escape(requested)
    domain = info.get(requested)
    if domain is None:
        return Cause.RS_UNKNOWN, f"unknown requested source qube '{shown}'"
    if domain.klass != "RemoteVM":
        return Cause.RS_NOT_REMOTE, f"{shown}: requested source is only authorized for RemoteVM"
    if domain.relayvm != relay:
        return Cause.RS_WRONG_RELAY, f"{escape(relay)} is not a relay for {shown}"
    return None


def startable_free(target: str, info: SystemInfo) -> bool:
    """Tell whether a resolved target can be called without starting anything (11.2 step 6)."""
    if is_dom0(target):
        return True
    if target.startswith(DISPVM):
        return False
    domain = info.get(target)
    return domain is not None and domain.running
