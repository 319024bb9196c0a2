"""The flow: two ends, half-close, back-pressure, bounds, abort. In one process, on the Reactor."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.processes import alive

from sluice.errors import LocalError
from sluice.flow.reactor import Reactor
from sluice.proxy.agent_end import AgentEnd
from sluice.proxy.far import ProgramEnd
from sluice.proxy.filters.pass_ import Pass
from sluice.proxy.filters.stop import StopSrc
from sluice.proxy.flow import Flow, Settings
from sluice.proxy.link import Call, Memory
from sluice.proxy.schema import use_filter
from sluice.proxy.stage import Cause, FilterUse
from sluice.proxy.verdicts import DST2SRC, HOLD, PASS, PASS_REST, SRC2DST, Abort, Close, Replace

BOTH = (SRC2DST, DST2SRC)


class Inspect:
    """Looks at everything and lets it pass."""

    name = "inspect"
    inspects = BOTH

    class Options:
        pass

    def __init__(self, options: Any, link: Any) -> None:
        self.link = link
        self.seen = 0

    def data(self, direction: Any, chunk: memoryview) -> Any:
        self.seen += len(chunk)
        return PASS


def answering(data: Callable[..., Any], limit: int = 1 << 20) -> type[Any]:
    class Answering(Inspect):
        name = "answering"
        max_held = limit

        def data(self, direction: Any, chunk: memoryview) -> Any:
            return data(self, direction, chunk)

    return Answering


class Ends:
    """A far end of our own: the test holds its other sides."""

    def __init__(self) -> None:
        self.read_in, self.in_fd = os.pipe2(os.O_CLOEXEC)
        self.out_fd, self.write_out = os.pipe2(os.O_CLOEXEC)
        self.on_exit: Callable[[int], None] | None = None
        self.ended: list[str] = []
        self.refuse: LocalError | None = None

    def start(self, on_exit: Callable[[int], None]) -> None:
        if self.refuse:
            os.close(self.in_fd)
            os.close(self.out_fd)
            raise self.refuse
        self.on_exit = on_exit

    def exit(self, code: int) -> None:
        assert self.on_exit is not None
        self.on_exit(code)

    def terminate(self) -> None:
        self.ended.append("terminate")
        self.exit(143)

    def kill(self) -> None:
        self.ended.append("kill")


class Bench:
    """A flow between descriptors that the test holds."""

    def __init__(self, *filters: type[Any], **options: Any) -> None:
        self.loop = Reactor()
        self.far = options.pop("far", None) or Ends()
        self.source, inner = socket.socketpair()
        self.out = inner.dup()
        self.ended: list[Flow] = []
        self.lines: list[str] = []
        self.flow = Flow(
            self.loop,
            [cls if isinstance(cls, FilterUse) else use_filter(cls, {}) for cls in filters],
            Call("work", "vault", "x", chain="c", ident="1"),
            self.far,
            in_fd=inner.detach(),
            out_fd=self.out.detach(),
            on_end=self.ended.append,
            log=self.lines.append,
            **options,
        )

    def until(self, condition: Callable[[], Any], timeout: float = 30.0) -> Any:
        deadline = self.loop.call_later(timeout, self.loop.stop)
        end = self.loop.time() + timeout
        while not condition():
            assert self.loop.time() < end, "did not happen in time"
            self.loop._run_due()
            self.loop.run_once(min(self.loop._timeout() % 0.05, 0.05))
        deadline.cancel()
        return condition()

    def settle(self, seconds: float = 0.02) -> None:
        """Let the loop do what it can do now, however slowly it is let to."""
        end = self.loop.time() + seconds
        rounds = idle = 0
        while self.loop.time() < end or (idle < 3 and rounds < 10_000):
            rounds += 1
            idle = 0 if self.loop.run_once(0.001) else idle + 1

    def cause(self) -> Cause:
        self.until(lambda: self.ended)
        assert len(self.ended) == 1
        assert self.flow.cause is not None
        return self.flow.cause


def drain(fd: int) -> bytes:
    os.set_blocking(fd, False)
    got = b""
    while True:
        try:
            piece = os.read(fd, 1 << 20)
        except BlockingIOError:
            return got
        if not piece:
            return got
        got += piece


def at_end(fd: int) -> bool:
    os.set_blocking(fd, False)
    try:
        return os.read(fd, 1) == b""
    except BlockingIOError:
        return False


@pytest.fixture
def descriptors() -> Iterator[None]:
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.spec("PROXY-019")
@pytest.mark.parametrize("filters", [(Pass,), (Inspect,), (Inspect, Pass, Inspect)])
@pytest.mark.parametrize("first", [SRC2DST, DST2SRC])
def test_half_close_in_each_order_with_data_in_flight(filters: Any, first: Any) -> None:
    bench = Bench(*filters)
    bench.flow.start()
    bench.source.send(b"question" * 10_000)
    os.write(bench.far.write_out, b"answer" * 5000)
    if first == SRC2DST:
        bench.source.shutdown(socket.SHUT_WR)
        got = b""
        while len(got) < 80_000:
            bench.settle()
            got += drain(bench.far.read_in)
        bench.until(lambda: at_end(bench.far.read_in))
        os.write(bench.far.write_out, b"later")
        bench.settle()
        os.close(bench.far.write_out)
    else:
        os.close(bench.far.write_out)
        bench.until(lambda: bench.flow.streams[DST2SRC].finished)
        bench.source.send(b"more")
        bench.settle()
        bench.source.shutdown(socket.SHUT_WR)
        got = b""
        while not bench.flow.streams[SRC2DST].finished:
            bench.settle()
            got += drain(bench.far.read_in)
        assert got + drain(bench.far.read_in) == b"question" * 10_000 + b"more"
    bench.far.exit(7)
    assert bench.cause().kind == "done" and bench.flow.exit_code == 7
    answer = drain(bench.source.fileno())
    assert answer == b"answer" * 5000 + (b"later" if first == SRC2DST else b"")


@pytest.mark.spec("PROXY-028")
def test_splice_until_somebody_inspects_and_from_pass_rest_on() -> None:
    cls = answering(lambda self, direction, chunk: PASS_REST)
    bench = Bench(cls)
    bench.flow.start()
    bench.source.send(b"a" * 1000)
    bench.until(lambda: bench.flow.streams[SRC2DST].moved == 1000)
    assert bench.flow.counters()["src2dst"]["spliced"] == 0
    bench.settle()
    bench.source.send(b"b" * 500)
    bench.until(lambda: bench.flow.streams[SRC2DST].moved == 1500)
    assert bench.flow.counters()["src2dst"] == {
        "read": 1500, "written": 1500, "spliced": 500, "discarded": 0}  # fmt: skip
    assert drain(bench.far.read_in) == b"a" * 1000 + b"b" * 500


def test_a_filter_sees_how_much_was_read_and_how_much_was_delivered() -> None:
    cls = answering(lambda self, direction, chunk: Replace(chunk[:10]))
    bench = Bench(cls)
    bench.flow.start()
    link = bench.flow.tools
    assert (link.moved(SRC2DST), link.delivered(SRC2DST)) == (0, 0)
    bench.source.send(b"a" * 1000)
    bench.until(lambda: link.delivered(SRC2DST))
    assert (link.moved(SRC2DST), link.delivered(SRC2DST)) == (1000, 10)
    assert (link.moved(DST2SRC), link.delivered(DST2SRC)) == (0, 0)


@pytest.mark.spec("PROXY-030")
@pytest.mark.parametrize("filters", [(StopSrc,), (Inspect, StopSrc), (StopSrc, Inspect)])
def test_what_waits_already_when_the_call_begins_does_not_slip_through(filters: Any) -> None:
    bench = Bench(*filters)
    bench.source.send(b"secret" * 10_000)
    bench.flow.start()
    bench.until(lambda: at_end(bench.far.read_in))
    assert bench.flow.counters()["src2dst"]["written"] == 0


@pytest.mark.spec("PROXY-026")
def test_reading_waits_where_all_memory_is_held_and_goes_on_when_there_is_some() -> None:
    """Two calls share 200 KB: the held bytes of both stay below it."""
    memory = Memory(200_000, piece=65536)
    released: list[Any] = []

    def hold(self: Any, direction: Any, chunk: memoryview) -> Any:
        released.append(self)
        return HOLD

    cls = answering(hold)
    one = Bench(cls, memory=memory)
    one.flow.start()
    one.source.setblocking(False)
    sent = 0
    for _ in range(40):
        with contextlib.suppress(BlockingIOError):
            sent += one.source.send(b"x" * 20_000)
        one.settle(0.005)
    assert 100_000 < memory.held <= 200_000 and memory.peak <= 200_000
    assert sent > memory.held
    assert not one.ended
    before = one.flow.streams[SRC2DST].moved
    filter_object = one.flow.chain.stages[0].filter
    filter_object.link.held(SRC2DST).take()
    one.until(lambda: one.flow.streams[SRC2DST].moved > before)
    assert memory.peak <= 200_000


@pytest.mark.spec("PROXY-026")
def test_waiting_for_memory_has_a_deadline() -> None:
    memory = Memory(100_000)
    memory.add(100_000)
    bench = Bench(Inspect, memory=memory, settings=Settings(memory_patience=0.1))
    bench.flow.start()
    bench.source.send(b"x")
    memory.add(-1)
    memory.add(1)
    memory.add(-90_000)
    memory.add(90_000)
    assert bench.cause().kind == "memory"


@pytest.mark.spec("PROXY-023", "PROXY-025")
def test_an_abort_closes_every_descriptor_at_once(descriptors: None) -> None:
    def boom(self: Any, direction: Any, chunk: memoryview) -> Any:
        raise RuntimeError("bug")

    bench = Bench(Pass, answering(boom))
    bench.flow.start()
    bench.source.send(b"x")
    cause = bench.cause()
    assert (cause.kind, cause.filter, cause.exit_code) == ("filter-error", "answering", 125)
    assert "test_proxy_flow.py:" in cause.reason and "bug" in cause.reason
    assert at_end(bench.far.read_in) and bench.source.recv(1) == b""
    assert bench.far.ended == ["terminate"]
    for fd in (bench.far.read_in, bench.far.write_out):
        os.close(fd)
    bench.source.close()
    bench.loop.close()


def test_an_abort_lets_nothing_more_pass() -> None:
    cls = answering(lambda self, d, chunk: Abort("forbidden") if b"!" in bytes(chunk) else PASS)
    bench = Bench(cls)
    bench.flow.start()
    bench.source.send(b"fine")
    bench.until(lambda: bench.flow.streams[SRC2DST].moved == 4)
    bench.source.send(b"not! fine")
    assert bench.cause().exit_code == 126
    assert drain(bench.far.read_in) == b"fine"


@pytest.mark.parametrize("verdict", ["close", "abort"])
def test_what_a_filter_closes_lets_nothing_more_pass_of_the_other_direction(verdict: str) -> None:
    """Both directions have bytes at the same moment; the first one's say ends the second."""

    class Guard(Inspect):
        name = "guard"
        inspects = (SRC2DST,)

        def data(self, direction: Any, chunk: memoryview) -> Any:
            return (PASS, Close(DST2SRC)) if verdict == "close" else Abort("enough")

    bench = Bench(Guard)
    bench.flow.start()
    bench.settle()
    bench.source.send(b"stop")
    os.write(bench.far.write_out, b"secret")
    bench.settle()
    assert bench.source.recv(100) == b""
    assert bench.flow.counters()["dst2src"]["written"] == 0


