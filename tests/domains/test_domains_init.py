"""What `sluice init` lays beside the system file."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.cli.init import lay
from sluice.domains.paths import Paths
from sluice.service.command import parse_command
from sluice.service.configuration import load_configuration
from sluice.service.lint import lint_services
from sluice.service.lookup import TCP, find_service


@pytest.mark.parametrize(
    ("services", "settings"),
    [("template/host/etc/qubes-rpc", "template/host/etc/qubes/rpc-config"), ("rpc", "rpc-config")],
)
def test_tcp_ports_can_be_had_where_policy_allows(
    tmp_path: Path, services: str, settings: str
) -> None:
    """In domains and in dom0, and without a descriptor, which no server of TCP expects."""
    config = tmp_path / "c"
    made = lay(Paths(config, tmp_path / "s", tmp_path / "r"))
    command = parse_command(b"QUBESRPC qubes.ConnectTCP+80 work", with_user=False)
    found = find_service(command, str(config / services))
    assert (found.kind, found.address) == (TCP, b"/dev/tcp/127.0.0.1")
    assert load_configuration(command, str(config / settings)).skip_service_descriptor
    assert {config / services / "qubes.ConnectTCP", config / settings / "qubes.ConnectTCP"} <= {
        *made
    }
    if services == "rpc":
        found = [f.text for f in lint_services(str(config / services), str(config / settings))]
        assert [text for text in found if "ConnectTCP" in text] == []
