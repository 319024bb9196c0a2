"""The program form against a stand-in ``qrexec-client-vm``, as in a Qubes VM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.proxy import Vm, vm


@pytest.fixture
def qube() -> Iterator[Vm]:
    with vm() as made:
        made.service("mirror", "#!/bin/sh\nexec cat\n")
        made.chain("pass", '"pass"')
        yield made


@pytest.mark.spec("PROXY-001", "PROXY-007")
def test_a_call_goes_to_the_service_on_the_target_through_the_chain(qube: Vm) -> None:
    qube.chain("short", "{ use = 'byte-limit', src2dst = 5 }")
    done = qube.call("short+vault+mirror", b"hello world")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello", b"")
    assert qube.calls() == ["-- vault mirror"]
    (record,) = qube.records()
    assert record["source"] == "work" and record["chain"] == "short"
    assert record["bytes"]["src2dst"]["read"] == 11
    assert record["bytes"]["src2dst"]["written"] == 5
