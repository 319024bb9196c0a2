"""WIRE-129 to 144: what the agent does with EXEC_CMDLINE and JUST_EXEC."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest
from tests.support.agent import (
    DEADLINE,
    EXEC,
    EXIT,
    JUST,
    SELF,
    STDERR,
    STDIN,
    STDOUT,
    AgentUnderTest,
    Place,
    Wire,
    a_place,
    code,
    streams,
    until,
)
from tests.support.processes import alive

from sluice.agent import sessions
from sluice.agent.sessions import hang_up
from sluice.flow.reactor import Reactor

ME = SELF.encode()


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


@pytest.mark.spec("WIRE-129")
def test_the_command_starts_after_the_handshake(place: Place) -> None:
    agent = AgentUnderTest(place)
    witness = place.path / "run" / "witness"
    listener = agent.request(EXEC, 43, 1024, ME + b":touch %s" % bytes(witness))
    assert listener is not None
    wire = Wire(listener.accept()[0])
    wire.expect_hello()
    assert wire.silent()
    assert not witness.exists()
    wire.hello()
    assert code(wire.rest()) == 0
    assert witness.exists()
    wire.close()


@pytest.mark.spec("WIRE-130", "WIRE-131")
def test_a_shell_command_with_all_its_streams(place: Place) -> None:
    agent = AgentUnderTest(place)
    messages = agent.run(ME + b":echo hi; echo err >&2; exit 7")
    assert streams(messages, STDOUT) == b"hi\n"
    assert streams(messages, STDERR) == b"err\n"
    assert code(messages) == 7


@pytest.mark.spec("WIRE-132")
def test_a_killed_command(place: Place) -> None:
    assert code(AgentUnderTest(place).run(ME + b":kill -9 $$")) == 137


FAILED = [(STDOUT, b""), (STDERR, b"")]


def failed(status: int) -> list[tuple[int, bytes]]:
    """Return the whole sequence of a failed start (13.6)."""
    return [*FAILED, (EXIT, struct.pack("<i", status))]


@pytest.mark.spec("WIRE-133")
@pytest.mark.parametrize(
    "text",
    [
        b"nocolon",
        ME + b":QUBESRPC",
        ME + b":QUBESRPCx",
        ME + b":QUBESRPC s",
        ME + b":QUBESRPC  s d",
        ME + b":QUBESRPC +a d",
        ME + b":QUBESRPC s ",
        ME + b":QUBESRPC none ",
        ME + b":nogui:QUBESRPC s",
    ],
)
def test_commands_that_break_the_grammar(place: Place, text: bytes) -> None:
    """The user and the service ``s`` are right, and what is missing otherwise has another code."""
    place.service("s", "#!/bin/sh\n")
    assert AgentUnderTest(place).run(text) == failed(125)


@pytest.mark.spec("WIRE-134")
def test_an_unknown_service(place: Place) -> None:
    assert AgentUnderTest(place).run(ME + b":QUBESRPC test.None work") == failed(127)


@pytest.mark.spec("WIRE-135")
def test_just_exec_reports_before_the_command_ends(place: Place) -> None:
    agent = AgentUnderTest(place)
    fifo = place.path / "run" / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    witness = place.path / "run" / "witness"
    wire = agent.call(ME + b":read x <%s; echo $x >%s" % (bytes(fifo), bytes(witness)), JUST)
    assert wire.rest() == [(EXIT, struct.pack("<i", 0))]
    agent.terminated(43, 1024)
    assert not witness.exists()
    fifo.write_text("done\n")
    until(lambda: witness.exists() and witness.read_text() == "done\n", "the command's end")


@pytest.mark.spec("WIRE-135")
def test_just_exec_of_a_service_has_null_streams(place: Place) -> None:
    witness = place.path / "run" / "witness"
    place.service(
        "test.Look",
        "#!/bin/sh\na=$(readlink /proc/$$/fd/0)\nb=$(readlink /proc/$$/fd/1)\n"
        f"echo $a $b >{witness}.new; mv {witness}.new {witness}\n",
    )
    messages = AgentUnderTest(place).run(ME + b":QUBESRPC test.Look work", JUST)
    assert messages == [(EXIT, struct.pack("<i", 0))]
    until(witness.exists, "the service's end")
    assert witness.read_text() == "/dev/null /dev/null\n"


@pytest.mark.spec("WIRE-136")
@pytest.mark.parametrize(
    ("text", "status"),
    [
        (ME + b":QUBESRPC test.None work", 127),
        (ME + b":QUBESRPC test.Bad work", 127),
        (ME + b":QUBESRPC", 125),
        (b"somebody-else:true", 125),
    ],
)
def test_just_exec_that_cannot_start(place: Place, text: bytes, status: int) -> None:
    place.service("test.Bad", "#!/no/such/interpreter\n")
    assert AgentUnderTest(place).run(text, JUST) == [(EXIT, struct.pack("<i", status))]


@pytest.mark.spec("WIRE-137")
@pytest.mark.parametrize("greeting", [b"", struct.pack("<III", 0x300, 4, 1), b"\0\3"])
def test_a_failed_data_handshake_is_reported_once(place: Place, greeting: bytes) -> None:
    agent = AgentUnderTest(place)
    witness = place.path / "run" / "witness"
    listener = agent.request(EXEC, 43, 1024, ME + b":touch %s" % bytes(witness))
    assert listener is not None
    connection = listener.accept()[0]
    connection.sendall(greeting)
    connection.close()
    agent.terminated(43, 1024)
    assert agent.control.silent()
    assert not witness.exists()


@pytest.mark.spec("WIRE-138")
def test_a_background_child_holds_the_call(place: Place) -> None:
    agent = AgentUnderTest(place)
    fifo = place.path / "run" / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    wire = agent.call(ME + b":(read x <%s; echo late) & exit 5" % bytes(fifo))
    assert wire.silent(0.3)
    fifo.write_text("\n")
    messages = wire.rest()
    assert streams(messages, STDOUT) == b"late\n" and code(messages) == 5


@pytest.mark.spec("WIRE-139")
@pytest.mark.parametrize("user", [b"somebody-else", b""])
def test_another_user_is_refused(place: Place, user: bytes) -> None:
    place.service("test.Who", "#!/bin/sh\nid\n")
    agent = AgentUnderTest(place)
    assert code(agent.run(user + b":id")) == 125
    assert code(agent.run(user + b":QUBESRPC test.Who work", port=1025)) == 125
    agent.process.terminate()
    _, err = agent.process.communicate(timeout=DEADLINE)
    assert b": a command: refused" in err and b": test.Who: refused" in err
    assert b"refused to run as" in err


@pytest.mark.spec("WIRE-140", "WIRE-197")
@pytest.mark.parametrize("eof_first", [False, True])
def test_sigusr1_moves_the_output_to_stdin(place: Place, eof_first: bool) -> None:
    """WIRE-197: also after STDIN EOF; of several calls only the sender's is concerned."""
    agent = AgentUnderTest(place)
    other = agent.call(ME + b":cat", port=1030)
    read = "cat >/dev/null; " if eof_first else "read x; "
    script = f"{read}kill -USR1 $QREXEC_AGENT_PID; echo moved >&0; exec >&- 0<&-"
    wire = agent.call(ME + b":" + script.encode())
    wire.message(STDIN, b"line\n")
    if eof_first:
        wire.message(STDIN)
    messages = wire.rest()
    assert streams(messages, STDOUT) == b"moved\n" and code(messages) == 0
    other.message(STDIN, b"x")
    assert other.next() == (STDOUT, b"x") or other.next() == (STDOUT, b"x")


