"""What the engine knows of the domains: an immutable snapshot of the registry.

The snapshot comes from ``internal.GetSystemInfo`` of qubesd or from our own registry
(docs/spec/policy.md section 2). Nothing in this package asks anybody for more.

**Facets.** Everything that a request can name as its source or target has finitely many *facets*:
the words that, written in the source or target column of a rule, match it. The domain ``work``,
tagged ``office`` and of class AppVM, has ``*``, ``@anyvm``, ``work``, ``uuid:<its UUID>``,
``@type:AppVM`` and ``@tag:office``. A rule's column matches exactly when all its parts (one, unless
it is a conjunction of section 31) are among the facets. The tables of section 10 are that and
nothing else; the index, the analysis and the explanation all build on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec

from sluice.errors import LocalError
from sluice.wire.names import DOM0_NAMES, NIL_UUID

# Request of section 2.1: sent to the internal socket of qubesd, then the writing half is shut down.
GET_SYSTEM_INFO = b"internal.GetSystemInfo+ dom0 name dom0\0"

ADMIN_FACETS = ("*", *DOM0_NAMES)
"""Facets of ``@adminvm``, and of dom0 where the registry does not know it."""


class SystemInfoError(LocalError):
    """The system information could not be had or read. Calls are denied, without notification."""


def is_dom0(name: str) -> bool:
    """Tell whether ``name`` is one of the three spellings of the AdminVM (section 1)."""
    return name in DOM0_NAMES


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain as the engine sees it; the fields are those of section 2.2.

    ``uuid`` is lower case without prefix, or None. ``klass`` is the ``type`` of the snapshot.
    """

    name: str
    klass: str = "AppVM"
    tags: frozenset[str] = frozenset()
    uuid: str | None = None
    template_for_dispvms: bool = False
    default_dispvm: str | None = None
    power_state: str = "Halted"
    icon: str = ""
    label: str | None = None
    guivm: str | None = None
    relayvm: str | None = None
    transport_rpc: str | None = None
    internal: bool = False
    facets: tuple[str, ...] = field(init=False, repr=False, compare=False)
    base_facets: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compute the facets once; a snapshot answers many requests."""
        names: tuple[str, ...]
        if self.name == "dom0":
            object.__setattr__(self, "uuid", NIL_UUID)
            names = ADMIN_FACETS
        else:
            names = ("*", "@anyvm", self.name)
            if self.uuid == NIL_UUID:  # that one is dom0's alone, whatever the entry claims
                object.__setattr__(self, "uuid", None)
            if self.uuid:
                names += ("uuid:" + self.uuid,)
        tags = sorted(self.tags)
        object.__setattr__(
            self, "facets", (*names, "@type:" + self.klass, *["@tag:" + tag for tag in tags])
        )
        bases = ["@dispvm:" + self.name]
        if self.uuid:
            bases.append("@dispvm:uuid:" + self.uuid)
        if self.template_for_dispvms:
            bases += ["@dispvm:@tag:" + tag for tag in tags]
        object.__setattr__(self, "base_facets", tuple(bases))

    @property
    def running(self) -> bool:
        """Whether the power state is exactly ``Running``; nothing else counts (POL-132)."""
        return self.power_state == "Running"


class SystemInfo:
    """An immutable snapshot of all domains, looked up by name or by ``uuid:UUID``."""

    __slots__ = ("_known", "domains")

    domains: Mapping[str, Domain]

    def __init__(self, domains: Mapping[str, Domain] | list[Domain] | tuple[Domain, ...]) -> None:
        """Take the domains. Names that are not names of domains (keywords, UUIDs) are left out."""
        given = domains.values() if isinstance(domains, Mapping) else domains
        named = {
            domain.name: domain
            for domain in given
            if domain.name and domain.name[0] not in "@*" and not domain.name.startswith("uuid:")
        }
        known = dict(named)
        for domain in named.values():
            if domain.uuid:
                known["uuid:" + domain.uuid] = domain
        self.domains = MappingProxyType(named)
        self._known = known

    @classmethod
    def from_json(cls, data: object) -> SystemInfo:
        """Build it from the decoded object of section 2.2; raise SystemInfoError if it is not one.

        Fields that may be missing are taken as null; unknown fields are ignored.
        """
        entries = data.get("domains") if isinstance(data, Mapping) else None
        if not isinstance(entries, Mapping):
            raise SystemInfoError("system information has no object 'domains'")
        return cls([_domain(name, entry) for name, entry in entries.items()])

    @classmethod
    def from_reply(cls, reply: bytes) -> SystemInfo:
        """Build it from the whole answer of qubesd to GET_SYSTEM_INFO (section 2.1)."""
        kind, _, content = reply.partition(b"\0")
        if kind == b"2":
            name = content.partition(b"\0")[0].decode("ascii", "replace")
            raise SystemInfoError(f"error getting system info: {name}")
        if kind != b"0":
            raise SystemInfoError("error getting system info: the answer breaks the protocol")
        try:
            return cls.from_json(msgspec.json.decode(content))
        except msgspec.DecodeError as error:
            raise SystemInfoError(f"error getting system info: {error}") from None

    def get(self, name: str) -> Domain | None:
        """Return the domain of that name or ``uuid:UUID``, or None. Keywords are never domains."""
        return self._known.get(name)

    def __contains__(self, name: object) -> bool:
        """Tell whether a domain of that name or ``uuid:UUID`` exists."""
        return name in self._known

    def __iter__(self) -> Iterator[Domain]:
        """Iterate over the domains, each once, in the order given."""
        return iter(self.domains.values())

    def __len__(self) -> int:
        """Return the number of domains."""
        return len(self.domains)

    def to_name(self, target: str) -> str | None:
        """Turn ``uuid:X`` and ``@dispvm:uuid:X`` into the form with a name (section 2.3).

        Everything else comes back unchanged; None where the UUID is unknown.
        """
        prefix = "@dispvm:" if target.startswith("@dispvm:uuid:") else ""
        bare = target[len(prefix) :]
        if not bare.startswith("uuid:"):
            return target
        domain = self._known.get(bare)
        return None if domain is None else prefix + domain.name

    def to_json(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the object of section 2.2, as ``internal.GetSystemInfo`` gives it."""
        return {"domains": {domain.name: _entry(domain) for domain in self}}

    def source_facets(self, source: str) -> tuple[str, ...]:
        """Return the facets of a call's source: the column values that match it (section 10.2)."""
        domain = self._known.get(source)
        if domain is not None:
            return domain.facets
        if is_dom0(source):
            return ADMIN_FACETS
        return ("*", "@anyvm", source) if source[:1] not in ("@", "*") else ("*", "@anyvm")

    def target_facets(self, target: str, base: str | None) -> tuple[str, ...]:
        """Return the facets of a normalised request target (section 10.3).

        ``base`` is the default disposable base of the policy source, needed for ``@dispvm`` only.
        """
        if target[:1] != "@":
            domain = self._known.get(target)
            return domain.facets if domain is not None else self.source_facets(target)
        if target == "@adminvm":
            return ADMIN_FACETS
        if target == "@default":
            return ("*", "@anyvm", "@default")
        if target != "@dispvm":
            domain = self._known.get(target[len("@dispvm:") :])
            return ("*", "@anyvm", *(domain.base_facets if domain else (target,)))
        facets: tuple[str, ...] = ("*", "@anyvm", "@dispvm")
        if base is not None:
            # Textual: a rule with the base's UUID does not match plain @dispvm.
            facets += ("@dispvm:" + base,)
            domain = self._known.get(base)
            if domain is not None:
                facets += tuple(f for f in domain.base_facets if f.startswith("@dispvm:@tag:"))
        return facets


