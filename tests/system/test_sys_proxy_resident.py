"""The resident proxy inside real domains: launcher, raw socket, far ends asked of the agent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.proxy import eventually
from tests.support.system import Running, make_system, unsaid

pytestmark = [pytest.mark.sandbox]

SYSTEM = """
[system]
kind = "bubblewrap"
[domains.work]
autostart = true
[domains.vault]
autostart = true
[domains.vault.files]
"/usr/local/etc/qubes-rpc/test.Echo" = "echo"
"/usr/local/etc/qubes-rpc/test.Exit" = "exit"
[domains.proxy]
autostart = true
[domains.proxy.files]
"/rw/config/sluice/proxy.toml" = "proxy.toml"
[domains.raw]
autostart = true
[domains.raw.files]
"/rw/config/sluice/proxy.toml" = "proxy.toml"
"""
POLICY = """
qrexec-proxy  *  work   proxy  allow
qrexec-proxy  *  work   raw    allow
test.Denied   *  proxy  vault  deny
*             *  proxy  vault  allow
*             *  raw    vault  allow
"""
FILES = {
    "echo": "#!/bin/sh\nexec cat\n",
    "exit": '#!/bin/sh\ncat > /dev/null\nexit "$QREXEC_SERVICE_ARGUMENT"\n',
    "proxy.toml": """
[chains.pass]
services = "any"
targets = "any"
sources = ["work"]
filters = [{ use = "byte-limit", src2dst = 10, over = "abort" }]
[chains.raw]
services = "any"
targets = "any"
require_exit_code = false
filters = ["pass"]
""",
}
FIND = "ls {/run,/run/user/*,/tmp}/sluice-proxy*/raw.sock 2>/dev/null"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with make_system(SYSTEM, POLICY, FILES) as system:
        services = system.root / "config/template/host/etc/qubes-rpc"
        services.mkdir(parents=True)
        (services / "qrexec-proxy").symlink_to("/usr/lib/sluice/bin/qrexec-proxy-launcher")
        with system.up() as made:
            for name in ("proxy", "raw"):
                made.start(name, "exec sluice proxy serve")
                path = eventually(lambda name=name: made.run(name, FIND)[1].strip(), 60)
            link = (
                "mkdir -p /usr/local/etc/qubes-rpc &&"
                f" ln -s {path} /usr/local/etc/qubes-rpc/qrexec-proxy"
            )
            done = system.sluice("run", "--user", "root", "raw", "--", "sh", "-c", link)
            assert done.returncode == 0, done.stderr
            yield made


@pytest.mark.spec("PROXY-001", "PROXY-010")
def test_the_launcher_brings_data_and_exit_codes(running: Running) -> None:
    def call(name: str, data: str) -> tuple[int, str]:
        words = f"printf %s '{data}' | qrexec-client-vm proxy qrexec-proxy+{name}"
        return running.run("work", words)

    assert call("pass+vault+test.Echo", "hello") == (0, "hello")
    for code in (1, 42, 125, 126, 127):
        assert unsaid(call(f"pass+vault+test.Exit+{code}", "x")) == (code, "")
    assert call("pass+vault+test.Denied", "x")[0] == 126
    assert call("pass+vault+test.Exit+0", "more than ten bytes") == (126, "")
    assert unsaid(call("nothing+vault+test.Echo", "x")) == (125, "")
    log = running.run("proxy", "sluice proxy log -n 99")[1]
    assert "more than 10 bytes" in log and log.count("test.Exit") == 6


@pytest.mark.spec("PROXY-009")
def test_the_agent_tells_the_raw_socket_who_calls(running: Running) -> None:
    words = "printf hello | qrexec-client-vm raw qrexec-proxy+{}+vault+test.Echo"
    assert running.run("work", words.format("raw")) == (0, "hello")
    assert running.run("work", words.format("pass"))[1] == ""
    log = running.run("raw", "sluice proxy log -n 99")[1]
    assert "exit code" in log and "work" in log
