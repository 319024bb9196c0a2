"""One call of the proxy from its words to its end, whatever the form (docs/spec/proxy.md 2).

What a form has (a call's name, a source, two descriptors) is put through the proxy's own rules, a
flow is made of it, and whatever happens ends in one audit record and one exit code.
"""

from __future__ import annotations

import os

from sluice.errors import ConfigError, LocalError, SluiceError
from sluice.flow.endpoint import close_fd
from sluice.proxy.audit import Audit, record_of, refusal
from sluice.proxy.far import ProgramEnd, client_end, find_client
from sluice.proxy.flow import GONE_GRACE, Flow, Settings
from sluice.proxy.link import Call, Memory, Tools
from sluice.proxy.log import WARNING, Log
from sluice.proxy.model import RefusedError
from sluice.proxy.names import is_valid_source, parse_call_name
from sluice.proxy.paths import audit_file, state_directory
from sluice.proxy.stage import Cause
from sluice.proxy.unfinished import Unfinished
from sluice.proxy.worker_end import WorkerEnd, needs_process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice.flow.reactor import Loop
    from sluice.proxy.far import FarEnd
    from sluice.proxy.model import ChainConfig, Configuration, ProxySettings

REFUSED, TROUBLE = 126, 125


def new_ident() -> str:
    """Return a name for a call: 12 digits, unlike any other's."""
    return os.urandom(6).hex()


def named_call(untrusted_name: str, untrusted_source: str | None, form: str) -> Call:
    """Return the call that a source asks for (section 1). Raises LocalError."""
    if not untrusted_source:
        raise LocalError("no source domain is known: not called through qrexec")
    if not is_valid_source(untrusted_source):
        raise LocalError("the source domain has an illegal name")
    name = parse_call_name(untrusted_name, own_name=os.uname().nodename)
    return Call(
        untrusted_source,
        name.target,
        name.service,
        name.argument,
        chain=name.chain,
        ident=new_ident(),
        form=form,
    )


