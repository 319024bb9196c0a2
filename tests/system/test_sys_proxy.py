"""The proxy inside a real domain: names, filters, state over restarts, ends of any side."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
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
"/usr/local/etc/qubes-rpc/test.Argument" = "argument"
"/usr/local/etc/qubes-rpc/test.Exit" = "exit"
"/usr/local/etc/qubes-rpc/test.Wait" = "wait"
[domains.proxy]
autostart = true
[domains.proxy.files]
"/rw/config/sluice/proxy.toml" = "proxy.toml"
"""
POLICY = """
qrexec-proxy  *  work   proxy  allow
test.Denied   *  proxy  vault  deny
*             *  proxy  vault  allow
"""
FILES = {
    "echo": "#!/bin/sh\nexec cat\n",
    "argument": '#!/bin/sh\necho "$QREXEC_SERVICE_ARGUMENT from $QREXEC_REMOTE_DOMAIN"\n',
    "exit": '#!/bin/sh\necho noise >&2\nexit "$QREXEC_SERVICE_ARGUMENT"\n',
    "wait": "#!/bin/sh\necho up\nexec sleep 600\n",
    "proxy.toml": """
[chains.pass]
services = "any"
targets = "any"
filters = ["pass"]
[chains.brief]
services = "any"
targets = "any"
filters = [{ use = "timeout", dst2src = "500ms" }]
[chains.two]
services = "any"
targets = "any"
filters = [{ use = "count", limit = 2, interval = "1h" }]
[chains.large]
services = "any"
targets = "any"
filters = [{ use = "program", src2dst = ["tr", "a-z", "A-Z"] }]
[chains.strict]
services = ["test.Echo"]
targets = ["vault"]
sources = ["somebody"]
filters = []
""",
}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with make_system(SYSTEM, POLICY, FILES) as system:
        services = system.root / "config/template/host/etc/qubes-rpc"
        services.mkdir(parents=True)
        (services / "qrexec-proxy").symlink_to("/usr/lib/sluice/bin/qrexec-proxy")
        with system.up() as made:
            yield made


def call(running: Running, name: str, data: str = "") -> tuple[int, str]:
    """Make a call through the proxy; return the exit code and what came back."""
    return running.run("work", f"printf %s '{data}' | qrexec-client-vm proxy qrexec-proxy+{name}")


@pytest.mark.spec("PROXY-001", "PROXY-002", "PROXY-007")
def test_a_call_reaches_the_service_with_its_argument_from_the_proxy(running: Running) -> None:
    assert call(running, "pass+vault+test.Echo", "hello") == (0, "hello")
    assert call(running, "pass+vault+test.Argument+a+b") == (0, "a+b from proxy\n")


@pytest.mark.spec("PROXY-012", "PROXY-008")
def test_exit_codes_of_service_policy_and_rules(running: Running) -> None:
    for code in (1, 42, 125, 126, 127):
        assert unsaid(call(running, f"pass+vault+test.Exit+{code}")) == (code, "")
    assert call(running, "pass+vault+test.Denied")[0] == 126
    assert call(running, "pass+vault+test.Nothing")[0] == 127
    assert call(running, "pass+nobody+test.Echo")[0] == 126
    assert call(running, "strict+vault+test.Echo", "x") == (126, "")
    assert unsaid(call(running, "nochain+vault+test.Echo", "x")) == (125, "")
    again = "pass+proxy+qrexec-proxy+pass+vault+test.Echo"
    assert unsaid(call(running, again, "x")) == (125, "")


@pytest.mark.alone
@pytest.mark.spec("PROXY-031", "PROXY-023")
def test_a_timeout_ends_both_legs(running: Running) -> None:
    begun = time.monotonic()
    code, out = call(running, "brief+vault+test.Wait")
    assert (code, out) == (126, "up\n") and time.monotonic() - begun < 20
    # The service does not look at its streams, so the agent leaves it to itself, as in Qubes.
    running.run("vault", "pkill -f 'sleep 600'")
    assert "dst2src has not ended" in running.run("proxy", "sluice proxy log -n 1")[1]


@pytest.mark.spec("PROXY-047")
def test_an_outside_program_is_confined_in_a_domain_too(running: Running) -> None:
    assert call(running, "large+vault+test.Echo", "hello") == (0, "HELLO")


@pytest.mark.spec("PROXY-033")
def test_counts_outlive_a_restart_of_the_domain(running: Running) -> None:
    assert call(running, "two+vault+test.Echo", "1") == (0, "1")
    assert call(running, "two+vault+test.Echo", "2") == (0, "2")
    for word in ("stop", "start"):
        assert running.system.sluice(word, "proxy").returncode == 0
    assert call(running, "two+vault+test.Echo", "3") == (126, "")
    assert "2 calls in 1h" in running.run("proxy", "sluice proxy log -n 1")[1]


@pytest.mark.alone
@pytest.mark.spec("PROXY-024")
def test_a_target_domain_that_dies_ends_the_call(running: Running) -> None:
    process = running.start("work", "qrexec-client-vm proxy qrexec-proxy+pass+vault+test.Wait")
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    assert running.system.sluice("stop", "vault").returncode == 0
    assert process.wait(20) == 125
    assert running.system.sluice("start", "vault").returncode == 0
    assert call(running, "pass+vault+test.Echo", "again") == (0, "again")


@pytest.mark.alone
@pytest.mark.spec("PROXY-024")
def test_a_proxy_domain_that_dies_ends_the_call(running: Running) -> None:
    process = running.start("work", "qrexec-client-vm proxy qrexec-proxy+pass+vault+test.Wait")
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    assert running.system.sluice("stop", "proxy").returncode == 0
    assert process.wait(20) != 0
    assert running.system.sluice("start", "proxy").returncode == 0
    assert call(running, "pass+vault+test.Echo", "again") == (0, "again")