@pytest.mark.spec("WIRE-197")
@pytest.mark.parametrize("prefix", ["", "setsid -w "])
def test_sigusr1_of_a_descendant(place: Place, prefix: str) -> None:
    """Also of one in a session of its own, and of one that has gone by the time we look."""
    agent = AgentUnderTest(place)
    # A process of its own: not every system has kill as a program.
    kill = "/bin/sh -c 'kill -USR1 $QREXEC_AGENT_PID'"
    script = f":{prefix}{kill}; echo moved >&0; sleep 0"
    messages = agent.run(ME + script.encode())
    assert streams(messages, STDOUT) == b"moved\n" and code(messages) == 0


@pytest.mark.spec("WIRE-197")
def test_a_second_sigusr1_is_ignored(place: Place) -> None:
    agent = AgentUnderTest(place)
    script = b":kill -USR1 $QREXEC_AGENT_PID; kill -USR1 $QREXEC_AGENT_PID; echo moved >&0"
    messages = agent.run(ME + script)
    assert streams(messages, STDOUT) == b"moved\n" and code(messages) == 0


@pytest.mark.spec("WIRE-198")
def test_the_service_outlives_a_lost_channel(place: Place) -> None:
    agent = AgentUnderTest(place)
    fifo = place.path / "run" / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    witness = place.path / "run" / "witness"
    script = b":cat; echo eof >%s; read x <%s" % (bytes(witness), bytes(fifo))
    wire = agent.call(ME + script)
    wire.close()
    until(lambda: witness.exists() and witness.read_text() == "eof\n", "stdin's end")
    assert agent.control.silent()
    fifo.write_text("\n")
    agent.terminated(43, 1024)


