"""The registry: which domains there are, and what policy may know of them.

Read from the system file and joined with the identities of the store. dom0 is always in it.
docs/spec/core-stack.md 3.2, 6.10.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sluice.domains.model import DOM0, DomainConfig
from sluice.errors import LocalError

if TYPE_CHECKING:
    from sluice.policy.system_info import SystemInfo


class Registry:
    """An ordered set of domains, found by name, uuid or qid."""

    def __init__(self, domains: Iterable[DomainConfig]) -> None:
        """Take the domains; dom0 is added where it is missing. Raises LocalError on doubles."""
        self._by_name: dict[str, DomainConfig] = {DOM0.name: DOM0}
        self._by_uuid: dict[str, DomainConfig] = {DOM0.uuid: DOM0}
        self._by_qid: dict[int, DomainConfig] = {DOM0.qid: DOM0}
        for domain in domains:
            self.add(domain)

    def add(self, domain: DomainConfig) -> None:
        """Add one domain. Raises LocalError where its name, uuid or qid is taken."""
        if domain.is_admin:
            self._by_name[domain.name] = domain
            self._by_uuid[domain.uuid] = self._by_qid[domain.qid] = domain
            return
        if domain.name in self._by_name:
            raise LocalError(f"Qube already exists: {domain.name}")
        if domain.uuid in self._by_uuid or domain.qid in self._by_qid:
            raise LocalError(f"{domain.name}: identity already in use")
        self._by_name[domain.name] = domain
        self._by_uuid[domain.uuid] = domain
        self._by_qid[domain.qid] = domain

    def publish(self, findings: Mapping[str, str]) -> None:
        """Make what was found out about this machine features of dom0 (12.1)."""
        dom0 = self._by_name[DOM0.name]
        features = MappingProxyType({**dom0.features, **findings})
        self.add(dataclasses.replace(dom0, features=features))

    def remove(self, name: str) -> DomainConfig:
        """Take one domain out and return it. Raises LocalError for dom0 and unknown names."""
        domain = self._by_name.get(name)
        if domain is None or domain.is_admin:
            raise LocalError(f"{name!r} cannot be removed")
        del self._by_name[name], self._by_uuid[domain.uuid], self._by_qid[domain.qid]
        return domain

    def get(self, name_or_uuid: str) -> DomainConfig | None:
        """Find a domain by name, or by ``uuid:`` and 36 characters; None where there is none."""
        if name_or_uuid.startswith("uuid:"):
            return self._by_uuid.get(name_or_uuid[5:])
        return self._by_name.get(name_or_uuid)

    def by_qid(self, qid: int) -> DomainConfig | None:
        """Find a domain by its number."""
        return self._by_qid.get(qid)

    def __iter__(self) -> Iterator[DomainConfig]:
        """Give dom0 first, then the others in the order of the file."""
        return iter(list(self._by_name.values()))

    def __len__(self) -> int:
        """Count the domains, dom0 included."""
        return len(self._by_name)

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a domain of that name."""
        return name in self._by_name

    def system_info_json(self, running: Collection[str]) -> dict[str, Any]:
        """Return the object of ``internal.GetSystemInfo`` (6.10); ``running`` are names."""
        return {
            "domains": {
                domain.name: _info(domain, domain.is_admin or domain.name in running)
                for domain in self
            }
        }

    def system_info(self, running: Collection[str]) -> SystemInfo:
        """Return the snapshot that policy decides from. ``running`` are names of domains."""
        from sluice.policy.system_info import SystemInfo

        return SystemInfo.from_json(self.system_info_json(running))


def _info(domain: DomainConfig, running: bool) -> dict[str, Any]:
    remote = domain.klass == "RemoteVM"
    return {
        "internal": domain.feature("internal"),
        "tags": sorted(domain.tags),
        "type": domain.klass,
        "template_for_dispvms": domain.template_for_dispvms,
        "default_dispvm": domain.default_dispvm,
        "icon": f"appvm-{domain.label}",
        "label": domain.colour,
        "guivm": domain.guivm,
        "relayvm": domain.relayvm if remote else None,
        "transport_rpc": domain.transport_rpc if remote else None,
        "power_state": "Running" if running or remote else "Halted",
        "uuid": domain.uuid,
    }
