"""The filter ``program``: outside programs, confined."""

from __future__ import annotations

import http.server
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.proxy import Vm, eventually, vm

from sluice.proxy import confine
from sluice.proxy.filters.program import Program
from sluice.proxy.outside import try_confinement
from sluice.proxy.playbook import play
from sluice.proxy.schema import FieldError

CONFINES = try_confinement("/bin/true", []) is None
confines = pytest.mark.skipif(not CONFINES, reason="this kernel cannot confine programs")


@pytest.fixture
def qube() -> Iterator[Vm]:
    with vm() as made:
        made.service("mirror", "#!/bin/sh\nexec cat\n")
        yield made


def shell(text: str) -> str:
    """Return a command line in TOML that runs a shell script."""
    return f"['/bin/sh', '-c', '''{text}''']"


@confines
@pytest.mark.spec("PROXY-047")
def test_a_shell_filter_in_each_direction(qube: Vm) -> None:
    qube.chain(
        "both",
        "{ use = 'program', src2dst = ['tr', 'a-z', 'A-Z'], dst2src = ['tr', 'HW', 'JM'] }",
    )
    done = qube.call("both+vault+mirror", b"hello\nworld\n")
    assert (done.returncode, done.stdout) == (0, b"JELLO\nMORLD\n")
    qube.chain("large", "{ use = 'program', src2dst = ['cat'], dst2src = ['cat'] }")
    data = os.urandom(3_000_000)
    done = qube.call("large+vault+mirror", data)
    assert (done.returncode, done.stdout) == (0, data)


@confines
@pytest.mark.spec("PROXY-047")
def test_it_sees_who_calls_what(qube: Vm) -> None:
    text = 'cat; echo "$SLUICE_SOURCE $SLUICE_TARGET $SLUICE_SERVICE $SLUICE_ARGUMENT"; env >&2'
    qube.chain("who", f"{{ use = 'program', src2dst = {shell(text)} }}")
    done = qube.call("who+vault+mirror+a+b", b"x\n")
    assert done.stdout == b"x\nwork vault mirror a+b\n"
    assert "XDG_STATE_HOME" not in qube.log()


@confines
@pytest.mark.spec("PROXY-047")
@pytest.mark.parametrize(
    ("text", "reason"),
    [("exit 3", "exited with 3"), ("cat; exit 1", "exited with 1"), ("kill -9 $$", "by signal 9"),
     ("head -c 1; kill -11 $$", "by signal 11")],
)  # fmt: skip
def test_its_crash_aborts_the_call(qube: Vm, text: str, reason: str) -> None:
    qube.chain("crash", f"{{ use = 'program', dst2src = {shell(text)} }}")
    assert qube.call("crash+vault+mirror", b"hello").returncode == 126
    (record,) = qube.records()
    assert record["filter"] == "program" and reason in record["reason"]


@confines
@pytest.mark.spec("PROXY-047")
def test_its_hang_is_ended_by_the_timeout_and_nothing_of_it_is_left(qube: Vm) -> None:
    marker = f"7{os.getpid()}.25"
    qube.chain("hang", f"{{ use = 'program', src2dst = ['sleep', '{marker}'], timeout = '300ms' }}")
    process = qube.start("hang+vault+mirror")
    assert process.wait(20) == 126
    assert "has not ended after 300ms" in qube.records()[0]["reason"]
    assert not _running(marker)


@confines
@pytest.mark.spec("PROXY-047")
@pytest.mark.parametrize(("last", "code"), [("cat", 0), ("exit 3", 126), ("wait", 126)])
def test_what_it_started_ends_with_the_call(qube: Vm, last: str, code: int) -> None:
    """However the program ends: by itself, by its crash, by the timeout."""
    marker = f"{len(last)}{os.getpid()}.25"
    text = f"sleep {marker} >/dev/null 2>&1 & {last}"
    qube.chain("parent", f"{{ use = 'program', src2dst = {shell(text)}, timeout = '5s' }}")
    assert qube.call("parent+vault+mirror", b"hello").returncode == code
    # It is nobody's child: that it was killed is all that the proxy can know.
    eventually(lambda: not _running(marker))