class Session:
    """What all calls of a process share: loop, configuration, memory, log, audit."""

    def __init__(
        self, loop: Loop, configuration: Configuration, log: Log, *, memory: Memory | None = None
    ) -> None:
        """Take the configuration as it is now; calls keep the chain that they began with."""
        self.loop = loop
        self.configuration = configuration
        self.log = log
        self.memory = memory or Memory(configuration.settings.max_memory)
        settings = configuration.settings
        # Told of each call that is over or was refused (then without flow): for metrics.
        self.observer: Callable[[Call, Cause, Flow | None], None] | None = None
        self.audit = Audit(
            audit_file(settings.audit), max_bytes=settings.audit_max, keep=settings.audit_keep
        )
        self.unfinished = Unfinished(state_directory(settings.state), self.audit)
        self.unfinished.collect()

    @property
    def settings(self) -> ProxySettings:
        """The settings of the configuration in force."""
        return self.configuration.settings

    def begin(
        self,
        call: Call,
        in_fd: int,
        out_fd: int,
        on_end: Callable[[int], None],
        *,
        explicit: bool | None = True,
        far: FarEnd | None = None,
        outlive: bool = False,
    ) -> Flow | None:
        """Put a call through the rules and start its flow; None where it is refused.

        Owns both descriptors, also then. ``on_end(exit_code)`` is called once, maybe at once.
        ``explicit``: the source chose target and service; None where it is no call of a domain
        and the chain's rules do not apply.
        ``far`` is the far end where it is not the ordinary one; ``outlive``: it may go on for as
        long as it likes after its source is gone.
        """
        try:
            chain = self.configuration.chain(call.chain)
            if explicit is not None:
                chain.permit(call, explicit=explicit)
            far = self._far_end(call, chain, far)
        except SluiceError as error:
            kind = "refused" if isinstance(error, RefusedError) else "configuration"
            cause = Cause(kind, str(error), exit_code=error.exit_code)
            self.turn_away(call, cause, in_fd, out_fd, on_end)
            return None
        return self._start(call, chain, far, in_fd, out_fd, on_end, outlive)

    def _start(
        self,
        call: Call,
        chain: ChainConfig,
        far: FarEnd,
        in_fd: int,
        out_fd: int,
        on_end: Callable[[int], None],
        outlive: bool,
    ) -> Flow | None:
        log = self.log.of_call(call.ident, self.settings.log_lines)
        closed_reader = chain.on_closed_reader or self.settings.on_closed_reader

        killed = Cause("killed", "the proxy itself was killed")
        note = self.unfinished.note(call.ident, call.source, refusal(call, killed))
        reason = self._no_place(call) if call.form == "program" else None
        if reason is not None:
            self.turn_away(call, Cause("busy", reason, exit_code=126), in_fd, out_fd, on_end)
            if note is not None:
                note.done()
            return None

        def ended(flow: Flow) -> None:
            log.flush()
            self._record(flow)
            if note is not None:
                note.done()
            on_end(flow.exit_code)

        flow = Flow(
            self.loop,
            # Where the chain runs in a process of its own, the bytes go there untouched.
            [] if isinstance(far, WorkerEnd) else chain.uses,
            call,
            far,
            in_fd=in_fd,
            out_fd=out_fd,
            on_end=ended,
            log=log,
            settings=Settings(
                abort_on_closed_reader=closed_reader == "abort",
                gone_grace=None if outlive else GONE_GRACE,
            ),
            memory=self.memory,
            tools=Tools(
                log=log, state_directory=state_directory(self.settings.state), loop=self.loop
            ),
        )
        flow.start()
        return flow

    def _no_place(self, call: Call) -> str | None:
        """Return why there is no place for a call that is a process of its own, if there is none.

        The resident form has a table of its calls; here the notes of those under way are counted.
        """
        settings = self.settings
        for attempt in range(2):
            calls, of_source = self.unfinished.under_way(call.source)
            if calls <= settings.max_calls and of_source <= settings.max_calls_source:
                return None
            if attempt == 0:
                # Some of these may be of processes that were killed.
                self.unfinished.collect(4096)
        most = settings.max_calls_source
        if of_source > most:
            return f"{most} calls of '{call.source}' are under way already (max_calls_source)"
        return f"{settings.max_calls} calls are under way already (max_calls)"

    def _far_end(self, call: Call, chain: ChainConfig, given: FarEnd | None) -> FarEnd:
        """Return the far end: the given one, the ordinary one, or the process of the chain."""
        log = self.log.of_call(call.ident, self.settings.log_lines)
        if not needs_process(chain, call.form):
            return given or ordinary_end(self.loop, call, self.settings, log)
        if given is not None and not isinstance(given, ProgramEnd):
            raise ConfigError(
                "has plugins or filters that need a process of their own, which cannot be here",
                file=chain.file,
                line=chain.line,
                key=f"chains.{chain.name}",
            )
        command = given.argv if given is not None else None
        return WorkerEnd(self.loop, call, chain, self.settings, log, command=command)

    def refuse_malformed(self, untrusted_source: str | None, form: str, error: LocalError) -> None:
        """Log and record what is no call: nothing of its name is kept but the reason."""
        source = untrusted_source if is_valid_source(untrusted_source or "") else ""
        call = Call(source or "", "", "", ident=new_ident(), form=form)
        self.refuse(call, Cause("malformed", str(error), exit_code=error.exit_code))

    def turn_away(
        self, call: Call, cause: Cause, in_fd: int, out_fd: int, on_end: Callable[[int], None]
    ) -> None:
        """Refuse a call whose ends we have already: both are closed, then ``on_end`` is called."""
        self.refuse(call, cause)
        close_fd(in_fd)
        close_fd(out_fd)
        on_end(cause.exit_code)

    def refuse(self, call: Call, cause: Cause) -> None:
        """Log and record a call that does not begin."""
        self.log.write(f"[{call.ident}] refused: {cause}", WARNING)
        self._write(refusal(call, cause))
        if self.observer is not None:
            self.observer(call, cause, None)

    def _record(self, flow: Flow) -> None:
        cause = flow.cause
        if cause is not None and cause.kind != "done":
            self.log.write(f"[{flow.call.ident}] ended: {cause}", WARNING)
        self._write(record_of(flow))
        if self.observer is not None and cause is not None:
            self.observer(flow.call, cause, flow)

    def _write(self, record: dict[str, object]) -> None:
        try:
            self.audit.write(record)
        except OSError as error:
            self.log.write(f"no audit record in {self.audit.path}: {error.strerror}", WARNING)


def ordinary_end(
    loop: Loop,
    call: Call,
    settings: ProxySettings,
    log: Callable[[str], None],
    *,
    group: bool = True,
) -> FarEnd:
    """Return the ordinary far end: the agent's socket in a Sluice domain, else the client.

    ``group`` as for ProgramEnd. Raises LocalError where there is no client.
    """
    client = find_client(settings.client or None, os.environ.get("PATH"))
    if client is None:
        raise LocalError("qrexec-client-vm is not installed here")
    if is_our_client(client):
        from sluice.proxy.agent_end import AgentEnd

        return AgentEnd(loop, call, log=log, timeout=settings.far_timeout)
    return client_end(loop, call, client, log, group=group)


def is_our_client(client: str) -> bool:
    """Tell whether a ``qrexec-client-vm`` is Sluice's: then we can ask the agent as it does."""
    from sluice.runtime import bin_directory

    return os.path.realpath(client).startswith(bin_directory() + "/")
