"""Whatever a hostile peer sends ends in a fatal error, a result, or a wait: never in an exception,
and never in memory that grows."""

from __future__ import annotations

import contextlib
import os
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.flow import Call, Driver, count_fds

from sluice.wire import messages as m

KINDS = st.sampled_from(
    [m.DATA_STDIN, m.DATA_STDOUT, m.DATA_STDERR, m.DATA_EXIT_CODE, m.HELLO, m.EXEC_CMDLINE, 0]
)
SIZES = st.sampled_from([0, 1, 3, 4, 5, 16383, 16384, 65535, 65536, 65537, 1 << 31, 0xFFFFFFFF])
MESSAGES = st.builds(m.encode, KINDS, st.binary(max_size=300))
LARGE = st.builds(lambda kind, size: m.encode(kind, bytes(size)), KINDS, st.integers(0, 70_000))
LYING = st.builds(
    lambda kind, size, body: m.HEADER.pack(kind, size) + body, KINDS, SIZES, st.binary(max_size=40)
)
BYTES = st.lists(MESSAGES | LARGE | LYING | st.binary(max_size=100), max_size=12)
ACTIONS = st.lists(
    st.sampled_from(["turn", "in", "out", "err", "exit", "single", "deaf", "listen", "gone"]),
    max_size=8,
)


def act(call: Call, name: str) -> None:
    """Let something happen beside what the peer does."""
    if name == "turn":
        call.driver.loop.run_once(0)
    elif name == "in":
        call.stdin.close()
    elif name == "out":
        call.stdout.close()
    elif name == "err":
        call.stderr.close()
    elif name == "exit":
        call.channel.process_exited(1)
    elif name == "single":
        call.channel.use_single_socket()
    elif name == "deaf":
        call.stdin.deafen()
    elif name == "listen" and call.stdin.read_fd >= 0:
        call.stdin.listen()
    elif name == "gone":
        call.peer.close()


@pytest.mark.parametrize("transport", ["passed", "socket"])
@pytest.mark.parametrize("caller", [True, False])
@settings(max_examples=120, deadline=None)
@given(pieces=BYTES, actions=ACTIONS, hello=st.booleans(), sockets=st.booleans(), cut=st.booleans())
@pytest.mark.spec("WIRE-187")
def test_any_bytes(
    transport: str,
    caller: bool,
    pieces: list[bytes],
    actions: list[str],
    hello: bool,
    sockets: bool,
    cut: bool,
) -> None:
    driver = Driver()
    before = count_fds()
    call = Call(
        driver,
        caller=caller,
        transport=transport,
        stdin="socket" if sockets else "pipe",
        stdout="socket" if sockets else "pipe",
        has_process=True,
        version=4 if hello else None,
        on_stderr=lambda piece: None,
    )
    if not hello:
        call.channel.start()
    steps = list(actions)
    for piece in pieces:
        half = len(piece) // 2 if cut else len(piece)
        for part in (piece[:half], piece[half:]):
            if call.peer.write_fd >= 0:
                call.peer.write(part)
            driver.loop.run_once(0)
        if steps:
            act(call, steps.pop(0))
    driver.quiet()
    assert len(call.results) + len(call.fatals) <= 1
    if not call.over:
        # A wait: as soon as the peer is gone and the process has ended, it is over.
        call.channel.process_exited(1)
        if call.stdin.read_fd >= 0:
            call.stdin.listen()
        call.peer.close()
        driver.until(lambda: call.over)
    assert len(call.results) + len(call.fatals) == 1
    assert all(0 <= status <= 255 for status in call.results)
    call.close()
    # Fewer, where the collector found what an earlier test left.
    assert count_fds() <= before
    driver.close()


@pytest.mark.parametrize("caller", [True, False])
@pytest.mark.parametrize("size", [1, 65536])
def test_memory_stays_bounded_when_nobody_takes_the_data(caller: bool, size: int) -> None:
    driver = Driver()
    call = Call(driver, caller=caller)
    call.stdin.deafen()
    message = m.encode(m.DATA_STDOUT, bytes(size))
    block = message * max(1, 65536 // len(message))
    driver.quiet()
    tracemalloc.start()
    at = 0
    for _ in range(200):
        with contextlib.suppress(BlockingIOError):
            at = (at + os.write(call.peer.write_fd, block[at:])) % len(block)
        driver.loop.run_once(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # One buffer to read into, and one message joined from small ones.
    assert peak < 400_000
    call.close()
    driver.close()


@pytest.mark.parametrize("caller", [True, False])
def test_memory_stays_bounded_when_the_peer_does_not_read(caller: bool) -> None:
    driver = Driver()
    call = Call(driver, caller=caller)
    call.peer.deafen()
    block = bytes(65536)
    driver.quiet()
    tracemalloc.start()
    for _ in range(200):
        for end in (call.stdout, call.stderr):
            with contextlib.suppress(BlockingIOError):
                if end.write_fd >= 0:
                    os.write(end.write_fd, block)
        driver.loop.run_once(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000
    call.close()
    driver.close()