def _running(marker: str) -> list[str]:
    """Return the processes that have ``marker`` in their command line."""
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and marker in _command_line(pid)]


def _command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@confines
@pytest.mark.spec("PROXY-047")
def test_its_flood_of_stderr_is_folded_and_hinders_nothing(qube: Vm) -> None:
    text = "yes flooding | head -n 200000 >&2; cat"
    qube.chain("flood", f"{{ use = 'program', src2dst = {shell(text)} }}")
    done = qube.call("flood+vault+mirror", b"hello")
    assert (done.returncode, done.stdout) == (0, b"hello")
    lines = qube.log().splitlines()
    assert len(lines) < 20_000
    assert any("more lines left out" in line for line in lines)


@confines
@pytest.mark.spec("PROXY-047")
def test_one_that_ends_early_closes_the_direction(qube: Vm) -> None:
    qube.chain("head", "{ use = 'program', src2dst = ['head', '-c', '5'] }")
    done = qube.call("head+vault+mirror", b"0123456789" * 100_000)
    assert (done.returncode, done.stdout) == (0, b"01234")


@confines
@pytest.mark.spec("PROXY-047")
def test_one_that_does_not_read_makes_the_sender_wait(qube: Vm) -> None:
    go = qube.directory / "go"
    text = f"until [ -e {go} ]; do sleep 0.05; done; wc -c"
    qube.chain(
        "slow", f"{{ use = 'program', src2dst = {shell(text)}, read = ['{qube.directory}'] }}"
    )
    process = qube.start("slow+vault+mirror")
    os.set_blocking(process.stdin.fileno(), False)
    sent, quiet = 0, time.monotonic() + 0.5
    while time.monotonic() < quiet:
        try:
            sent += os.write(process.stdin.fileno(), b"x" * 65536)
            quiet = time.monotonic() + 0.5
        except BlockingIOError:
            time.sleep(0.01)
    assert sent < 2 << 20
    go.touch()
    process.stdin.close()
    assert int(process.stdout.read()) == sent
    assert process.wait(30) == 0


@confines
@pytest.mark.spec("PROXY-047")
def test_confined_it_reads_no_file_but_those_named(qube: Vm) -> None:
    named, other = qube.directory / "named", qube.directory / "other"
    named.write_text("named")
    other.write_text("other")
    text = (
        f"cat {named}; cat {other}; cat /etc/passwd; cat /proc/1/status; echo x > {named};"
        f" echo x > {qube.directory}/new; echo x > /tmp/sluice-new-{os.getpid()};"
        f" rm -f {other}; mkdir {qube.directory}/d; ln -s / {qube.directory}/l; echo ."
    )
    qube.chain("files", f"{{ use = 'program', src2dst = {shell(text)}, read = ['{named}'] }}")
    assert qube.call("files+vault+mirror").stdout == b"named.\n"
    assert named.read_text() == "named" and other.read_text() == "other"
    assert not list(qube.directory.glob("[dln]")) and not (qube.directory / "new").exists()
    assert not Path(f"/tmp/sluice-new-{os.getpid()}").exists()


NETWORK = """
import os, sys
def attempt(what, do):
    try:
        do()
    except BaseException as error:
        return
    print("did", what, flush=True)
import _socket
attempt("socket", lambda: _socket.socket())
attempt("unix", lambda: _socket.socket(_socket.AF_UNIX))
attempt("pair", lambda: _socket.socketpair())
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    if libc.syscall(number, *args) < 0:
        raise OSError(ctypes.get_errno())
attempt("ptrace", lambda: call(101, 16, os.getppid(), 0, 0))
attempt("traceme", lambda: call(101, 0, 0, 0, 0))  # Landlock would let it
attempt("unshare", lambda: call(272, 0x10000000))
attempt("clone", lambda: call(56, 0x10000000 | 17, 0, 0, 0, 0))
attempt("mount", lambda: call(165, b"none", b"/tmp", b"tmpfs", 0, 0))
attempt("uring", lambda: call(425, 4, ctypes.create_string_buffer(120)))
attempt("x32", lambda: call(0x40000000 + 41, 1, 1, 0))
attempt("limit", lambda: call(302, os.getppid(), 7, None, ctypes.create_string_buffer(16)))
attempt("kill", lambda: os.kill(int(sys.argv[1]), 0))
attempt("shm", lambda: call(29, 0, 4096, 0o1600))
print("tried")
"""


