"""The configuration as values: settings, and chains with the rules of who may use them.

docs/spec/proxy.md 3 and 10. Light: the program form gets these from a compiled configuration.
"""

from __future__ import annotations

from sluice.errors import ConfigError, LocatedError
from sluice.proxy.options import Duration, Size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

    from sluice.proxy.link import Call
    from sluice.proxy.stage import FilterUse

ANY = "any"


class RefusedError(LocatedError):
    """The proxy's own rules forbid a call (exit code 126)."""

    exit_code = 126
    public = "Request refused"


class ProxySettings:
    """The table ``[proxy]``.

    client: how the far end is reached; empty to look for qrexec-client-vm
    max_calls: calls at once; over it a call is refused at once
    max_calls_source: calls at once of one source
    max_memory: bytes that all calls hold together; beyond it reading waits
    far_timeout: time for the far end to answer
    on_closed_reader: what to do with data that nobody reads any more
    audit: file of the audit records; empty for the usual place, "none" for none
    audit_max: size at which the audit file is rotated
    audit_keep: how many old audit files are kept
    log: auto, journal, syslog, stderr or the path of a file
    log_lines: log lines of one call a second; what is over is folded into a count
    filters: directories with filters of your own
    legacy_plugins: directories with plugins of the earlier proxy
    state: directory for what filters remember between calls; empty for the usual place
    metrics: Unix socket, or [127.0.0.1]:PORT, that serves metrics; resident form only
    """

    client: str = ""
    max_calls: int = 256
    max_calls_source: int = 32
    max_memory: Size = 256 << 20
    far_timeout: Duration = 60.0
    on_closed_reader: Literal["discard", "abort"] = "discard"
    audit: str = ""
    audit_max: Size = 16 << 20
    audit_keep: int = 4
    log: str = "auto"
    log_lines: int = 100
    filters: list[str] = []  # noqa: RUF012
    legacy_plugins: list[str] = []  # noqa: RUF012
    state: str = ""
    metrics: str = ""


class ChainTable:
    """The table ``[chains.NAME]``.

    filters: the filters in order, each a name or a table { use = name, option = value }
    description: for people
    services: the services, or service+argument, that may be called; "any" must be written
    targets: the targets that may be called; "any" must be written
    sources: the domains that may use the chain
    require_exit_code: refuse the raw socket form, which cannot carry one
    on_closed_reader: what to do with data that nobody reads any more; overrides [proxy]
    """

    filters: list[Any]
    description: str = ""
    services: list[str] | Literal["any"] | None = None
    targets: list[str] | Literal["any"] | None = None
    sources: list[str] | Literal["any"] | None = None
    require_exit_code: bool = True
    on_closed_reader: Literal["discard", "abort"] | None = None


class ChainConfig:
    """One chain: its filters with their options, and who may use it."""

    def __init__(
        self,
        name: str,
        uses: list[FilterUse],
        *,
        description: str = "",
        services: list[str] | str | None = None,
        targets: list[str] | str | None = None,
        sources: list[str] | str | None = None,
        require_exit_code: bool = True,
        on_closed_reader: str | None = None,
        file: str | None = None,
        line: int | None = None,
        imported: bool = False,
        legacy: dict[str, Any] | None = None,
    ) -> None:
        """Keep what was validated; ``imported`` marks a chain of the earlier proxy.

        ``legacy`` has what only plugins of the earlier proxy need, None for ordinary chains.
        """
        self.name = name
        self.uses = uses
        self.description = description
        self.services = services
        self.targets = targets
        self.sources = sources
        self.require_exit_code = require_exit_code
        self.on_closed_reader = on_closed_reader
        self.file = file
        self.line = line
        self.imported = imported
        self.legacy = legacy

    def permit(self, call: Call, *, explicit: bool) -> None:
        """Raise where the rules of the chain forbid a call.

        ``explicit``: the source chose target and service (section 1), so the chain must say which
        are allowed: ConfigError where it does not. RefusedError where the call is not among them.
        """
        if explicit and not self.imported:
            for key in ("services", "targets"):
                if getattr(self, key) is None:
                    raise ConfigError(
                        "must be given where the source chooses it",
                        file=self.file,
                        line=self.line,
                        key=f"chains.{self.name}.{key}",
                        suggestion=f'list them, or write {key} = "any"',
                    )
        wanted = (
            ("sources", (call.source,)),
            ("targets", (call.target,)),
            ("services", (call.service, call.descriptor)),
        )
        for key, values in wanted:
            allowed = getattr(self, key)
            if allowed is not None and allowed != ANY and not any(v in allowed for v in values):
                raise RefusedError(
                    f"chain '{self.name}': '{values[0]}' is not among its {key}",
                    file=self.file,
                    line=self.line,
                )


class Configuration:
    """Settings and chains, as read from ``files``."""

    def __init__(
        self, settings: ProxySettings, chains: dict[str, ChainConfig], files: list[str]
    ) -> None:
        """Keep what was validated."""
        self.settings = settings
        self.chains = chains
        self.files = files

    def chain(self, name: str) -> ChainConfig:
        """Return a chain; raise ConfigError, which names the known ones, where there is none."""
        try:
            return self.chains[name]
        except KeyError:
            known = ", ".join(sorted(self.chains)) or "none"
            raise ConfigError(f"unknown chain '{name}'", suggestion=f"known: {known}") from None
