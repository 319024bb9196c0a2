"""Running things as the user that a call names: alone, by setpriv, by PAM."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.agent import (
    DEADLINE,
    ROOT,
    STDERR,
    STDIN,
    STDOUT,
    AgentUnderTest,
    Place,
    a_place,
    code,
    streams,
)
from tests.support.processes import seen

from sluice.agent import users
from sluice.service.command import ServiceError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
BASE = {b"PATH": b"/usr/bin:/bin", b"QREXEC_AGENT_PID": b"7", b"QREXEC_REMOTE_DOMAIN": b"work"}


def test_our_own_user_only() -> None:
    own = users.OwnUser(b"me", b"/home/me")
    assert own.program(b"me", [b"/x"], BASE) == ([b"/x"], BASE, b"/home/me")
    assert own.shell(b"me", b"id", BASE)[0] == [b"/bin/sh", b"-c", b"id"]
    for ask in (own.program(b"me", [b"/x"], BASE), own.shell(b"me", b"", BASE)):
        assert ask[1] == BASE
    with pytest.raises(ServiceError, match="refused to run as 'you'") as caught:
        own.program(b"you", [b"/x"], BASE)
    assert caught.value.code == 125
    with pytest.raises(ServiceError, match=r"refused to run as '\\x1b'"):
        own.shell(b"\x1b", b"id", BASE)


def test_an_unknown_user() -> None:
    switch = users.SwitchUser(b"/usr/bin/setpriv", login=False)
    for user in (b"no-such-user", b"\xff", b""):
        with pytest.raises(ServiceError) as caught:
            switch.program(user, [b"/x"], BASE)
        assert caught.value.code == 125


def test_what_setpriv_is_given() -> None:
    name = os.fsencode(pwd.getpwuid(os.geteuid()).pw_name)
    account = users.Account(name)
    plain = users.SwitchUser(b"/usr/bin/setpriv", login=False)
    argv, environment, directory = plain.program(name, [b"/bin/sh", b"a b"], BASE)
    assert argv[:3] == [
        b"/usr/bin/setpriv",
        b"--reuid=%d" % account.uid,
        b"--regid=%d" % account.gid,
    ]
    assert argv[-3:] == [b"--", b"/bin/sh", b"a b"]
    assert environment[b"HOME"] == account.home == directory
    assert environment[b"USER"] == environment[b"LOGNAME"] == name
    assert environment[b"QREXEC_REMOTE_DOMAIN"] == b"work"
    argv = plain.shell(name, b"id", BASE)[0]
    assert argv[-4:] == [account.shell, b"-l", b"-c", b"id"]
    argv = users.SwitchUser(b"/usr/bin/setpriv", login=True).program(name, [b"/x"], BASE)[0]
    assert b"-lc" in argv and argv[-1] == b"/x"


def test_the_login_script_sets_the_variables_and_interprets_nothing(tmp_path: Path) -> None:
    profile = tmp_path / ".profile"
    profile.write_text(
        "export QREXEC_REMOTE_DOMAIN=forged QREXEC_REQUESTED_TARGET=forged FROM_PROFILE=1\n"
    )
    evil = b"$(touch %s/evil)`id`;'\"" % bytes(tmp_path)
    variables = {b"QREXEC_REMOTE_DOMAIN": b"work", b"QREXEC_SERVICE_ARGUMENT": evil}
    argv = users.login_wrapper(variables, [b"/usr/bin/env", b"-0"])
    out = subprocess.run(
        argv, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, capture_output=True, check=True
    ).stdout
    found = dict(entry.split(b"=", 1) for entry in out.split(b"\0") if entry)
    assert found[b"QREXEC_REMOTE_DOMAIN"] == b"work"
    assert found[b"QREXEC_SERVICE_ARGUMENT"] == evil
    assert b"QREXEC_REQUESTED_TARGET" not in found
    assert found[b"FROM_PROFILE"] == b"1"
    assert found[b"PWD"] == bytes(tmp_path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(("path", "status"), [(b"/no/such", 127), (b"/etc/passwd", 126)])
def test_the_shells_own_statuses_under_the_login_script(path: bytes, status: int) -> None:
    argv = users.login_wrapper({}, [path])
    done = subprocess.run(argv, env={"HOME": "/"}, capture_output=True, check=False)
    assert done.returncode == status


# --- as root, through the real agent ------------------------------------------------------------


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    # The programs are started as we are, that is as root.
    monkeypatch.setattr("tests.support.agent.as_user", list)
    with a_place() as made:
        yield made


@as_root
@pytest.mark.skipif(os.path.exists(users.PAM_SERVICE), reason="PAM would be used here")
def test_a_root_agent_runs_each_call_as_its_user(place: Place) -> None:
    place.service(
        "test.Who",
        '#!/bin/sh\necho "$(id -un) $(id -Gn) $HOME $USER $LOGNAME $SHELL $(pwd)"\n'
        'echo "$QREXEC_REMOTE_DOMAIN ${QREXEC_SERVICE_ARGUMENT-unset} $QREXEC_AGENT_PID"\n',
    )
    agent = AgentUnderTest(place, "-S")
    entry = pwd.getpwnam("nobody")
    home = entry.pw_dir if os.path.isdir(entry.pw_dir) else os.getcwd()
    messages = agent.run(b"nobody:QUBESRPC test.Who+a work")
    lines = streams(messages, STDOUT).decode().splitlines()
    assert lines[0] == f"nobody nogroup {entry.pw_dir} nobody nobody {entry.pw_shell} {home}"
    assert lines[1] == f"work a {agent.process.pid}"
    lines = streams(agent.run(b"root:QUBESRPC test.Who work", port=1025), STDOUT).splitlines()
    assert lines[0].startswith(b"root root /root root root")
    messages = agent.run(b"root:id -un; echo $0; pwd; exit 3", port=1026)
    assert streams(messages, STDOUT).splitlines()[::2] == [b"root", b"/root"]
    assert code(messages) == 3
    messages = agent.run(b"no-such-user:id", port=1027)
    assert messages[:2] == [(STDOUT, b""), (STDERR, b"")] and code(messages) == 125


# --- PAM ----------------------------------------------------------------------------------------

RUN = """
import os, sys
sys.path.insert(0, sys.argv[1])
from sluice.agent import pam_session
words = [os.fsencode(word) for word in sys.argv[3:]]
try:
    status = pam_session.run(words[0], words[1], words[2:], directory=os.fsencode(sys.argv[2]))