def _domain(name: object, entry: object) -> Domain:
    if not isinstance(name, str) or not isinstance(entry, Mapping):
        raise SystemInfoError("system information: an entry of 'domains' is not an object")

    def text(key: str) -> str | None:
        value = entry.get(key)
        if value is not None and not isinstance(value, str):
            raise SystemInfoError(f"system information: {key} of {name!r} is not a string")
        return value or None

    tags = entry.get("tags") or ()
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str) for tag in tags):
        raise SystemInfoError(f"system information: tags of {name!r} is not a list of strings")
    return Domain(
        name=name,
        klass=text("type") or "",
        tags=frozenset(tags),
        uuid=text("uuid"),
        template_for_dispvms=bool(entry.get("template_for_dispvms")),
        default_dispvm=text("default_dispvm"),
        power_state=text("power_state") or "",
        icon=text("icon") or "",
        label=text("label"),
        guivm=text("guivm"),
        relayvm=text("relayvm"),
        transport_rpc=text("transport_rpc"),
        internal=bool(entry.get("internal")),
    )


def _entry(domain: Domain) -> dict[str, Any]:
    return {
        "tags": sorted(domain.tags),
        "type": domain.klass,
        "template_for_dispvms": domain.template_for_dispvms,
        "default_dispvm": domain.default_dispvm,
        "icon": domain.icon,
        "label": domain.label,
        "guivm": domain.guivm,
        "relayvm": domain.relayvm,
        "transport_rpc": domain.transport_rpc,
        "internal": "1" if domain.internal else None,
        "power_state": domain.power_state,
        "uuid": domain.uuid,
    }