def test_a_far_end_that_cannot_be_reached(descriptors: None) -> None:
    far = Ends()
    far.refuse = LocalError("no client")
    bench = Bench(Pass, far=far)
    bench.flow.start()
    assert bench.cause().kind == "far" and bench.flow.exit_code == 125
    assert bench.source.recv(1) == b""
    for fd in (far.read_in, far.write_out):
        os.close(fd)
    bench.source.close()
    bench.loop.close()


def test_replaced_bytes_may_be_more_than_the_reader_takes_at_once() -> None:
    bench = Bench(answering(lambda self, d, chunk: Replace(*[bytes(chunk) * 500] * 3)))
    bench.flow.start()
    bench.source.send(b"0123456789" * 100)
    got = b""
    while len(got) < 1_500_000:
        bench.settle(0.002)
        got += drain(bench.far.read_in)
    assert got == b"0123456789" * 150_000
    assert bench.flow.memory.held == 0


@pytest.mark.spec("PROXY-018")
@pytest.mark.parametrize("loop_kind", ["reactor", "asyncio"])
def test_random_bytes_each_way_through_three_filters_arrive_unchanged(loop_kind: str) -> None:
    _through_three_filters(24 << 20, loop_kind)


@pytest.mark.soak
@pytest.mark.spec("PROXY-018")
def test_a_gibibyte_each_way_through_three_filters() -> None:
    _through_three_filters(1 << 30, "reactor")


