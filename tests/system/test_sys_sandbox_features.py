"""What loosens a sandbox is dom0's alone to set, in each of three modes."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator

import pytest
from tests.support.sandbox import MODES, Machine, machine

from sluice.adminvm.api import request

pytestmark = [pytest.mark.sandbox, pytest.mark.timeout(120), pytest.mark.xdist_group("sandbox")]

SETTINGS = """
[domains.work]
features = { "sandbox.pids-max" = "300" }
[domains.nesting]
features = { "sandbox.allow-userns" = true }
"""
# Whatever a domain asks for is allowed.
POLICY = """\
* * work @adminvm allow
* * work @anyvm   allow target=dom0
"""
# What would set a feature in an AdminVM of Qubes OS, or a property that a feature stands beside.
CALLS = [
    "admin.vm.feature.Set+sandbox.allow-userns",
    "admin.vm.feature.Set+sandbox.pids-max",
    "admin.vm.feature.Remove+sandbox.pids-max",
    "admin.vm.CreateDisposable",
    "admin.vm.property.Set+maxmem",
    "qubes.FeaturesRequest",
    "qubes.NotifyTools",
    "sluice.Limits",
]


@pytest.fixture(params=MODES)
def inside(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A system whose domain ``work`` may call everything."""
    with machine(request.param, SETTINGS, POLICY) as made:
        yield made


def may_nest(inside: Machine, domain: str) -> bool:
    if platform.machine() != "x86_64":
        pytest.skip("numbers of x86-64")
    return inside.value("call(272, 0x10000000)", domain) == "THROUGH"


def processes(inside: Machine) -> str:
    listed = subprocess.run(
        inside.sluice("ls", "--limits"), capture_output=True, text=True,
        env=inside.environment, cwd="/", check=True,
    )  # fmt: skip
    rows = [line.split() for line in listed.stdout.splitlines()]
    return next(row[2] for row in rows if row[:2] == ["work", "processes"])


@pytest.mark.spec("CORE-181")
def test_a_domain_sets_no_feature_of_a_sandbox(inside: Machine) -> None:
    """Asks for features by every call that sets any, with a policy that allows all of them, and by
    what it may write of its own; then has itself started again. The system file alone decides."""
    assert may_nest(inside, "nesting")  # dom0 can
    assert not may_nest(inside, "work")
    for call in CALLS:
        for target in ("dom0", "work", "nesting", "@adminvm"):
            done = inside.shell(f"printf 1 | qrexec-client-vm {target} {call}")
            assert done.returncode != 0, (call, target, done)
            assert not done.stdout.startswith(b"0\0"), (call, target, done)  # the API's "done"
    user = "DEFAULT" if inside.mode == "single" else "root"
    inside.shell(
        "for d in /run/sluice/config /run/qubes-service /rw/config /usr/local/etc/qubes; do"
        " mkdir -p $d/feature; for n in sandbox.allow-userns feature/sandbox.allow-userns; do"
        " echo 1 > $d/$n; done; done",
        user=user,
    )
    control = inside.root / "run/control.sock"
    request(control, "stop", name="work")
    request(control, "start", name="work")
    assert not may_nest(inside, "work")
    assert processes(inside) == "300"
    audit = map(json.loads, (inside.root / "state/log/audit.jsonl").read_text().splitlines())
    allowed = {line["service"] for line in audit if line["decision"] == "allow"}
    assert {call.partition("+")[0] for call in CALLS} <= allowed  # it was not the policy
