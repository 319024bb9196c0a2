"""The caller side of the data engine, its other side played message by message."""

from __future__ import annotations

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
        call = Call(each_driver, caller=True, transport=request.param, **options)  # type: ignore[arg-type]
        made.append(call)
        return call

    warm = Call(each_driver, caller=True)
    warm.close()
    before = count_fds()
    yield build
    for call in made:
        call.close()
    assert count_fds() <= before


@pytest.mark.spec("WIRE-246")
def test_a_whole_call(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make()
    call.stdout.write(b"question")
    call.stdout.close()
    each_driver.until(lambda: call.peer.ended(m.DATA_STDIN))
    assert call.peer.messages == [
        (m.HELLO, b"\4\0\0\0"),
        (m.DATA_STDIN, b"question"),
        (m.DATA_STDIN, b""),
    ]
    call.peer.send(m.DATA_STDERR)
    call.peer.send(m.DATA_STDOUT, b"answer")
    call.peer.send(m.DATA_STDOUT)
    call.peer.send(m.DATA_EXIT_CODE, m.I32.pack(42))
    assert call.finish() == 42
    each_driver.until(lambda: call.stdin.eof and call.peer.eof)
    assert call.stdin.received == b"answer"
    assert not call.channel.lost


@pytest.mark.spec("WIRE-246")
def test_hello_does_not_wait(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(version=None)
    call.channel.start()
    each_driver.until(lambda: call.peer.received == m.encode_hello(4))


@pytest.mark.spec("WIRE-185", "WIRE-186")
@pytest.mark.parametrize(("version", "limit"), [(2, 4096), (3, 65536), (4, 65536)])
def test_limits(make: Callable[..., Call], each_driver: Driver, version: int, limit: int) -> None:
    call = make(version=version)
    data = pattern(300_000)
    call.stdout.write(data)
    each_driver.until(lambda: call.peer.stream(m.DATA_STDIN) == data)
    assert max(len(body) for _, body in call.peer.messages) <= limit
    call.peer.send(m.DATA_STDOUT, pattern(limit))
    each_driver.until(lambda: len(call.stdin.received) == limit)
    call.peer.write(m.HEADER.pack(m.DATA_STDOUT, limit + 1))
    call.fatal()


@pytest.mark.spec("WIRE-187")
@pytest.mark.parametrize("kind", [m.HELLO, m.TRIGGER_SERVICE, 0, 0x194])
def test_unknown_types_are_fatal(make: Callable[..., Call], kind: int) -> None:
    call = make()
    call.peer.send(kind, b"\4\0\0\0")
    call.fatal()
    call.driver.until(lambda: call.stdin.eof and call.peer.eof)


@pytest.mark.spec("WIRE-189")
def test_stdin_type_is_taken_as_output(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make()
    call.peer.send(m.DATA_STDIN, b"odd but ")
    call.peer.send(m.DATA_STDOUT, b"right")
    call.peer.send(m.DATA_STDIN)
    each_driver.until(lambda: call.stdin.eof)
    assert call.stdin.received == b"odd but right"
    assert len(call.warnings) == 1


@pytest.mark.spec("WIRE-190")
def test_output_without_reader_is_discarded(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make()
    call.stdin.close()
    for _ in range(40):
        call.peer.send(m.DATA_STDOUT, bytes(65536))
    each_driver.until(lambda: not call.peer.unsent)
    call.stdout.write(b"goes on")
    each_driver.until(lambda: call.peer.stream(m.DATA_STDIN) == b"goes on")
    call.peer.send(m.DATA_STDOUT)
    call.peer.send(m.DATA_EXIT_CODE, m.I32.pack(7))
    assert call.finish() == 7


@pytest.mark.spec("WIRE-199")
def test_output_after_the_exit_code(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make()
    data = pattern(400_000)
    call.peer.send(m.DATA_STDOUT, data[:1000])
    call.peer.send(m.DATA_EXIT_CODE, m.I32.pack(3))
    for start in range(1000, len(data), 60_000):
        call.peer.send(m.DATA_STDOUT, data[start : start + 60_000])
    each_driver.until(lambda: call.stdin.received == data)
    assert not call.over
    call.peer.send(m.DATA_STDOUT)
    assert call.finish() == 3


@pytest.mark.spec("WIRE-200")
def test_after_the_exit_code_only_one_eof_is_sent(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    call = make()
    call.stdout.write(b"before")
    each_driver.until(lambda: call.peer.stream(m.DATA_STDIN) == b"before")
    call.peer.send(m.DATA_EXIT_CODE, m.I32.pack(1))
    each_driver.until(lambda: call.peer.ended(m.DATA_STDIN))
    call.stdout.write(b"after")
    assert call.stdout.broken
    call.peer.send(m.DATA_EXIT_CODE, m.I32.pack(2))
    call.peer.send(m.DATA_STDOUT)
    assert call.finish() == 1
    each_driver.until(lambda: call.peer.eof)
    assert call.peer.messages[1:] == [(m.DATA_STDIN, b"before"), (m.DATA_STDIN, b"")]


@pytest.mark.spec("WIRE-200")
def test_no_second_eof_when_stdin_had_ended(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make()
    call.stdout.close()
    each_driver.until(lambda: call.peer.ended(m.DATA_STDIN))
    call.peer.send(m.DATA_EXIT_CODE, bytes(4))
    call.peer.send(m.DATA_STDOUT)
    assert call.finish() == 0
    each_driver.until(lambda: call.peer.eof)
    assert call.peer.messages[1:] == [(m.DATA_STDIN, b"")]


@pytest.mark.spec("WIRE-200")
def test_a_message_under_way_is_completed_before_the_eof(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    call = make()
    call.peer.deafen()
    data = pattern(3_000_000)
    call.stdout.write(data)
    each_driver.quiet()
    call.peer.send(m.DATA_EXIT_CODE, bytes(4))
    each_driver.quiet()
    call.peer.listen()
    each_driver.until(lambda: call.peer.ended(m.DATA_STDIN))
    sent = call.peer.stream(m.DATA_STDIN)
    assert data.startswith(sent) and len(sent) < len(data)
    assert sum(8 + len(body) for _, body in call.peer.messages) == len(call.peer.received)


@pytest.mark.spec("WIRE-201")
@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 255),
        (b"\x2a\0", 255),
        (b"\x2a\0\0", 255),
        (b"\x2a\0\0\0", 42),
        (b"\x2a\0\0\0\xff\xff", 42),
        (b"\x2a" + bytes(65535), 42),
        (m.I32.pack(259), 3),
        (m.I32.pack(-1), 255),
        (m.I32.pack(-(2**31)), 0),
    ],
)
def test_exit_codes(make: Callable[..., Call], body: bytes, status: int) -> None:
    call = make()
    call.peer.send(m.DATA_STDOUT)
    call.peer.send(m.DATA_EXIT_CODE, body)
    assert call.finish() == status


@pytest.mark.spec("WIRE-202")
def test_loss_without_exit_code(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make()
    call.stdin.deafen()
    data = pattern(300_000)
    for start in range(0, len(data), 20_000):
        call.peer.send(m.DATA_STDOUT, data[start : start + 20_000])
    call.peer.end()
    each_driver.quiet()
    assert not call.over
    call.stdin.listen()
    assert call.finish() == 255
    assert call.channel.lost
    each_driver.until(lambda: call.stdin.eof)
    assert call.stdin.received == data


@pytest.mark.spec("WIRE-016")
def test_what_came_before_the_end_is_processed(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    call = make()
    call.peer.write(m.encode(m.DATA_STDOUT, b"output") + m.encode(m.DATA_EXIT_CODE, m.I32.pack(6)))
    call.peer.close()
    assert call.finish() == 6
    each_driver.until(lambda: call.stdin.eof)
    assert call.stdin.received == b"output"


@pytest.mark.spec("WIRE-018")
def test_output_and_code_of_a_peer_that_does_not_read(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    call = make()
    call.peer.deafen()
    call.stdout.write(pattern(3_000_000))
    each_driver.quiet()
    # Our message hangs in the channel; then the peer sends everything and goes.
    for message in (
        m.encode(m.DATA_STDOUT, b"output"),
        m.encode(m.DATA_STDOUT),
        m.encode(m.DATA_EXIT_CODE, m.I32.pack(4)),
    ):
        call.peer.write(message)
    call.peer.close()
    assert call.finish() == 4
    each_driver.until(lambda: call.stdin.eof)
    assert call.stdin.received == b"output"


@pytest.mark.spec("WIRE-018")
def test_a_failed_write_ends_only_sending(driver: Driver) -> None:
    call = Call(driver, caller=True)
    call.peer.close_read()
    call.stdout.write(b"cannot be sent")
    driver.until(lambda: call.channel.state.mute)
    call.peer.send(m.DATA_STDOUT, b"output")
    driver.until(lambda: call.stdin.received == b"output")
    call.peer.send(m.DATA_EXIT_CODE, m.I32.pack(8))
    call.peer.send(m.DATA_STDOUT)
    assert call.finish() == 8
    call.close()


@pytest.mark.spec("WIRE-017")
def test_a_reset_is_an_end_of_file(driver: Driver) -> None:
    call = Call(driver, caller=True, transport="socket")
    call.peer.deafen()
    call.stdout.write(b"unread by the peer")
    driver.quiet()
    call.peer.send(m.DATA_STDOUT, b"output")
    # Closing a socket with unread data resets the connection.
    call.peer.close()
    assert call.finish() == 255
    driver.until(lambda: call.stdin.eof)
    assert call.stdin.received == b"output"
    call.close()


@pytest.mark.spec("WIRE-203")
@pytest.mark.parametrize("size", [1, 65536, 200_000])
def test_prefix(make: Callable[..., Call], each_driver: Driver, size: int) -> None:
    prefix = pattern(size)
    call = make(prefix=prefix)
    # Nothing else happens on any descriptor that could bring it on.
    each_driver.until(lambda: call.peer.stream(m.DATA_STDIN) == prefix)
    call.stdout.write(b" then stdin")
    each_driver.until(lambda: call.peer.stream(m.DATA_STDIN) == prefix + b" then stdin")
    assert max(len(body) for _, body in call.peer.messages) <= 65536


@pytest.mark.spec("WIRE-203")
def test_prefix_when_stdin_is_ready_already(driver: Driver) -> None:
    call = Call(driver, caller=True, prefix=b"prefix ", version=None)
    call.stdout.write(b"stdin")
    call.stdout.close()
    call.channel.start()
    call.peer.hello()
    driver.until(lambda: call.peer.ended(m.DATA_STDIN))
    assert call.peer.stream(m.DATA_STDIN) == b"prefix stdin"
    call.close()


@pytest.mark.parametrize(
    ("remote", "local", "status"), [(0, 0, 0), (0, 3, 3), (5, 3, 5), (None, 3, 255), (5, 0, 5)]
)
@pytest.mark.parametrize("first", ["local", "remote"])
def test_the_local_program_is_waited_for(
    make: Callable[..., Call],
    each_driver: Driver,
    remote: int | None,
    local: int,
    status: int,
    first: str,
) -> None:
    call = make(has_process=True, stdin="socket", stdout="socket")
    if first == "local":
        call.stdin.close()
        call.stdout.close()
        call.channel.process_exited(local)
    if remote is not None:
        call.peer.send(m.DATA_STDOUT)
        call.peer.send(m.DATA_EXIT_CODE, m.I32.pack(remote))
    call.peer.end()
    if first == "remote":
        each_driver.quiet()
        assert not call.over
        call.channel.process_exited(local)
    assert call.finish() == status


def test_end_of_the_local_program_ends_stdout_at_its_end_of_file(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    call = make(has_process=True)
    call.channel.process_exited(0)
    call.stdout.write(b"left in the pipe")
    call.stdout.close()
    each_driver.until(lambda: call.peer.ended(m.DATA_STDIN))
    assert call.peer.stream(m.DATA_STDIN) == b"left in the pipe"


@pytest.mark.spec("WIRE-197")
def test_single_socket_mode(make: Callable[..., Call], each_driver: Driver) -> None:
    call = make(has_process=True, stdin="socket", stdout="socket")
    call.channel.use_single_socket()
    call.stdin.write(b"from the stdin socket")
    each_driver.until(lambda: call.peer.stream(m.DATA_STDIN) == b"from the stdin socket")


@pytest.mark.parametrize("first", ["remote", "local"])
def test_one_socket_for_both(make: Callable[..., Call], each_driver: Driver, first: str) -> None:
    call = make(stdin="socket", stdout="same")
    if first == "remote":
        call.peer.send(m.DATA_STDOUT, b"out")
        call.peer.send(m.DATA_STDOUT)
        each_driver.until(lambda: call.stdin.eof)
        assert call.stdin.received == b"out"
        call.stdin.write(b"after")
        each_driver.until(lambda: call.peer.stream(m.DATA_STDIN) == b"after")
        call.stdin.end()
    else:
        call.stdin.write(b"in")
        call.stdin.end()
        each_driver.until(lambda: call.peer.ended(m.DATA_STDIN))
        call.peer.send(m.DATA_STDOUT, b"out")
        each_driver.until(lambda: call.stdin.received == b"out")
        call.peer.send(m.DATA_STDOUT)
        each_driver.until(lambda: call.stdin.eof)
    call.peer.send(m.DATA_EXIT_CODE, bytes(4))
    assert call.finish() == 0


ALL_BYTES = bytes(range(256))
FILTERED = bytes(
    byte if 0x20 <= byte <= 0x7E or byte in (7, 8, 9, 10, 13) else ord("_") for byte in range(256)
)


@pytest.mark.parametrize("filtered", [False, True])
def test_filtering_stdout(make: Callable[..., Call], each_driver: Driver, filtered: bool) -> None:
    errors = bytearray()
    call = make(filter_stdout=filtered, on_stderr=lambda piece: errors.extend(piece))
    # Large enough to be spliced if nobody looked.
    call.peer.send(m.DATA_STDOUT, ALL_BYTES * 256)
    call.peer.send(m.DATA_STDOUT, ALL_BYTES)
    call.peer.send(m.DATA_STDERR, ALL_BYTES)
    expected = (FILTERED if filtered else ALL_BYTES) * 257
    each_driver.until(lambda: call.stdin.received == expected)
    each_driver.until(lambda: errors == ALL_BYTES)


def test_filtering_stderr(make: Callable[..., Call], each_driver: Driver) -> None:
    errors = bytearray()
    call = make(filter_stderr=True, on_stderr=lambda piece: errors.extend(piece))
    call.peer.send(m.DATA_STDERR, ALL_BYTES)
    call.peer.send(m.DATA_STDERR)
    call.peer.send(m.DATA_STDOUT, ALL_BYTES)
    each_driver.until(lambda: call.stdin.received == ALL_BYTES)
    assert errors == FILTERED


def test_stderr_goes_to_descriptor_2(driver: Driver) -> None:
    saved = os.dup(2)
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    try:
        os.dup2(write_fd, 2)
        call = Call(driver, caller=True)
        data = pattern(300_000)
        for start in range(0, len(data), 50_000):
            call.peer.send(m.DATA_STDERR, data[start : start + 50_000])
        driver.quiet()
        # Full and not read: our own sending goes on, and its flags are as they were.
        call.stdout.write(b"meanwhile")
        driver.until(lambda: call.peer.stream(m.DATA_STDIN) == b"meanwhile")
        assert os.get_blocking(2)
        got = bytearray()
        while len(got) < len(data):
            got += os.read(read_fd, 65536)
            driver.quiet()
        assert got == data
        call.close()
        assert os.get_blocking(2) and os.fstat(2)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(read_fd)
        os.close(write_fd)


def test_stderr_without_reader_is_no_error(driver: Driver) -> None:
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    os.close(read_fd)
    call = Call(driver, caller=True, err_fd=write_fd)
    call.peer.send(m.DATA_STDERR, b"nobody")
    call.peer.send(m.DATA_STDERR, b"reads this")
    call.peer.send(m.DATA_STDOUT)
    call.peer.send(m.DATA_EXIT_CODE, bytes(4))
    assert call.finish() == 0
    assert len(call.warnings) == 0
    call.close()


def test_what_was_read_ahead_is_taken_when_the_local_program_ends(
    make: Callable[..., Call], each_driver: Driver
) -> None:
    """IN is full, and behind what it does not take the exit code has been read already."""
    call = make(has_process=True)
    call.stdin.deafen()
    for _ in range(6):
        call.peer.write(m.encode(m.DATA_STDOUT, bytes(10_000)))
        each_driver.quiet()
    call.peer.write(
        m.encode(m.DATA_STDOUT, bytes(10_000))
        + m.encode(m.DATA_STDERR)
        + m.encode(m.DATA_EXIT_CODE, m.I32.pack(4))
        + m.encode(m.DATA_STDOUT)
    )
    each_driver.quiet()
    assert call.channel.state.remote_status is None
    call.stdout.close()
    call.channel.process_exited(0)
    assert call.finish() == 4


def test_stderr_is_delivered_before_the_end(driver: Driver) -> None:
    """The exit code and the end of stdout came before; the last words wait for a slow reader."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(write_fd, False)
    os.write(write_fd, bytes(65536))
    call = Call(driver, caller=True, err_fd=write_fd)
    call.peer.write(
        m.encode(m.DATA_STDOUT)
        + m.encode(m.DATA_EXIT_CODE, m.I32.pack(4))
        + m.encode(m.DATA_STDERR, b"last words")
    )
    driver.quiet()
    assert not call.over
    assert os.read(read_fd, 65536) == bytes(65536)
    assert call.finish() == 4
    assert os.read(read_fd, 100) == b"last words"
    os.close(read_fd)
    call.close()


def test_a_full_disk_is_told_and_ends_only_that_stream(driver: Driver) -> None:
    full = [os.open("/dev/full", os.O_WRONLY) for _ in range(2)]
    call = Call(
        driver,
        caller=True,
        late=True,
        on_open=lambda: call.channel.attach(full[0], call.streams[1], full[1], has_process=False),
        version=None,
    )
    call.channel.start()
    call.peer.hello()
    for _ in range(3):
        call.peer.send(m.DATA_STDOUT, b"does not fit")
        call.peer.send(m.DATA_STDERR, b"nor does this")
    call.peer.send(m.DATA_EXIT_CODE, m.I32.pack(3))
    call.peer.send(m.DATA_STDOUT)
    assert call.finish() == 3
    assert sorted(call.warnings) == [
        "stderr of the service could not be written: No space left on device",
        "what was received could not be written: No space left on device",
    ]
    os.close(call.streams[0])
    call.close()