@pytest.mark.spec("WIRE-254")
@pytest.mark.parametrize("unread", [0, 1 << 20])
def test_a_command_that_ends_with_its_caller(place: Place, unread: int) -> None:
    """All of its session, whatever waits for its input; not what made a session of its own."""
    agent = AgentUnderTest(place)
    script = (
        b":: hangup; setsid sleep 4711 </dev/null >/dev/null 2>&1 & echo $!;"
        b" sleep 1000 & echo $! $$; sleep 1000"
    )
    wire = agent.call(ME + script)
    said = b""
    while said.count(b"\n") < 2:
        message = wire.next()
        assert message is not None and message[0] == STDOUT
        said += message[1]
    stays, *go = map(int, said.split())
    until(lambda: os.getsid(stays) == stays, "the session of its own")
    assert isinstance(wire.writer, socket.socket)
    wire.writer.settimeout(1)
    with contextlib.suppress(TimeoutError):
        for _ in range(unread // 65536):
            wire.message(STDIN, bytes(65536))
    wire.close()
    try:
        until(lambda: not any(map(alive, go)), "the end of the command")
        assert alive(stays)
    finally:
        os.kill(stays, signal.SIGKILL)
    agent.terminated(43, 1024)


@pytest.mark.spec("WIRE-254")
@pytest.mark.parametrize("end", ["reading", "inside a message"])
def test_what_is_left_behind_ends_too_when_the_command_ends_by_the_loss(
    place: Place, end: str
) -> None:
    """The command itself has ended before it could be told that its caller is gone."""
    agent = AgentUnderTest(place)
    wire = agent.call(ME + b":: hangup; sleep 1000 & echo $!; exec cat")
    message = wire.next()
    assert message is not None and message[0] == STDOUT
    left = int(message[1])
    assert isinstance(wire.writer, socket.socket)
    if end == "reading":
        wire.writer.shutdown(socket.SHUT_WR)
    else:
        wire.send(struct.pack("<II", STDIN, 100) + b"part")
        wire.close()
    until(lambda: not alive(left), "the end of what was left")
    agent.terminated(43, 1024)
    wire.close()


@pytest.mark.spec("WIRE-254")
def test_the_end_of_input_is_no_end_of_the_caller(place: Place) -> None:
    agent = AgentUnderTest(place)
    wire = agent.call(ME + b":: hangup; cat; sleep 0.2; echo end")
    wire.message(STDIN)
    messages = wire.rest()
    assert (streams(messages, STDOUT), code(messages)) == (b"end\n", 0)


@pytest.mark.spec("WIRE-254")
def test_who_heeds_no_signal_is_killed() -> None:
    loop = Reactor()
    script = "trap '' HUP TERM; sleep 1000 & echo ready; wait; sleep 1000"
    with subprocess.Popen(
        ["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        hang_up(loop, process.pid, ((1, 0.05), (15, 0.05), (9, 0.0)))
        assert sessions.members(process.pid)
        end = loop.time() + DEADLINE
        while sessions.members(process.pid) and loop.time() < end:
            loop.run_once(0.01)
        assert process.wait(DEADLINE) == -9
    assert [number for number, _ in sessions.STEPS] == [1, 15, 9]
    loop.close()


@pytest.mark.spec("WIRE-015", "WIRE-016")
def test_a_megabyte_each_way(place: Place) -> None:
    agent = AgentUnderTest(place)
    wire = agent.call(ME + b":cat")
    sent = os.urandom(1 << 20)
    received = b""
    for at in range(0, len(sent), 50000):
        wire.message(STDIN, sent[at : at + 50000])
        while len(received) < at:
            message = wire.next()
            assert message is not None
            received += message[1] if message[0] == STDOUT else b""
    wire.message(STDIN)
    messages = wire.rest()
    assert received + streams(messages, STDOUT) == sent
    assert code(messages) == 0


# --- fork server --------------------------------------------------------------------------------


@pytest.mark.spec("WIRE-141")
@pytest.mark.parametrize("kind", [EXEC, JUST])
def test_a_fork_server_is_asked(place: Place, kind: int) -> None:
    listener = place.listen(f"run/fork.{SELF}")
    place.service("test.S", "#!/bin/sh\n")
    agent = AgentUnderTest(place)
    for port, text in ((1024, b"QUBESRPC test.S work"), (1025, b"id")):
        agent.request(kind, 43, port, ME + b":" + text, server=False)
        connection = listener.accept()[0]
        connection.settimeout(DEADLINE)
        head = connection.recv(16)
        assert struct.unpack("<iiiI", head) == (kind, 43, port, len(text) + 1)
        assert connection.recv(1000) == text + b"\0"
        assert agent.control.silent()
        connection.close()
        agent.terminated(43, port)


@pytest.mark.spec("WIRE-142")
@pytest.mark.parametrize(
    ("prefix", "settings"),
    [
        (b"nogui:", ""),
        (b"", "skip-service-descriptor = true\n"),
        (b"", "exit-on-client-eof = true\n"),
        (b"", "exit-on-service-eof = true\n"),
    ],
)
def test_when_the_fork_server_is_bypassed(place: Place, prefix: bytes, settings: str) -> None:
    listener = place.listen(f"run/fork.{SELF}")
    listener.setblocking(False)
    place.service("test.S", "#!/bin/sh\necho own\n")
    (place.path / "conf" / "test.S").write_text(settings)
    messages = AgentUnderTest(place).run(ME + b":" + prefix + b"QUBESRPC test.S work")
    assert streams(messages, STDOUT) == b"own\n"
    with pytest.raises(BlockingIOError):
        listener.accept()


@pytest.mark.spec("WIRE-142")
def test_no_fork_server_option_and_empty_pattern(place: Place) -> None:
    listener = place.listen(f"run/fork.{SELF}")
    listener.setblocking(False)
    for option in (["-S"], ["--no-fork-server"], ["-s", ""]):
        agent = AgentUnderTest(place, *option)
        assert streams(agent.run(ME + b":echo own"), STDOUT) == b"own\n"
        agent.process.terminate()
        agent.process.wait(DEADLINE)
    with pytest.raises(BlockingIOError):
        listener.accept()


@pytest.mark.spec("WIRE-143")
def test_force_user_selects_the_fork_server(place: Place) -> None:
    listener = place.listen("run/fork.forced")
    place.service("test.S", "#!/bin/sh\n")
    (place.path / "conf" / "test.S").write_text("force-user = 'forced'\n")
    agent = AgentUnderTest(place)
    agent.request(EXEC, 43, 1024, ME + b":QUBESRPC test.S work", server=False)
    connection = listener.accept()[0]
    assert connection.recv(1000)[16:] == b"QUBESRPC test.S work\0"
    connection.close()
    agent.terminated(43, 1024)


@pytest.mark.spec("WIRE-144")
@pytest.mark.parametrize("refusing", [False, True])
def test_without_a_fork_server_the_agent_does_it(place: Place, refusing: bool) -> None:
    if refusing:
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(place.path / "run" / f"fork.{SELF}"))
        stale.close()
    messages = AgentUnderTest(place).run(ME + b":echo own")
    assert streams(messages, STDOUT) == b"own\n"