def _through_three_filters(size: int, loop_kind: str) -> None:
    """Both directions at once, with ``cat`` as the far end: what comes back is what was sent."""
    loop: Any = Reactor() if loop_kind == "reactor" else asyncio.new_event_loop()
    source, inner = socket.socketpair()
    source.setblocking(False)
    block = os.urandom(1 << 20)
    sent, got = hashlib.sha256(), hashlib.sha256()
    left = size
    waiting = memoryview(b"")
    ended: list[Flow] = []
    at_end: list[bool] = []

    def feed() -> None:
        nonlocal left, waiting
        if not waiting and left:
            waiting = memoryview(block)[: min(left, len(block))]
            sent.update(waiting)
            left -= len(waiting)
        if not waiting:
            loop.remove_writer(source.fileno())
            source.shutdown(socket.SHUT_WR)
            return
        waiting = waiting[source.send(waiting) :]

    def take() -> None:
        data = source.recv(1 << 18)
        got.update(data)
        if not data:
            # Only now: the flow is over when all of it is written, not when it is read.
            loop.remove_reader(source.fileno())
            at_end.append(True)
            stop()

    def stop() -> None:
        if ended and at_end:
            loop.call_soon(loop.stop)

    def over(flow: Flow) -> None:
        ended.append(flow)
        stop()

    flow = Flow(
        loop,
        [use_filter(Inspect, {}, f"inspect{n}") for n in range(3)],
        Call("work", "vault", "x"),
        ProgramEnd(loop, ["/bin/cat"], log=print),
        in_fd=inner.dup().detach(),
        out_fd=inner.detach(),
        on_end=over,
        log=print,
    )
    flow.start()
    loop.add_writer(source.fileno(), feed)
    loop.add_reader(source.fileno(), take)
    loop.call_later(100, loop.stop)
    (loop.run if loop_kind == "reactor" else loop.run_forever)()
    assert ended and at_end and flow.exit_code == 0
    assert flow.counters()["dst2src"]["written"] == size
    assert got.digest() == sent.digest()
    assert [stage.filter.seen for stage in flow.chain.stages] == [2 * size] * 3
    source.close()
    loop.close()