except pam_session.PamError as error:
    print(error, file=sys.stderr)
    status = 125
os._exit(status)
"""

PERMIT = """
auth     required pam_permit.so
account  required pam_permit.so
session  required pam_env.so readenv=0 conffile={place}/env.conf
session  optional pam_exec.so {place}/mark
session  required pam_permit.so
"""


def pam(place: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["/usr/bin/python3", "-IS", "-c", RUN, str(ROOT / "src"), str(place), *words],
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", "QREXEC_AGENT_PID": "7", "QREXEC_FOO": "x", "OTHER": "x"},
        timeout=DEADLINE,
        check=False,
    )


@pytest.fixture
def pam_place(tmp_path: Path) -> Path:
    (tmp_path / "qrexec").write_text(PERMIT.format(place=tmp_path))
    (tmp_path / "env.conf").write_text("FROM_PAM DEFAULT=yes\n")
    mark = tmp_path / "mark"
    mark.write_text(f'#!/bin/sh\necho "$PAM_TYPE $PAM_USER $PAM_SERVICE" >>{tmp_path}/log\n')
    mark.chmod(0o755)
    return tmp_path


@as_root
def test_a_pam_session_is_opened_and_closed(pam_place: Path) -> None:
    done = pam(pam_place, "nobody", "shell", "id -un")
    shell = pwd.getpwnam("nobody").pw_shell
    if "nologin" not in shell:
        assert done.stdout == b"nobody\n"
    log = (pam_place / "log").read_text().splitlines()
    assert log == ["open_session nobody qrexec", "close_session nobody qrexec"]


@as_root
def test_what_runs_in_a_pam_session(pam_place: Path) -> None:
    script = 'id -un; id -Gn; env | sort | grep -v "^_=\\|^PWD\\|^SHLVL\\|^OLDPWD"; exit 9'
    done = pam(pam_place, "nobody", "program", "/bin/sh", "-c", script)
    entry = pwd.getpwnam("nobody")
    assert done.returncode == 9, done.stderr
    assert done.stdout.decode().splitlines() == [
        "nobody",
        "nogroup",
        "FROM_PAM=yes",
        f"HOME={entry.pw_dir}",
        "LOGNAME=nobody",
        "PATH=/usr/bin:/bin",
        "QREXEC_AGENT_PID=7",
        f"SHELL={entry.pw_shell}",
        "USER=nobody",
    ]


@pytest.fixture
def pam_agent(place: Place) -> AgentUnderTest:
    """An agent on a machine that has a PAM service for it: in mounts of its own."""
    if not os.path.isdir("/etc/pam.d"):
        pytest.skip("no PAM here")
    directory = place.path / "pam.d"
    shutil.copytree("/etc/pam.d", directory)
    (place.path / "env.conf").write_text("FROM_PAM DEFAULT=yes\n")
    log = place.path / "sessions"
    (place.path / "mark").write_text(f'#!/bin/sh\necho "$PAM_TYPE $PAM_USER" >>{log}\n')
    (place.path / "mark").chmod(0o755)
    (directory / "qrexec").write_text(PERMIT.format(place=place.path))
    mount = f'mount --bind {directory} /etc/pam.d && exec "$@"'
    prefix = ["unshare", "-m", "--propagation", "private", "sh", "-c", mount, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mounts of our own here")
    return AgentUnderTest(place, "-S", prefix=prefix)


@as_root
def test_an_agent_opens_a_pam_session_for_each_call(pam_agent: AgentUnderTest) -> None:
    place, agent = pam_agent.place, pam_agent
    place.service(
        "test.Who",
        '#!/bin/sh\necho "$(id -un) $(id -Gn) $FROM_PAM $USER"\n'
        'echo "$QREXEC_REMOTE_DOMAIN ${QREXEC_SERVICE_ARGUMENT-unset} $QREXEC_AGENT_PID"\n'
        'read -r line; echo "$line" >&2; exit 7\n',
    )
    wire = agent.call(b"nobody:QUBESRPC test.Who+a work")
    wire.message(STDIN, b"input\n")
    messages = wire.rest()
    agent.terminated(43, 1024)
    lines = streams(messages, STDOUT).decode().splitlines()
    assert lines == ["nobody nogroup yes nobody", f"work a {agent.process.pid}"]
    assert streams(messages, STDERR) == b"input\n" and code(messages) == 7
    sessions = (place.path / "sessions").read_text().splitlines()
    assert sessions == ["open_session nobody", "close_session nobody"]


@as_root
def test_endings_of_calls_in_pam_sessions(pam_agent: AgentUnderTest) -> None:
    agent = pam_agent
    for port, (text, status) in enumerate(
        [
            (b"root:kill -9 $$", 137),
            (b"root:echo $0; exit 3", 3),
            (b"no-such-user:id", 125),
            (b"root:QUBESRPC test.None work", 127),
        ],
        1024,
    ):
        messages = agent.run(text, port=port)
        assert code(messages) == status, text
    wire = agent.call(b"root:kill -USR1 $QREXEC_AGENT_PID; echo moved >&0; exec >&-", port=1100)
    messages = wire.rest()
    assert streams(messages, STDOUT) == b"moved\n" and code(messages) == 0


@as_root
@pytest.mark.spec("WIRE-254")
def test_what_runs_in_a_pam_session_ends_with_its_caller(pam_agent: AgentUnderTest) -> None:
    """Also what only heeds SIGTERM, though the command itself ends before. Then PAM hears of it."""
    agent = pam_agent
    script = b"(trap '' HUP; exec sleep 1000) & echo $!; sleep 1000 & echo $! $$; sleep 1000"
    wire = agent.call(b"root:: hangup; " + script)
    said = b""
    while said.count(b"\n") < 2:
        message = wire.next()
        assert message is not None and message[0] == STDOUT
        said += message[1]
    processes = seen(map(int, said.split()))
    assert len(processes) == 3
    wire.close()
    try:
        agent.terminated(43, 1024)
        assert not any(process.alive() for process in processes)
    finally:
        for process in processes:
            process.kill()
    log = (agent.place.path / "sessions").read_text().splitlines()
    assert log == ["open_session root", "close_session root"]


@as_root
@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["root", "program", "/bin/sh", "-c", "kill -9 $$"], 137),
        (["root", "program", "/no/such"], 127),
        (["root", "program", "/etc/passwd"], 125),
        (["no-such-user", "program", "/bin/true"], 125),
    ],
)
def test_endings_in_a_pam_session(pam_place: Path, words: list[str], status: int) -> None:
    assert pam(pam_place, *words).returncode == status


@as_root
def test_a_session_that_cannot_be_closed_takes_nothing_from_the_status(pam_place: Path) -> None:
    (pam_place / "mark").write_text('#!/bin/sh\ntest "$PAM_TYPE" != close_session\n')
    rules = (pam_place / "qrexec").read_text()
    (pam_place / "qrexec").write_text(rules.replace("optional pam_exec", "required pam_exec"))
    assert pam(pam_place, "root", "program", "/bin/sh", "-c", "exit 9").returncode == 9
    assert pam(pam_place, "root", "program", "/bin/true").returncode == 0


@as_root
def test_the_helper_keeps_no_stream_open(pam_place: Path) -> None:
    python = ["/usr/bin/python3", "-IS", "-c", RUN, str(ROOT / "src"), str(pam_place)]
    script = "echo x; exec >&- 2>&-; read y; exit 3"
    process = subprocess.Popen(
        [*python, "root", "program", "/bin/sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.read() == b"x\n"
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(DEADLINE) == 3
    process.stdout.close()


@as_root
@pytest.mark.parametrize("kind", ["auth", "account", "session"])
def test_what_pam_denies(pam_place: Path, kind: str) -> None:
    lines = (pam_place / "qrexec").read_text().splitlines()
    lines.insert(0, f"{kind} requisite pam_deny.so")
    (pam_place / "qrexec").write_text("\n".join(lines) + "\n")
    done = pam(pam_place, "root", "program", "/bin/echo", "ran")
    assert done.returncode == 125 and done.stdout == b"" and b"pam_" in done.stderr


def test_usage_of_the_helper() -> None:
    helper = ROOT / "src" / "sluice" / "bin" / "qrexec-pam-session"
    done = subprocess.run([helper, "root", "bogus"], capture_output=True, check=False)
    assert done.returncode == 125 and b"usage" in done.stderr
