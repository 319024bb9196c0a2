"""The command form: a chain between our own stdin/stdout and a program (docs/spec/proxy.md 2)."""

from __future__ import annotations

import os

from sluice.errors import ConfigError, LocalError
from sluice.flow.reactor import Reactor
from sluice.proxy.far import ProgramEnd
from sluice.proxy.link import Call
from sluice.proxy.log import Log
from sluice.proxy.model import ChainConfig, Configuration, ProxySettings
from sluice.proxy.options import with_values
from sluice.proxy.session import TROUBLE, Session, new_ident
from sluice.proxy.signals import on_signals
from sluice.proxy.stage import Cause

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice.proxy.stage import FilterUse


def run_command(
    configuration: Configuration,
    chain: str,
    argv: Sequence[str],
    *,
    source: str = "here",
    in_fd: int = 0,
    out_fd: int = 1,
    log: Log | None = None,
) -> int:
    """Join ``in_fd`` and ``out_fd`` with a program through a chain; return its exit code.

    Where a filter ends the call the code is 126, in trouble 125; a program that a signal ended
    gives 128 + signal. Raises LocalError for what cannot be started.
    """
    configuration.chain(chain)
    loop = Reactor()
    log = log or Log("stderr")
    session = Session(loop, configuration, log)
    name = os.path.basename(argv[0]) or argv[0]
    call = Call(source, "program", name, chain=chain, ident=new_ident(), form="command")
    far = ProgramEnd(loop, argv, log=log.write, stderr_fd=2)
    codes: list[int] = []

    def ended(code: int) -> None:
        codes.append(code)
        loop.stop()

    # Ours stay open: who called us may use them after the call.
    flow = session.begin(
        call, os.dup(in_fd), os.dup(out_fd), ended, explicit=None, far=far, outlive=True
    )
    if flow is not None:
        on_signals(loop, lambda number: flow.abort(Cause("killed", f"signal {number}")))
        if not codes:
            loop.run()
    if flow is not None and flow.cause is not None and flow.cause.kind == "far":
        raise LocalError(flow.cause.reason)
    return codes[0] if codes else TROUBLE


def configuration_of(uses: Sequence[FilterUse], name: str = "tried") -> Configuration:
    """Return a configuration with one chain that is in no file, for trying filters out."""
    settings: ProxySettings = with_values(ProxySettings, {"audit": "none", "log": "stderr"})
    chain = ChainConfig(name, list(uses), services="any", targets="any")
    return Configuration(settings, {name: chain}, [])


def filters_from_words(words: Sequence[str], directories: Sequence[str] = ()) -> list[FilterUse]:
    """Return the filters of ``NAME`` or ``NAME:option=value,option=value`` words.

    A word with a slash names a file whose (only) filter is meant. Raises ConfigError.
    """
    import tomllib

    from sluice.proxy.loader import Filters, checked, filters_in
    from sluice.proxy.schema import use_filter

    known = Filters(directories)
    uses = []
    for word in words:
        name, _, text = word.partition(":")
        given = {}
        for pair in filter(None, text.split(",")):
            option, equals, value = pair.partition("=")
            if not equals:
                raise ConfigError(f"'{pair}' is not of the form option=value", key=name)
            try:
                given[option] = tomllib.loads(f"v = {value}")["v"]
            except tomllib.TOMLDecodeError:
                given[option] = value
        if "/" in name:
            classes = [checked(cls) for cls in filters_in(name)]
            if len(classes) != 1:
                raise ConfigError(f"defines {len(classes)} filters, not one", file=name)
            cls = classes[0]
        else:
            cls = known.get(name)
        uses.append(use_filter(cls, given))
    return uses
