"""The service side of the data engine, its other side played message by message."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
from tests.support.flow import Call, Driver, count_fds, pattern

from sluice.wire import messages as m


@pytest.fixture(params=["passed", "socket"])
def make(request: pytest.FixtureRequest, each_driver: Driver) -> Iterator[Callable[..., Call]]:
    """Make calls over each transport and on each loop; nothing of them may stay open."""
    made: list[Call] = []

    def build(**options: object) -> Call:
        call = Call(each_driver, caller=False, transport=request.param, **options)  # type: ignore[arg-type]
        made.append(call)
        return call

    # What asyncio and the nested epoll need for themselves is made now.
    warm = Call(each_driver, caller=False)
    warm.close()
    before = count_fds()
    yield build
    for call in made:
        call.close()
    assert count_fds() <= before


@pytest.mark.spec("WIRE-246")
def test_a_whole_call(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(has_process=True)
    each_driver.until(lambda: call.peer.messages)
    assert call.peer.messages == [(m.HELLO, b"\x04\0\0\0")]
    call.peer.send(m.DATA_STDIN, b"question")
    call.peer.send(m.DATA_STDIN)
    each_driver.until(lambda: call.stdin.eof)
    assert call.stdin.received == b"question"
    call.stdout.write(b"answer")
    each_driver.until(lambda: call.peer.stream(m.DATA_STDOUT) == b"answer")
    call.stderr.write(b"remark")
    each_driver.until(lambda: call.peer.stream(m.DATA_STDERR) == b"remark")
    call.stdout.close()
    call.stderr.close()
    each_driver.until(lambda: call.peer.ended(m.DATA_STDOUT) and call.peer.ended(m.DATA_STDERR))
    assert call.peer.exit_code() is None
    call.channel.process_exited(42)
    assert call.finish() == 42
    each_driver.until(lambda: call.peer.eof)
    assert call.peer.messages[-1] == (m.DATA_EXIT_CODE, b"\x2a\0\0\0")
    assert not call.channel.lost
    assert (call.channel.bytes_in, call.channel.bytes_out) == (8, 12)


@pytest.mark.spec("WIRE-246")
def test_the_command_starts_after_the_handshake(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    call = make(late=True, version=None, has_process=True)
    call.channel.start()
    each_driver.until(lambda: call.peer.messages)
    assert not call.channel.opened
    # HELLO and data in one piece: what came with the handshake is kept for the command.
    call.peer.write(m.encode_hello() + m.encode(m.DATA_STDIN, b"early") + m.encode(m.DATA_STDIN))
    each_driver.until(lambda: call.stdin.eof)
    assert call.stdin.received == b"early"


def test_nothing_is_read_before_the_streams_are_there(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    opened: list[bool] = []
    call = make(late=True, on_open=lambda: opened.append(True))
    call.peer.write(m.encode(m.DATA_STDIN, b"waits"))
    each_driver.quiet()
    assert opened == [True]
    call.channel.attach(*call.streams, has_process=True)
    each_driver.until(lambda: call.stdin.received == b"waits")


def test_read_first(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(hello="read-first", version=None)
    call.channel.start()
    each_driver.quiet()
    assert not call.peer.received
    call.peer.hello()
    each_driver.until(lambda: call.peer.messages)
    assert call.peer.messages[0] == (m.HELLO, b"\x04\0\0\0")


def test_hello_done_elsewhere(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(hello="done", version=None, stderr=False)
    call.channel.start()
    each_driver.until(lambda: call.peer.messages)
    assert call.peer.messages == [(m.DATA_STDERR, b"")]


@pytest.mark.parametrize(
    "raw",
    [
        m.encode_hello(1),
        m.encode_hello(0),
        m.encode(m.HELLO, b"\4\0\0\0\0"),
        m.encode(m.HELLO),
        m.encode(m.DATA_STDIN, b"data"),
        m.HEADER.pack(0xFFFFFFFF, 0xFFFFFFFF),
    ],
)
@pytest.mark.spec("WIRE-246")
def test_a_bad_handshake_is_fatal(
    make: Callable[..., Call], each_driver: Driver, raw: bytes
) -> None:
    call = make(version=None)
    call.channel.start()
    call.peer.write(raw)
    call.fatal()
    assert not call.channel.opened
    each_driver.until(lambda: call.peer.eof)
    assert [kind for kind, _ in call.peer.messages] == [m.HELLO]


@pytest.mark.parametrize("first", [b"", b"\0\3", m.encode_hello()[:10]])
def test_a_channel_that_ends_before_hello_is_fatal(make: Callable[..., Call], first: bytes) -> None:
    call = make(version=None)
    call.channel.start()
    call.peer.write(first)
    call.driver.quiet()
    call.peer.close()
    call.fatal()
    assert not call.channel.opened


def test_a_silent_peer_is_given_up(make: Callable[..., Call]) -> None:
    call = make(version=None, handshake_timeout=0.05)
    call.channel.start()
    assert "in time" in call.fatal()


def test_huge_version_is_version_4(make: Callable[..., Call]) -> None:
    call = make(version=0xFFFFFFFF)
    assert call.channel.state.limit == 65536


@pytest.mark.spec("WIRE-185")
def test_version_2_limits_both_ways(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(version=2)
    data = pattern(100_000)
    call.stdout.write(data)
    each_driver.until(lambda: call.peer.stream(m.DATA_STDOUT) == data)
    assert max(len(body) for _, body in call.peer.messages) <= 4096
    call.peer.send(m.DATA_STDIN, bytes(4096))
    each_driver.until(lambda: len(call.stdin.received) == 4096)
    call.peer.send(m.DATA_STDIN, bytes(4097))
    call.fatal()
    assert len(call.stdin.received) == 4096


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.spec("WIRE-186")
def test_version_3_and_4_limit(
    make: Callable[..., Call], each_driver: Driver, version: int
) -> None:
    call = make(version=version)
    data = pattern(65536)
    call.peer.send(m.DATA_STDIN, data)
    each_driver.until(lambda: call.stdin.received == data)
    call.peer.write(m.HEADER.pack(m.DATA_STDIN, 65537))
    call.fatal()


@pytest.mark.parametrize("kind", [m.HELLO, m.EXEC_CMDLINE, 0, 0x18F, 0x194, 0xFFFFFFFF])
@pytest.mark.spec("WIRE-187")
def test_unknown_types_are_fatal(make: Callable[..., Call], kind: int) -> None:
    call = make(has_process=True)
    call.peer.send(kind, b"\4\0\0\0")
    call.fatal()
    assert call.channel.opened
    call.driver.until(lambda: call.stdin.eof)


@pytest.mark.parametrize("cut", [1, 7, 8, 12])
def test_a_channel_that_ends_inside_a_message_is_fatal(make: Callable[..., Call], cut: int) -> None:
    call = make(has_process=True)
    call.peer.write(m.encode(m.DATA_STDIN, b"0123456789")[:cut])
    call.driver.quiet()
    call.peer.close()
    call.fatal()


@pytest.mark.spec("WIRE-188")
def test_stray_types_on_the_service_side(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(has_process=True)
    for _ in range(3):
        call.peer.send(m.DATA_STDERR, b"not for you")
        call.peer.send(m.DATA_EXIT_CODE, b"\7\0\0\0")
    call.peer.send(m.DATA_STDOUT, b"taken as ")
    call.peer.send(m.DATA_STDOUT, b"input")
    call.peer.send(m.DATA_STDOUT)
    each_driver.until(lambda: call.stdin.eof)
    assert call.stdin.received == b"taken as input"
    # Each oddity is remarked on once, however often it happens.
    assert len(call.warnings) == len(set(call.warnings)) == 2
    call.stdout.close()
    call.stderr.close()
    call.channel.process_exited(0)
    assert call.finish() == 0


@pytest.mark.spec("WIRE-190")
@pytest.mark.parametrize("size", [10, 65536])
def test_data_for_a_closed_stdin_is_discarded(
    make: Callable[..., Call], each_driver: Driver, size: int
) -> None:
    call = make(has_process=True)
    call.stdin.close()
    each_driver.until(lambda: not call.channel.state.in_open)
    for _ in range(20):
        call.peer.send(m.DATA_STDIN, bytes(size))
    call.peer.send(m.DATA_STDIN)
    call.peer.send(m.DATA_STDIN, b"even after its end")
    each_driver.until(lambda: not call.peer.unsent)
    call.stdout.write(b"still here")
    each_driver.until(lambda: call.peer.stream(m.DATA_STDOUT) == b"still here")
    assert not call.over


@pytest.mark.spec("WIRE-191")
@pytest.mark.parametrize("stdin", ["pipe", "socket"])
def test_a_service_that_closes_stdin_early_loses_no_output(
    make: Callable[..., Call], each_driver: Driver, stdin: str
) -> None:
    call = make(has_process=True, stdin=stdin)
    call.peer.send(m.DATA_STDIN, b"unread")
    each_driver.until(lambda: call.stdin.received)
    call.stdin.close()
    data = pattern(500_000)
    call.stdout.write(data)
    call.stdout.end()
    each_driver.until(lambda: call.peer.ended(m.DATA_STDOUT))
    assert call.peer.stream(m.DATA_STDOUT) == data
    assert not call.over
    call.stderr.close()
    call.channel.process_exited(3)
    assert call.finish() == 3


@pytest.mark.spec("WIRE-192")
@pytest.mark.parametrize("stdin", ["pipe", "socket"])
@pytest.mark.parametrize("chunk", [700, 65536])
def test_input_waits_for_a_service_that_does_not_read(
    make: Callable[..., Call], each_driver: Driver, stdin: str, chunk: int
) -> None:
    call = make(has_process=True, stdin=stdin)
    call.stdin.deafen()
    data = pattern(1 << 18)
    for start in range(0, len(data), chunk):
        call.peer.send(m.DATA_STDIN, data[start : start + chunk])
    call.peer.send(m.DATA_STDIN)
    each_driver.quiet()
    out = pattern(300_000, 7)
    call.stdout.write(out)
    each_driver.until(lambda: call.peer.stream(m.DATA_STDOUT) == out)
    assert not call.stdin.received
    call.stdin.listen()
    each_driver.until(lambda: call.stdin.eof)
    assert call.stdin.received == data


def test_output_waits_for_a_caller_that_does_not_read(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    call = make(has_process=True)
    call.peer.deafen()
    out = pattern(2_000_000)
    call.stdout.write(out)
    call.stdout.end()
    each_driver.quiet()
    data = pattern(500_000, 3)
    for start in range(0, len(data), 50_000):
        call.peer.send(m.DATA_STDIN, data[start : start + 50_000])
    each_driver.until(lambda: call.stdin.received == data)
    call.peer.listen()
    each_driver.until(lambda: call.peer.ended(m.DATA_STDOUT))
    assert call.peer.stream(m.DATA_STDOUT) == out


@pytest.mark.spec("WIRE-193")
def test_closing_stdout_early(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(has_process=True)
    call.stdout.close()
    call.stderr.close()
    call.peer.send(m.DATA_STDIN)
    each_driver.until(lambda: call.peer.ended(m.DATA_STDOUT) and call.peer.ended(m.DATA_STDERR))
    each_driver.quiet()
    assert call.peer.exit_code() is None and not call.over
    call.channel.process_exited(5)
    assert call.finish() == 5
    each_driver.until(lambda: call.peer.eof)
    assert call.peer.exit_code() == 5


def test_a_descendant_that_keeps_stdout_delays_the_exit_code(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    call = make(has_process=True)
    call.channel.process_exited(0)
    each_driver.until(lambda: call.stdin.eof)
    call.stdout.write(b"from a descendant")
    each_driver.until(lambda: call.peer.stream(m.DATA_STDOUT))
    assert call.peer.exit_code() is None
    call.stdout.close()
    call.stderr.close()
    assert call.finish() == 0


@pytest.mark.spec("WIRE-194")
@pytest.mark.parametrize("first", ["remote", "service"])
def test_socket_service(make: Callable[..., Call], each_driver: Driver, first: str) -> None:
    call = make(stdin="socket", stdout="same", stderr=False, service_descriptor=b"svc+arg work\0")
    each_driver.until(lambda: len(call.peer.messages) == 2)
    assert call.peer.messages[1] == (m.DATA_STDERR, b"")
    call.peer.send(m.DATA_STDIN, b"request")
    each_driver.until(lambda: call.stdin.received == b"svc+arg work\0request")
    if first == "remote":
        call.peer.send(m.DATA_STDIN)
        each_driver.until(lambda: call.stdin.eof)
        call.stdin.write(b"reply after your end")
        call.stdin.end()
        each_driver.until(lambda: call.peer.ended(m.DATA_STDOUT))
        assert call.peer.stream(m.DATA_STDOUT) == b"reply after your end"
    else:
        call.stdin.end()
        each_driver.until(lambda: call.peer.ended(m.DATA_STDOUT))
        each_driver.quiet()
        assert not call.over
        call.peer.send(m.DATA_STDIN, b"after your end")
        each_driver.until(lambda: call.stdin.received.endswith(b"after your end"))
        call.peer.send(m.DATA_STDIN)
        each_driver.until(lambda: call.stdin.eof)
    assert call.finish() == 0
    each_driver.until(lambda: call.peer.eof)
    assert call.peer.exit_code() == 0


@pytest.mark.spec("WIRE-194")
def test_a_socket_service_that_hangs_up_ends_the_call(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    call = make(stdin="socket", stdout="same", stderr=False)
    call.stdin.write(b"bye")
    call.stdin.close()
    assert call.finish() == 0
    each_driver.until(lambda: call.peer.eof)
    assert call.peer.stream(m.DATA_STDOUT) == b"bye"
    assert call.peer.kinds() == [m.HELLO, m.DATA_STDERR, m.DATA_STDOUT, m.DATA_STDOUT,
                                 m.DATA_EXIT_CODE]  # fmt: skip


@pytest.mark.spec("WIRE-195")
def test_exit_on_client_eof(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(stdin="socket", stdout="same", stderr=False, exit_on_client_eof=True)
    call.peer.send(m.DATA_STDIN, b"all")
    call.peer.send(m.DATA_STDIN)
    assert call.finish() == 0
    each_driver.until(lambda: call.peer.eof)
    assert call.peer.messages[-2:] == [(m.DATA_STDOUT, b""), (m.DATA_EXIT_CODE, bytes(4))]
    each_driver.until(lambda: call.stdin.eof)
    assert call.stdin.received == b"all"


@pytest.mark.spec("WIRE-195")
def test_exit_on_client_eof_waits_until_the_service_took_the_input(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    call = make(stdin="socket", stdout="same", stderr=False, exit_on_client_eof=True)
    call.stdin.deafen()
    data = pattern(1 << 20)
    for start in range(0, len(data), 40_000):
        call.peer.send(m.DATA_STDIN, data[start : start + 40_000])
    call.peer.send(m.DATA_STDIN)
    each_driver.quiet()
    assert not call.over
    call.stdin.listen()
    assert call.finish() == 0
    each_driver.until(lambda: call.stdin.eof)
    assert call.stdin.received == data


@pytest.mark.spec("WIRE-196")
def test_exit_on_service_eof(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(stdin="socket", stdout="same", stderr=False, exit_on_service_eof=True)
    call.stdin.write(b"reply")
    call.stdin.end()
    assert call.finish() == 0
    each_driver.until(lambda: call.peer.eof)
    assert call.peer.stream(m.DATA_STDOUT) == b"reply"
    assert call.peer.messages[-2:] == [(m.DATA_STDOUT, b""), (m.DATA_EXIT_CODE, bytes(4))]


@pytest.mark.parametrize("flag", ["exit_on_client_eof", "exit_on_service_eof"])
def test_the_exit_flags_mean_nothing_for_a_process(
    make: Callable[..., Call], each_driver: Driver, flag: str
) -> None:
    call = make(has_process=True, **{flag: True})
    call.peer.send(m.DATA_STDIN)
    each_driver.until(lambda: call.stdin.eof)
    call.stdout.write(b"output")
    each_driver.until(lambda: call.peer.stream(m.DATA_STDOUT) == b"output")
    call.stdout.close()
    each_driver.until(lambda: call.peer.ended(m.DATA_STDOUT))
    assert not call.over


@pytest.mark.spec("WIRE-197")
@pytest.mark.parametrize("after_eof", [False, True])
def test_single_socket_mode(
    make: Callable[..., Call], each_driver: Driver, after_eof: bool
) -> None:
    call = make(has_process=True, stdin="socket", stdout="socket")
    call.stdout.write(b"old ")
    each_driver.until(lambda: call.peer.stream(m.DATA_STDOUT) == b"old ")
    if after_eof:
        call.peer.send(m.DATA_STDIN)
        each_driver.until(lambda: call.stdin.eof)
    call.channel.use_single_socket()
    call.stdin.write(b"new")
    each_driver.until(lambda: call.peer.stream(m.DATA_STDOUT) == b"old new")
    # Honoured once; and the old stdout is of no use any more.
    call.channel.use_single_socket()
    call.stdout.write(b"lost")
    each_driver.until(lambda: call.stdout.broken)
    if not after_eof:
        call.peer.send(m.DATA_STDIN, b"in")
        each_driver.until(lambda: call.stdin.received == b"in")
    call.stdin.close()
    call.stderr.close()
    each_driver.until(lambda: call.peer.ended(m.DATA_STDOUT))
    call.channel.process_exited(0)
    assert call.finish() == 0


def test_single_socket_mode_needs_a_socket(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(has_process=True)
    call.channel.use_single_socket()
    call.stdout.write(b"as before")
    each_driver.until(lambda: call.peer.stream(m.DATA_STDOUT) == b"as before")


@pytest.mark.spec("WIRE-198")
def test_loss_of_the_channel(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(has_process=True)
    call.peer.send(m.DATA_STDIN, b"last words")
    each_driver.until(lambda: call.stdin.received)
    call.peer.close()
    each_driver.until(lambda: call.stdin.eof)
    each_driver.quiet()
    assert not call.over and call.channel.lost
    call.stdout.write(b"nobody listens")
    assert call.stdout.broken
    call.channel.process_exited(9)
    assert call.finish() == 9


@pytest.mark.spec("WIRE-018")
def test_after_a_failed_write_input_is_still_received(driver: Driver) -> None:
    call = Call(driver, caller=False, has_process=True)
    call.peer.close_read()
    call.stdout.write(b"cannot be sent")
    driver.until(lambda: call.channel.state.mute)
    call.peer.send(m.DATA_STDIN, b"still ")
    call.peer.send(m.DATA_STDIN, b"received")
    driver.until(lambda: call.stdin.received == b"still received")
    call.peer.close()
    driver.until(lambda: call.stdin.eof)
    assert not call.over
    call.channel.process_exited(1)
    assert call.finish() == 1
    call.close()


def test_a_peer_that_reads_nothing_any_more_does_not_keep_an_ended_service(
    driver: Driver,
) -> None:
    call = Call(driver, caller=False, has_process=True)
    call.peer.close_read()
    call.stdout.write(b"cannot be sent")
    driver.until(lambda: call.channel.state.mute)
    call.channel.process_exited(2)
    assert call.finish() == 2
    call.close()


@pytest.mark.parametrize("hello", ["send-first", "read-first"])
@pytest.mark.parametrize("dom0", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_failed_start(
    make: Callable[..., Call], each_driver: Driver, dom0: bool, when: str, hello: str
) -> None:
    call = make(late=True, on_open=lambda: None, version=None, hello=hello)
    call.channel.start()
    if when == "before":
        call.channel.fail(127, dom0=dom0)
    call.peer.hello()
    each_driver.until(lambda: call.channel.opened or call.over)
    if when == "after":
        call.channel.fail(127, dom0=dom0)
    assert call.finish() == 127
    each_driver.until(lambda: call.peer.eof)
    ends = [(m.DATA_STDOUT, b""), (m.DATA_STDERR, b"")]
    assert call.peer.messages == [
        (m.HELLO, b"\4\0\0\0"),
        *(reversed(ends) if dom0 else ends),
        (m.DATA_EXIT_CODE, b"\x7f\0\0\0"),
    ]
    for fd in call.streams:
        # They were never given to the channel.
        os.close(fd)


def test_failed_start_closes_streams_that_were_given(make: Callable[..., Call]) -> None:
    call = make(version=None)
    call.channel.fail(125)
    call.channel.start()
    call.peer.hello()
    assert call.finish() == 125
    call.driver.until(lambda: call.stdin.eof)


def test_just_exec(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(late=True, on_open=lambda: call.channel.send_exit_only(0), version=None)
    call.channel.start()
    call.peer.hello()
    assert call.finish() == 0
    each_driver.until(lambda: call.peer.eof)
    assert call.peer.messages[1:] == [(m.DATA_EXIT_CODE, bytes(4))]
    for fd in call.streams:
        os.close(fd)


def test_streams_that_come_too_late_are_closed(make: Callable[..., Call]) -> None:
    call = make(late=True, on_open=lambda: None)
    call.channel.close()
    call.channel.attach(*call.streams, has_process=True)
    call.driver.until(lambda: call.stdin.eof)
    assert not call.over


@pytest.mark.spec("WIRE-015")
def test_what_was_sent_arrives_before_the_end(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    call = make(has_process=True)
    call.peer.deafen()
    data = pattern(1_000_000)
    call.stdout.write(data)
    call.stdout.end()
    call.stderr.close()
    call.channel.process_exited(0)
    each_driver.quiet()
    assert not call.over
    call.peer.listen()
    each_driver.until(lambda: call.peer.eof)
    assert call.peer.stream(m.DATA_STDOUT) == data
    assert call.peer.messages[-1][0] == m.DATA_EXIT_CODE
    assert call.finish() == 0


@pytest.mark.spec("WIRE-015")
def test_an_exit_code_that_must_wait_is_not_lost(driver: Driver) -> None:
    """The channel is full when everything has ended but the process."""
    call = Call(driver, caller=False, has_process=True, stderr=False)
    call.stdout.close()
    driver.until(lambda: call.peer.ended(m.DATA_STDOUT))
    call.peer.deafen()
    filler = m.encode(m.DATA_STDERR, b"")
    with contextlib.suppress(BlockingIOError):
        while True:
            assert os.write(call.channel._writing.fd, filler) == len(filler)
    call.channel.process_exited(6)
    driver.quiet()
    assert not call.over
    call.peer.listen()
    driver.until(lambda: call.peer.eof)
    assert call.peer.messages[-1] == (m.DATA_EXIT_CODE, b"\6\0\0\0")
    assert call.finish() == 6
    call.close()


@pytest.mark.parametrize("size", [3, 65536])
def test_a_socket_service_that_goes_without_reading(
    make: Callable[..., Call], each_driver: Driver, size: int
) -> None:
    """Its unread input resets the connection, which is an end-of-file like any other."""
    call = make(stdin="socket", stdout="same", stderr=False)
    call.stdin.deafen()
    call.peer.send(m.DATA_STDIN, b"never read")
    each_driver.quiet()
    # Large enough to be spliced, once the first piece has shown that it is.
    call.stdin.write(bytes(size))
    each_driver.until(lambda: len(call.peer.stream(m.DATA_STDOUT)) == size)
    call.stdin.close()
    assert call.finish() == 0
    each_driver.until(lambda: call.peer.eof)
    assert len(call.peer.stream(m.DATA_STDOUT)) == size
    assert call.peer.messages[-2:] == [(m.DATA_STDOUT, b""), (m.DATA_EXIT_CODE, bytes(4))]


def test_single_socket_mode_is_for_processes(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    call = make(stdin="socket", stdout="socket")
    call.channel.use_single_socket()
    call.stdout.write(b"as before")
    each_driver.until(lambda: call.peer.stream(m.DATA_STDOUT) == b"as before")


def test_stderr_is_shown_to_the_logger(make: Callable[..., Call], each_driver: Driver) -> None:
    seen = bytearray()
    call = make(has_process=True, on_stderr=lambda piece: seen.extend(piece))
    data = pattern(200_000)
    call.stderr.write(data)
    each_driver.until(lambda: call.peer.stream(m.DATA_STDERR) == data)
    assert seen == data


def test_close_aborts(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(has_process=True)
    call.channel.close()
    call.channel.process_exited(0)
    each_driver.until(lambda: call.peer.eof and call.stdin.eof)
    assert not call.over
