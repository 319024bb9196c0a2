"""Sluice: Qubes RPC (qrexec) for any Linux, with a firewall in the data path.

The library for people: ``sluice.call``, ``sluice.open_call`` (see ``sluice.api``) and
``sluice.SocketServer`` (see ``sluice.socketserver``). They are loaded when they are first used,
because this package is also the root of programs that must start in milliseconds.
"""

__version__ = "0.1.0"

_LAZY = {
    "Call": "api",
    "CallError": "api",
    "CallFailed": "api",
    "CallLost": "api",
    "CallRefused": "api",
    "CallResult": "api",
    "call": "api",
    "open_call": "api",
    "ServiceRequest": "socketserver",
    "SocketServer": "socketserver",
}

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sluice.api import (
        Call,
        CallError,
        CallFailed,
        CallLost,
        CallRefused,
        CallResult,
        call,
        open_call,
    )
    from sluice.socketserver import ServiceRequest, SocketServer

__all__ = [
    "Call",
    "CallError",
    "CallFailed",
    "CallLost",
    "CallRefused",
    "CallResult",
    "ServiceRequest",
    "SocketServer",
    "call",
    "open_call",
]


def __getattr__(name: str) -> object:
    """Load one of the library's names on its first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'sluice' has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(f"sluice.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