@confines
@pytest.mark.spec("PROXY-047")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86_64")
def test_confined_it_has_no_network_no_tracing_no_namespaces_no_signals(qube: Vm) -> None:
    script = qube.directory / "attempts.py"
    script.write_text(NETWORK)
    command = f"['/usr/bin/python3', '-IS', '{script}', '{os.getpid()}']"
    qube.chain("net", f"{{ use = 'program', src2dst = {command}, read = ['{script}'] }}")
    assert qube.call("net+vault+mirror").stdout == b"tried\n"


@confines
@pytest.mark.spec("PROXY-047")
def test_confined_its_size_is_limited(qube: Vm) -> None:
    qube.chain(
        "size", f"{{ use = 'program', src2dst = {shell('ulimit -c; ulimit -n; ulimit -v')} }}"
    )
    limits = qube.call("size+vault+mirror").stdout.split()
    assert [int(limit) for limit in limits] == [0, confine.DESCRIPTORS, confine.MEMORY >> 10]


@confines
@pytest.mark.spec("PROXY-047")
def test_confined_it_cannot_fetch_over_the_network(qube: Vm) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"127.0.0.1/{server.server_port}"
    text = f"exec 3<>/dev/tcp/{address} && echo connected; echo done"
    command = f"['/bin/bash', '-c', '''{text}''']"
    try:
        qube.chain("no", f"{{ use = 'program', src2dst = {command} }}")
        qube.chain("yes", f"{{ use = 'program', src2dst = {command}, confine = false }}")
        assert b"connected" not in qube.call("no+vault+mirror").stdout
        assert b"connected" in qube.call("yes+vault+mirror").stdout
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.spec("PROXY-047")
def test_a_chain_does_not_load_where_a_program_cannot_be_run_as_configured(qube: Vm) -> None:
    for options, part in (
        ({"src2dst": ["/no/program"]}, "is no program"),
        ({"src2dst": ["cat"], "read": ["relative"]}, "absolute"),
        ({"src2dst": ["cat"], "read": ["/does/not/exist"]}, "absolute"),
    ):
        with pytest.raises(FieldError, match=part):
            play(Program, **options)  # type: ignore[arg-type]


@pytest.mark.spec("PROXY-047")
def test_a_chain_does_not_load_where_programs_cannot_be_confined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sluice.proxy.filters.program.try_confinement", lambda *_: "no Landlock")
    with pytest.raises(FieldError, match="no Landlock"):
        play(Program, src2dst=["cat"])
    play(Program, src2dst=["cat"], confine=False)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_system_call_filter_is_well_formed(machine: str) -> None:
    for keep in (True, False):
        code = confine.bpf(machine, keep_signals=keep)
        instructions = [code[at : at + 8] for at in range(0, len(code), 8)]
        for at, instruction in enumerate(instructions):
            kind, true, false = instruction[0], instruction[2], instruction[3]
            if kind & 7 == 5:
                assert at + 1 + max(true, false) < len(instructions)
        assert instructions[-1][0] == 6 and len(instructions) < 256
    with pytest.raises(confine.CannotConfine):
        confine.bpf("vax", keep_signals=True)


@confines
def test_programs_end_with_a_proxy_that_is_killed(qube: Vm) -> None:
    marker = f"8{os.getpid()}.25"
    qube.chain("long", f"{{ use = 'program', src2dst = ['sleep', '{marker}'] }}")
    process = qube.start("long+vault+mirror")

    def running() -> list[str]:
        return [
            entry
            for entry in os.listdir("/proc")
            if entry.isdigit() and _command_line(entry).startswith("/usr/bin/sleep\0" + marker)
        ]

    eventually(running)
    process.kill()
    process.wait()
    eventually(lambda: not running())
    assert subprocess.run(["true"], check=False).returncode == 0
