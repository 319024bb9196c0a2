"""The program form against a stand-in ``qrexec-client-vm``, as in a Qubes VM."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.processes import alive
from tests.support.proxy import Vm, eventually, vm


@pytest.fixture(scope="module")
def idle() -> Iterator[tuple[int, int, float]]:
    """A call that idles while the other tests run: its process, its wake-ups so far, when."""
    with vm() as made:
        made.service("idle", "#!/bin/sh\necho up\nexec sleep 600\n")
        made.chain("look", "{ use = 'byte-limit', src2dst = '1M', dst2src = '1M' }")
        process = made.start("look+vault+idle")
        assert process.stdout.read(3) == b"up\n"
        eventually(lambda: rests(process.pid))
        yield process.pid, state(process.pid)[1], time.monotonic()
        process.kill()
        process.wait()


def state(pid: int) -> tuple[str, int]:
    """Return the state of a process and how often it was woken."""
    text = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    switches = int(fields["voluntary_ctxt_switches"]) + int(fields["nonvoluntary_ctxt_switches"])
    return fields["State"][0], switches


def rests(pid: int) -> bool:
    """Tell whether a process sleeps, and slept for a while."""
    before = state(pid)
    time.sleep(0.3)
    return before[0] == "S" and state(pid) == before


@pytest.fixture(autouse=True)
def _idle_from_the_beginning(idle: tuple[int, int, float]) -> None:
    """Start the idle call with the first test of the file."""


@pytest.fixture
def qube() -> Iterator[Vm]:
    with vm() as made:
        made.service("mirror", "#!/bin/sh\nexec cat\n")
        made.service("argument", '#!/bin/sh\nprintf %s "$QREXEC_SERVICE_ARGUMENT"\n')
        made.service("target", '#!/bin/sh\nprintf %s "$target"\n')
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


@pytest.mark.spec("PROXY-002")
@pytest.mark.parametrize("argument", ["x", "", "a+b+c", "+", "https---x.y_z"])
def test_the_argument_arrives_unchanged(qube: Vm, argument: str) -> None:
    assert qube.call(f"pass+vault+argument+{argument}").stdout == argument.encode()
    assert qube.calls() == [f"-- vault argument+{argument}"]


@pytest.mark.spec("PROXY-002")
def test_a_call_without_argument_has_none(qube: Vm) -> None:
    qube.call("pass+vault+argument")
    assert qube.calls() == ["-- vault argument"]


@pytest.mark.spec("PROXY-003", "PROXY-008")
@pytest.mark.parametrize(
    "name",
    ["", "pass", "pass+vault", "+vault+mirror", "pass++mirror", "pass+vault+", "pass+vault++x",
     "pass+vault+..", "pass+vault+a/b", "pa/ss+vault+mirror", "pass+va ult+mirror",
     "pass+1vault+mirror", "x" * 65 + "+vault+mirror", "pass+" + "v" * 32 + "+mirror",
     "pass+vault+" + "s" * 256, "pass+vault+mirror+\x1b[31m", "pass+vault+m\u00e9rror",
     "pass+@adminvm+mirror", "pass+@dispvm:+mirror"],
)  # fmt: skip
def test_a_malformed_name_is_refused_with_125_and_no_byte(qube: Vm, name: str) -> None:
    done = qube.call(name, b"secret")
    assert (done.returncode, done.stdout, done.stderr) == (125, b"", b"")
    assert "malformed" in qube.log()
    assert [r["cause"] for r in qube.records()] == ["malformed"]
    assert "\x1b" not in qube.log()
    assert qube.calls() == []


@pytest.mark.spec("PROXY-004", "PROXY-008")
def test_an_unknown_chain_is_refused_and_the_known_ones_are_named(qube: Vm) -> None:
    qube.chain("other", '"stop-src"')
    done = qube.call("pas+vault+mirror")
    assert (done.returncode, done.stdout, done.stderr) == (125, b"", b"")
    assert "unknown chain 'pas'" in qube.log()
    assert "other, pass" in qube.log()


@pytest.mark.spec("PROXY-005")
@pytest.mark.parametrize(
    ("written", "asked"),
    [("@default", "@default"), ("-default", "@default"), ("@dispvm", "@dispvm"),
     ("-dispvm", "@dispvm"), ("@dispvm:dvm", "@dispvm:dvm"), ("-dispvm-dvm", "@dispvm:dvm"),
     ("-dispvm-a-b.c", "@dispvm:a-b.c")],
)  # fmt: skip
def test_keywords_reach_the_target_leg(qube: Vm, written: str, asked: str) -> None:
    assert qube.call(f"pass+{written}+target").stdout == asked.encode()


@pytest.mark.spec("PROXY-006")
def test_a_call_of_the_proxy_to_itself_is_refused(qube: Vm) -> None:
    own = os.uname().nodename
    try:
        done = qube.call(f"pass+{own}+qrexec-proxy+pass+vault+mirror")
        assert done.returncode == 125 and "itself" in qube.log()
    finally:
        assert qube.calls() == []


@pytest.mark.spec("PROXY-007")
@pytest.mark.parametrize("source", [None, "", "a b", "\u00e9"])
def test_without_a_source_nothing_is_called(qube: Vm, source: str | None) -> None:
    done = qube.call("pass+vault+mirror", b"x", source=source)
    assert (done.returncode, done.stdout, done.stderr) == (125, b"", b"")
    assert qube.calls() == []
    assert "source" in qube.log()


@pytest.mark.spec("PROXY-008", "PROXY-053")
def test_stderr_of_the_far_end_goes_to_the_log_escaped_and_never_to_the_source(qube: Vm) -> None:
    qube.service("noisy", "#!/bin/sh\nprintf 'a\\033[31mred\\r\\n\\377tail' >&2\necho out\n")
    done = qube.call("pass+vault+noisy")
    assert (done.stdout, done.stderr) == (b"out\n", b"")
    assert "a\\x1b[31mred" in qube.log() and "\\xfftail" in qube.log()
    assert all(" " <= c <= "~" or c == "\n" for c in qube.log())


@pytest.mark.spec("PROXY-012")
@pytest.mark.parametrize("code", [0, 1, 42, 125, 126, 127, 137])
def test_the_far_exit_code_is_returned(qube: Vm, code: int) -> None:
    qube.service("code", f"#!/bin/sh\necho before\nexit {code}\n")
    done = qube.call("pass+vault+code")
    assert (done.returncode, done.stdout) == (code, b"before\n")
    (record,) = qube.records()
    assert record["exit_code"] == code and record["cause"] == "done"


@pytest.mark.spec("PROXY-012")
def test_a_client_that_a_signal_ended_is_trouble(qube: Vm) -> None:
    qube.service("dies", "#!/bin/sh\nkill -9 $$\n")
    assert qube.call("pass+vault+dies").returncode == 125


@pytest.mark.spec("PROXY-012")
def test_refused_and_not_found_of_the_far_end(qube: Vm) -> None:
    assert qube.call("pass+vault+nothere").returncode == 127
    (qube.directory / "refuse").touch()
    assert qube.call("pass+vault+mirror").returncode == 126
    assert "Request refused" in qube.log()


@pytest.mark.spec("PROXY-015")
def test_rules_of_a_chain_refuse_others(qube: Vm) -> None:
    rules = 'services = ["mirror", "argument+a"]\ntargets = ["vault"]\nsources = ["work"]\n'
    qube.chain("strict", '"pass"', rules=rules)
    assert qube.call("strict+vault+mirror", b"x").stdout == b"x"
    assert qube.call("strict+vault+argument+a").stdout == b"a"
    for name, source in (
        ("strict+vault+argument+b", "work"),
        ("strict+vault+argument", "work"),
        ("strict+bank+mirror", "work"),
        ("strict+vault+mirror", "other"),
        ("strict+@default+mirror", "work"),
    ):
        done = qube.call(name, b"x", source=source)
        assert (done.returncode, done.stdout, done.stderr) == (126, b"", b""), name
    assert len(qube.calls()) == 2
    assert [r["exit_code"] for r in qube.records()] == [0, 0, 126, 126, 126, 126, 126]


@pytest.mark.spec("PROXY-015")
@pytest.mark.parametrize("missing", ["services", "targets"])
def test_a_chain_must_say_what_the_source_may_choose(qube: Vm, missing: str) -> None:
    rules = "".join(f'{k} = "any"\n' for k in ("services", "targets") if k != missing)
    qube.chain("open", '"pass"', rules=rules)
    done = qube.call("open+vault+mirror", b"x")
    assert (done.returncode, done.stdout) == (125, b"")
    assert f"chains.open.{missing}" in qube.log() and "proxy.toml:" in qube.log()


@pytest.mark.spec("PROXY-019")
def test_half_close_source_first(qube: Vm) -> None:
    qube.service("count", "#!/bin/sh\nwc -c\n")
    assert qube.call("pass+vault+count", b"x" * 300_000).stdout.strip() == b"300000"


@pytest.mark.spec("PROXY-019")
def test_half_close_target_first(qube: Vm) -> None:
    """The target closes its output, the source goes on sending, and all of it arrives."""
    qube.service("sink", f"#!/bin/sh\nexec >&-\ncat > {qube.directory}/got\n")
    process = qube.start("pass+vault+sink")
    assert process.stdout.read() == b""
    process.stdin.write(b"x" * 200_000)
    process.stdin.close()
    assert process.wait(30) == 0
    assert (qube.directory / "got").read_bytes() == b"x" * 200_000


@pytest.mark.spec("PROXY-020")
def test_a_target_that_closes_its_stdin_early_does_not_end_the_other_direction(qube: Vm) -> None:
    qube.service("deaf", "#!/bin/sh\nexec <&-\nsleep 0.2\necho still here\n")
    done = qube.call("pass+vault+deaf", b"x" * 1_000_000)
    assert (done.returncode, done.stdout) == (0, b"still here\n")
    (record,) = qube.records()
    assert record["bytes"]["src2dst"]["discarded"] > 0


def test_a_closed_reader_may_abort(qube: Vm) -> None:
    qube.configure("", 'on_closed_reader = "abort"')
    qube.chain("pass", '"pass"')
    qube.service("deaf", "#!/bin/sh\nexec <&-\nsleep 30\n")
    done = qube.call("pass+vault+deaf", b"x" * 1_000_000)
    assert done.returncode == 125
    assert qube.records()[0]["cause"] == "closed-reader"


@pytest.mark.alone
@pytest.mark.spec("PROXY-023", "PROXY-031")
def test_abort_ends_both_legs_and_leaves_no_process(qube: Vm) -> None:
    """A far end that ignores SIGTERM: both streams end within a second, it itself after two."""
    qube.chain("brief", "{ use = 'timeout', dst2src = '100ms' }")
    qube.service("stubborn", "#!/bin/sh\ntrap '' TERM\necho up\nwhile :; do sleep 60; done\n")
    process = qube.start("brief+vault+stubborn")
    assert process.stdout.read(3) == b"up\n"
    begun = time.monotonic()
    assert process.stdout.read() == b""
    assert time.monotonic() - begun < 5
    assert process.wait(20) == 126
    assert 1.5 < time.monotonic() - begun < 10
    eventually(lambda: not any(alive(pid) for pid in qube.pids()))
    (record,) = qube.records()
    assert record["filter"] == "timeout" and "dst2src has not ended" in record["reason"]
    assert "timeout" in qube.log()


@pytest.mark.alone
@pytest.mark.spec("PROXY-024")
def test_a_source_that_vanishes_ends_the_far_end(qube: Vm) -> None:
    """Also where the target neither reads nor writes."""
    qube.service("idle", "#!/bin/sh\necho up\nexec sleep 60\n")
    process = qube.start("pass+vault+idle")
    assert process.stdout.read(3) == b"up\n"
    process.stdin.close()
    process.stdout.close()
    assert process.wait(15) == 125
    eventually(lambda: not any(alive(pid) for pid in qube.pids()))
    assert qube.records()[0]["cause"] == "source-gone"


@pytest.mark.alone
@pytest.mark.spec("PROXY-024")
def test_a_target_that_vanishes_ends_the_source(qube: Vm) -> None:
    process = qube.start("pass+vault+mirror")
    (pid,) = eventually(qube.pids)
    os.kill(pid, signal.SIGKILL)
    assert process.wait(10) == 125
    assert process.stdout.read() == b""


@pytest.mark.alone
@pytest.mark.spec("PROXY-024")
def test_a_proxy_that_vanishes_gives_both_sides_end_of_file(qube: Vm) -> None:
    qube.service("waits", f"#!/bin/sh\ncat >/dev/null\ntouch {qube.directory}/ended\n")
    process = qube.start("pass+vault+waits")
    eventually(qube.pids)
    process.kill()
    assert process.stdout.read() == b""
    eventually((qube.directory / "ended").exists)
    process.wait()


@pytest.mark.alone
@pytest.mark.spec("PROXY-023")
def test_sigterm_is_an_abort_with_a_record(qube: Vm) -> None:
    process = qube.start("pass+vault+mirror")
    eventually(qube.pids)
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 125
    (record,) = qube.records()
    assert record["cause"] == "killed" and "15" in record["reason"]


@pytest.mark.spec("PROXY-028")
def test_what_nobody_inspects_is_spliced(qube: Vm) -> None:
    qube.chain("mixed", "'pass'", "{ use = 'byte-limit', src2dst = '1M' }")
    data = os.urandom(200_000)
    assert qube.call("mixed+vault+mirror", data).stdout == data
    (record,) = qube.records()
    assert record["bytes"]["src2dst"]["spliced"] == 0
    assert record["bytes"]["dst2src"]["spliced"] == len(data)


@pytest.mark.spec("PROXY-029", "PROXY-030")
def test_a_limited_direction_ends_and_its_sender_is_not_blocked(qube: Vm) -> None:
    qube.service("read", "#!/bin/sh\nwc -c\n")
    qube.chain("limit", "{ use = 'byte-limit', src2dst = 1000, dst2src = -1 }")
    assert qube.call("limit+vault+read", b"x" * 3_000_000).stdout.strip() == b"1000"
    qube.chain("nosrc", "'stop-src'")
    assert qube.call("nosrc+vault+read", b"x" * 3_000_000).stdout.strip() == b"0"
    qube.service("flood", f"#!/bin/sh\nhead -c 3000000 /dev/zero\ncat > {qube.directory}/got\n")
    qube.chain("nodst", "'stop-dst'")
    done = qube.call("nodst+vault+flood", b"y" * 100_000)
    assert (done.returncode, done.stdout) == (0, b"")
    assert (qube.directory / "got").stat().st_size == 100_000


@pytest.mark.spec("PROXY-031")
def test_a_call_that_ends_in_time_is_left_alone(qube: Vm) -> None:
    qube.chain("brief", "{ use = 'timeout', src2dst = '1m', dst2src = '1m' }")
    assert qube.call("brief+vault+mirror", b"hello world\n").stdout == b"hello world\n"
    qube.chain("late", "{ use = 'timeout', src2dst = '200ms' }")
    process = qube.start("late+vault+mirror")
    assert process.wait(30) == 126
    assert "src2dst has not ended after 200ms" in qube.log()
    assert process.stdout.read() == b""


@pytest.mark.spec("PROXY-052")
def test_each_call_that_gets_as_far_as_a_chain_has_one_record(qube: Vm) -> None:
    qube.chain("no", "{ use = 'byte-limit', src2dst = 1, over = 'abort' }")
    assert qube.call("no+vault+mirror", b"xx").returncode == 126
    assert qube.call("pass+vault+mirror", b"x").returncode == 0
    assert qube.call("gone+vault+mirror", b"x").returncode == 125
    assert [record["cause"] for record in qube.records()] == ["filter", "done", "configuration"]
    assert len({record["id"] for record in qube.records()}) == 3


def test_a_missing_client_is_trouble(qube: Vm) -> None:
    qube.client.unlink()
    done = qube.call("pass+vault+mirror")
    assert (done.returncode, done.stdout, done.stderr) == (125, b"", b"")
    assert qube.records()[0]["cause"] == "far"


@pytest.mark.spec("PROXY-013")
def test_a_bad_configuration_is_named_in_the_log_and_nothing_runs(qube: Vm) -> None:
    qube.chain("typo", "{ use = 'timeot' }")
    done = qube.call("pass+vault+mirror")
    assert (done.returncode, done.stdout, done.stderr) == (125, b"", b"")
    if not Path("/run/systemd/journal/socket").exists() and not Path("/dev/log").exists():
        # Where its own log is configured cannot be known then.
        text = (qube.directory / "xdg/sluice/proxy/proxy.log").read_text()
        assert "did you mean 'timeout'" in text and "proxy.toml:" in text
    assert qube.calls() == []


def test_stdin_and_stdout_may_be_one_kind_or_another(qube: Vm) -> None:
    """Files, /dev/null and sockets serve as well as pipes."""
    source = qube.directory / "in"
    source.write_bytes(b"z" * 500_000)
    with source.open("rb") as stdin, (qube.directory / "out").open("wb") as stdout:
        assert qube.start("pass+vault+mirror", stdin=stdin, stdout=stdout).wait(30) == 0
    assert (qube.directory / "out").read_bytes() == b"z" * 500_000
    process = qube.start("pass+vault+mirror", stdin=subprocess.DEVNULL)
    assert process.stdout.read() == b"" and process.wait(30) == 0


@pytest.mark.spec("PROXY-040", "PROXY-041")
def test_filters_that_need_libraries_run_from_the_kept_configuration_too(qube: Vm) -> None:
    """The first call reads the configuration, the second one what was kept of it."""
    schema = qube.directory / "schema.json"
    schema.write_text('{"type": "object"}')
    qube.chain("lines", "{ use = 'lines', src2dst = { allow = ['a+'] } }")
    qube.chain("json", f"{{ use = 'json', src2dst = '{schema}' }}")
    for _ in range(2):
        assert qube.call("lines+vault+mirror", b"aa\n").stdout == b"aa\n"
        assert qube.call("lines+vault+mirror", b"ab\n").returncode == 126
        assert qube.call("json+vault+mirror", b"{}\n").stdout == b"{}\n"
        assert qube.call("json+vault+mirror", b"[]\n").returncode == 126


@pytest.mark.spec("PROXY-021")
def test_a_slow_reader_makes_the_writer_wait_and_the_proxy_stays_small(qube: Vm) -> None:
    qube.chain("look", "{ use = 'byte-limit', src2dst = '1G' }")
    qube.service(
        "slow", f"#!/bin/sh\nuntil [ -e {qube.directory}/go ]; do sleep 0.05; done\nwc -c\n"
    )
    process = qube.start("look+vault+slow")
    os.set_blocking(process.stdin.fileno(), False)
    sent, block = 0, b"x" * 65536
    quiet = time.monotonic() + 0.5
    while time.monotonic() < quiet:
        try:
            sent += os.write(process.stdin.fileno(), block)
            quiet = time.monotonic() + 0.5
        except BlockingIOError:
            time.sleep(0.01)
    assert 65536 <= sent < 2 << 20
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0])
    assert peak < 32 << 10
    (qube.directory / "go").touch()
    process.stdin.close()
    assert int(process.stdout.read()) == sent
    assert process.wait(30) == 0


@pytest.mark.alone
@pytest.mark.spec("PROXY-022")
def test_an_idle_call_does_not_wake_up(idle: tuple[int, int, float]) -> None:
    """Ten seconds in all; the other tests of this file take most of them."""
    pid, wakeups, since = idle
    time.sleep(max(10.2 - (time.monotonic() - since), 0))
    assert state(pid) == ("S", wakeups)