@pytest.mark.alone
@pytest.mark.spec("PROXY-023")
def test_a_far_program_that_ignores_sigterm_is_killed_after_two_seconds(descriptors: None) -> None:
    loop = Reactor()
    far = ProgramEnd(
        loop, ["/bin/sh", "-c", "trap '' TERM; echo up; while :; do sleep 9; done"], log=print
    )
    source, inner = socket.socketpair()
    ended: list[Flow] = []
    flow = Flow(
        loop,
        [],
        Call("work", "vault", "x"),
        far,
        in_fd=inner.dup().detach(),
        out_fd=inner.detach(),
        on_end=lambda flow: ended.append(flow) or loop.stop(),
        log=print,
    )
    flow.start()
    loop.add_reader(source.fileno(), lambda: loop.stop())
    loop.call_later(30, loop.stop)
    loop.run()
    assert source.recv(3) == b"up\n"
    flow.abort(Cause("killed"))
    assert source.recv(1) == b"" and alive(far.pid)
    begun = loop.time()
    loop.run()
    loop.remove_reader(source.fileno())
    while not ended:
        loop.run()
    assert 1.9 < loop.time() - begun < 10 and not alive(far.pid)
    source.close()
    loop.close()


# --- the far end inside a Sluice domain -----------------------------------------------------------


@pytest.mark.spec("PROXY-001", "PROXY-012", "PROXY-008")
@pytest.mark.parametrize("code", [0, 42])
def test_the_far_end_inside_a_domain_is_asked_of_the_agent(tmp_path: Any, code: int) -> None:
    from tests.support.proxy_agent import StandInAgent

    loop = Reactor()
    agent = StandInAgent(loop, f"cat; echo oops >&2; exit {code}")
    call = Call("work", "@dispvm:dvm", "test.Svc", "a+b")
    lines: list[str] = []
    far = AgentEnd(loop, call, log=lines.append, timeout=30, agent_socket=agent.path)
    bench = Bench(Inspect, far=far)
    bench.loop = loop
    source, inner = socket.socketpair()
    ended: list[Flow] = []
    flow = Flow(
        loop,
        [use_filter(Inspect, {})],
        call,
        far,
        in_fd=inner.dup().detach(),
        out_fd=inner.detach(),
        on_end=lambda flow: ended.append(flow) or loop.stop(),
        log=lines.append,
    )
    flow.start()
    source.send(b"hello")
    source.shutdown(socket.SHUT_WR)
    loop.call_later(30, loop.stop)
    loop.run()
    assert ended and flow.exit_code == code
    assert source.recv(100) == b"hello" and source.recv(1) == b""
    assert agent.asked == [(b"@dispvm:dvm", b"test.Svc+a+b")]
    assert "far end: oops" in lines
    agent.close()


@pytest.mark.spec("PROXY-012")
def test_an_agent_that_refuses_or_is_not_there(tmp_path: Any) -> None:
    from tests.support.proxy_agent import StandInAgent

    for refuses, code in ((True, 126), (False, 125)):
        loop = Reactor()
        agent = StandInAgent(loop, None)
        path = agent.path if refuses else str(tmp_path / "none")
        far = AgentEnd(loop, Call("w", "v", "s"), log=print, timeout=30, agent_socket=path)
        source, inner = socket.socketpair()
        ended: list[Flow] = []
        flow = Flow(
            loop,
            [],
            far._call,
            far,
            in_fd=inner.dup().detach(),
            out_fd=inner.detach(),
            on_end=lambda flow, ended=ended, loop=loop: ended.append(flow) or loop.stop(),
            log=print,
        )
        flow.start()
        loop.call_later(30, loop.stop)
        loop.run()
        assert ended and flow.exit_code == code
        assert source.recv(1) == b""
        agent.close()
