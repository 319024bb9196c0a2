"""Sluice: Qubes RPC (qrexec) for any Linux, with a firewall in the data path."""

__version__ = "0.1.0"
