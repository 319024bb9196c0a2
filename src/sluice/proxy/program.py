"""The program form: started by the agent for each call (docs/spec/proxy.md 2).

``argv[1]`` is CHAIN+TARGET+SERVICE[+ARGUMENT], ``QREXEC_REMOTE_DOMAIN`` the source, stdin and
stdout the call. Standard error leads to the source, so nothing is ever written there.
"""

from __future__ import annotations

import os
import sys

from sluice.errors import ConfigError, LocalError, SluiceError
from sluice.flow.reactor import Reactor
from sluice.proxy.log import ERROR, Log
from sluice.proxy.paths import configuration_files, old_installation, state_directory
from sluice.proxy.session import TROUBLE, Session, named_call
from sluice.proxy.signals import on_signals
from sluice.proxy.stage import Cause

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.proxy.flow import Flow
    from sluice.proxy.model import Configuration


def main(argv: list[str] | None = None) -> int:
    """Serve one call and return the exit code for the source."""
    argv = sys.argv if argv is None else argv
    log = Log("auto", stderr=False, fallback=state_directory("") + "/proxy.log")
    _silence()
    try:
        return _serve(argv, log)
    except SluiceError as error:
        log.write(f"call not made: {error}", ERROR)
        return error.exit_code
    except Exception as error:
        log.write(f"call not made: {_describe(error)}", ERROR)
        return TROUBLE


def _serve(argv: list[str], log: Log) -> int:
    configuration = load_configuration(argv[0])
    if configuration.settings.log != "auto":
        fallback = state_directory(configuration.settings.state) + "/proxy.log"
        log = Log(configuration.settings.log, stderr=False, fallback=fallback)
    loop = Reactor()
    session = Session(loop, configuration, log)
    source = os.environ.get("QREXEC_REMOTE_DOMAIN")
    try:
        if len(argv) != 2:
            raise LocalError("usage: qrexec-proxy CHAIN+TARGET+SERVICE[+ARGUMENT]")
        call = named_call(argv[1], source, "program")
    except LocalError as error:
        session.refuse_malformed(source, "program", error)
        return TROUBLE
    codes: list[int] = []

    def ended(code: int) -> None:
        codes.append(code)
        loop.stop()

    flow = session.begin(call, 0, 1, ended)
    if flow is not None:
        end_on_signals(loop, flow)
        if not codes:
            loop.run()
    return codes[0] if codes else TROUBLE


def load_configuration(program: str) -> Configuration:
    """Return the configuration, from its compiled form where that is up to date.

    Where there is none in the usual places, that of an installation of the earlier proxy in whose
    place ``program`` stands.
    """
    from sluice.proxy.compiled import load_fast

    try:
        configuration_files()
    except ConfigError:
        old = old_installation(program)
        if old is None:
            raise
        return load_fast(old)
    return load_fast()


def end_on_signals(loop: Reactor, flow: Flow) -> None:
    """Let SIGTERM, SIGINT and SIGHUP end the call as an abort, with its record."""

    def end(number: int) -> None:
        flow.abort(Cause("killed", f"signal {number}"))

    on_signals(loop, end)


def _silence() -> None:
    """Lead standard error, which the source would see, to nowhere."""
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, 2)
    os.close(null)


def _describe(error: Exception) -> str:
    trace = error.__traceback__
    place = ""
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error} at {place}"
