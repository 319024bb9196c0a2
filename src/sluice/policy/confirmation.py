"""What is said to the person: the question and the notice, as data (section 16). No I/O."""

from __future__ import annotations

from typing import Any

from sluice.policy.resolution import Allow, Ask, Deny
from sluice.policy.system_info import SystemInfo
from sluice.policy.tokens import DISPVM_PREFIX

ASK_SERVICE = "policy.Ask"
NOTIFY_SERVICE = "policy.Notify"

__all__ = ["ASK_SERVICE", "NOTIFY_SERVICE", "guivm_for", "icons", "notice", "question"]


def icons(info: SystemInfo) -> dict[str, str]:
    """Return the icon of every domain, and of a disposable of every base (section 16.2)."""
    found = {domain.name: domain.icon for domain in info}
    found |= {
        DISPVM_PREFIX + domain.name: domain.icon.replace("app", "disp")
        for domain in info
        if domain.template_for_dispvms
    }
    return found


def question(ask: Ask, info: SystemInfo) -> dict[str, Any]:
    """Return the request object of ``policy.Ask`` (section 16.2)."""
    return {
        "source": ask.source,
        "service": ask.request.service,
        "argument": ask.request.argument,
        "targets": list(ask.candidates),
        "default_target": ask.default_target or "",
        "icons": icons(info),
    }


def notice(resolution: Allow | Deny) -> dict[str, str]:
    """Return the request object of ``policy.Notify`` (section 16.3).

    An allowed call shows policy source and resolved target, a denied one both as received.
    """
    request = resolution.request
    allowed = isinstance(resolution, Allow)
    return {
        "resolution": "allow" if allowed else "deny",
        "service": request.service,
        "argument": request.argument,
        "source": resolution.source if allowed else request.source,
        "target": resolution.target if isinstance(resolution, Allow) else request.target,
    }


def guivm_for(resolution: Allow | Ask | Deny, info: SystemInfo) -> str | None:
    """Return the domain that is asked or notified: the GuiVM of the policy source, or None.

    A denial goes to the GuiVM of the domain that called, whoever it stood for (section 16.3).
    """
    name = resolution.request.source if isinstance(resolution, Deny) else resolution.source
    domain = info.get(name)
    return None if domain is None else domain.guivm
