"""What a domain is: its identity, class, properties, features and tags, as plain values.

docs/spec/core-stack.md 2, 3 and 4. Nothing here reads or writes anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from sluice.wire.names import NIL_UUID, SAFE

MAX_QID: Final = 9999
MAX_NAME: Final = 31

# Classes that can be named in a system file. docs/spec/core-stack.md 2.1.
CLASSES: Final = ("AdminVM", "TemplateVM", "AppVM", "StandaloneVM", "DispVM", "RemoteVM")

# Built-in labels, in the order of their index (3.3): name to colour.
LABELS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "red": "0xcc0000",
        "orange": "0xf57900",
        "yellow": "0xedd400",
        "green": "0x73d216",
        "gray": "0x555555",
        "blue": "0x3465a4",
        "purple": "0x75507b",
        "black": "0x000000",
    }
)

HOST_TEMPLATE: Final = "host"
"""The pseudo-template made of the host's own /usr and some of its /etc, read-only (12.2)."""

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})


def name_error(name: str) -> str | None:
    """Return why ``name`` cannot name a domain, in the words of core-stack.md 3.1, or None."""
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) > MAX_NAME:
        return "VM name must be shorter than 32 characters"
    if raw[:1] in (b"-", b"_", b".") or raw[:1].isdigit():
        return "VM name cannot start with hyphen, underscore, dot or numbers"
    if not raw or raw.translate(None, SAFE):
        return "VM name contains illegal characters"
    if name == "Domain-0":
        return "VM name cannot be 'Domain-0'"
    if name in ("none", "default"):
        return "VM name cannot be 'none' nor 'default'"
    if name.endswith("-dm"):
        return "VM name cannot end with -dm"
    return None


@dataclass(frozen=True, slots=True)
class DomainConfig:
    """One domain as it is configured; what runs is another matter.

    ``qid`` is the domain's number, also the one that the wire protocol calls domain id.
    Sizes are MiB, times are seconds. Features are text to text, a missing one is absent.
    """

    name: str
    qid: int
    uuid: str
    klass: str = "AppVM"
    label: str = "red"
    template: str | None = None
    kind: str = "bubblewrap"
    tags: frozenset[str] = frozenset()
    features: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    default_user: str = "user"
    autostart: bool = False
    qrexec_timeout: int = 60
    shutdown_timeout: int = 60
    memory: int = 400
    maxmem: int = 4000
    vcpus: int = 2
    template_for_dispvms: bool = False
    default_dispvm: str | None = None
    guivm: str | None = "dom0"
    netvm: str | None = None
    provides_network: bool = False
    relayvm: str | None = None
    transport_rpc: str | None = None
    remote_name: str | None = None
    debug: bool = False
    # Files laid in the domain at each start by the domain itself: path inside -> (mode, host path).
    files: Mapping[str, tuple[int, str]] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def domid(self) -> int:
        """The number of this domain on the wire."""
        return self.qid

    @property
    def is_admin(self) -> bool:
        """Whether this is dom0."""
        return self.klass == "AdminVM"

    @property
    def colour(self) -> str:
        """The colour of the label as ``0xRRGGBB``."""
        return LABELS.get(self.label, LABELS["black"])

    def feature(self, name: str, default: str | None = None) -> str | None:
        """Return the value of a feature of the domain itself."""
        return self.features.get(name, default)


DOM0: Final = DomainConfig(
    name="dom0",
    qid=0,
    uuid=NIL_UUID,
    klass="AdminVM",
    label="black",
    kind="host",
    guivm=None,
)
