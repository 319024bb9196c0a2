"""The chain as a state machine: verdicts, order, holding, failing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sluice.proxy.chain import FAILED
from sluice.proxy.filters.byte_limit import ByteLimit
from sluice.proxy.filters.pass_ import Pass
from sluice.proxy.filters.stop import StopDst, StopSrc
from sluice.proxy.filters.timeout import Timeout
from sluice.proxy.playbook import (
    DST2SRC,
    SRC2DST,
    aborts,
    acts,
    after,
    begins,
    closed,
    data,
    delivered,
    ends,
    eof,
    mode,
    nothing,
    passes,
    paused,
    play,
    waits,
)
from sluice.proxy.verdicts import (
    CONTINUE,
    DROP,
    HOLD,
    PASS,
    PASS_REST,
    Abort,
    Close,
    Emit,
    Pause,
    Refuse,
    Replace,
    Resume,
)

BOTH = (SRC2DST, DST2SRC)


def scripted(**events: Any) -> type[Any]:
    """Return a filter class that answers each event with what a function or a value says."""

    class Scripted:
        name = "scripted"
        inspects = events.pop("inspects", BOTH)
        max_held = events.pop("max_held", 1 << 20)

        class Options:
            pass

        def __init__(self, options: Any, link: Any) -> None:
            self.link = link
            self.seen: list[Any] = []

    for name, answer in events.items():

        def event(self: Any, *args: Any, _answer: Any = answer, _name: str = name) -> Any:
            self.seen.append((_name, *(bytes(a) if isinstance(a, memoryview) else a for a in args)))
            return _answer(self, *args) if callable(_answer) else _answer

        setattr(Scripted, name, event)
    if Scripted.inspects and "data" not in events:
        Scripted.data = lambda self, direction, chunk: PASS  # type: ignore[attr-defined]
    return Scripted


def tag(letter: bytes) -> type[Any]:
    return scripted(data=lambda self, direction, chunk: Replace(bytes(chunk) + letter))


@pytest.mark.spec("PROXY-027")
def test_src2dst_goes_first_to_last_and_dst2src_last_to_first() -> None:
    book = play(tag(b"1"), tag(b"2"), tag(b"3"))
    book >> data(SRC2DST, b">") << passes(b">123", SRC2DST)
    book >> data(DST2SRC, b"<") << passes(b"<321", DST2SRC)


def test_pass_hands_on_the_very_bytes() -> None:
    play(scripted(data=PASS)) >> data(SRC2DST, b"abc") << passes(b"abc", SRC2DST)


def test_drop_and_replace_by_nothing() -> None:
    book = play(scripted(data=DROP)) >> data(SRC2DST, b"abc") << nothing()
    assert book.chain.dropped[SRC2DST] == 3
    play(scripted(data=Replace())) >> data(SRC2DST, b"abc") << nothing()


def test_hold_keeps_until_taken() -> None:
    def answer(self: Any, direction: Any, chunk: memoryview) -> Any:
        if chunk[-1:] != b"\n":
            return HOLD
        return Replace(self.link.held(direction).take(), chunk)

    book = play(scripted(data=answer))
    book >> data(SRC2DST, b"ab") << nothing()
    book >> data(SRC2DST, b"cd") << nothing()
    assert book.memory.held == 4
    book >> data(SRC2DST, b"e\n") << passes(b"abcde\n")
    assert book.memory.held == 0


def test_bytes_held_at_the_end_are_never_passed_unjudged() -> None:
    play(scripted(data=HOLD)) >> data(SRC2DST, b"x") >> eof(SRC2DST) << aborts("held undecided")


@pytest.mark.spec("PROXY-026")
def test_holding_more_than_declared_aborts() -> None:
    book = play(scripted(data=HOLD, max_held=10))
    book >> data(SRC2DST, b"12345") >> data(DST2SRC, b"12345") << nothing()
    book >> data(SRC2DST, b"6") << aborts("more than the 10 bytes", "filter-error")
    book = play(scripted(data=HOLD))
    book >> data(SRC2DST, b"x" * (1 << 20)) << nothing()
    book >> data(SRC2DST, b"x") << aborts("more than the 1048576 bytes")
    book >> closed()
    assert book.memory.held == 0


def test_pass_rest_is_not_asked_again_in_that_direction() -> None:
    book = play(scripted(data=PASS_REST))
    book << mode(SRC2DST, "inspect")
    book >> data(SRC2DST, b"a") << passes(b"a") << mode(SRC2DST, "splice")
    book << mode(DST2SRC, "inspect")
    book >> data(SRC2DST, b"b") << passes(b"b")
    assert len(book.filter.seen) == 1


def test_pass_rest_is_not_told_of_the_end_either() -> None:
    book = play(scripted(data=PASS_REST, eof=Abort("asked")))
    book >> data(SRC2DST, b"a") << passes(b"a") >> eof(SRC2DST) << ends(SRC2DST)
    book >> eof(DST2SRC) << aborts("asked")


def test_pass_rest_after_replace_hands_on_only_the_replacement() -> None:
    cls = scripted(data=lambda self, d, c: (Replace(b"new"), PASS_REST))
    play(cls) >> data(SRC2DST, b"old") << passes(b"new") << mode(SRC2DST, "splice")


def test_pass_rest_while_holding_is_an_error() -> None:
    cls = scripted(data=lambda self, d, c: HOLD if c == b"a" else PASS_REST)
    play(cls) >> data(SRC2DST, b"a") >> data(SRC2DST, b"b") << aborts("while it held")


def test_close_ends_the_direction_behind_the_filter_and_discards_what_comes() -> None:
    cls = scripted(data=lambda self, d, c: (Replace(c[:2]), Close(d)))
    last = scripted(data=PASS, eof=PASS)
    book = play(cls, last)
    book >> data(SRC2DST, b"abcd") << passes(b"ab") << ends(SRC2DST) << mode(SRC2DST, "discard")
    book >> data(SRC2DST, b"more") << nothing()
    book >> eof(SRC2DST) << nothing()
    assert [e for e in book.chain.stages[1].filter.seen if e[0] == "eof"] == [("eof", SRC2DST)]


def test_filters_before_a_closed_one_still_see_what_comes() -> None:
    first = scripted(data=PASS)
    book = play(first, StopSrc)
    book << ends(SRC2DST) << mode(SRC2DST, "inspect")
    book >> data(SRC2DST, b"x") << nothing()
    assert book.filter.seen == [("data", SRC2DST, b"x")]
    assert book.chain.dropped[SRC2DST] == 1


def test_a_close_before_the_call_begins_is_told_when_all_filters_are_opened() -> None:
    later = scripted(opened=CONTINUE, data=PASS, eof=PASS)
    book = play(StopSrc, later) << ends(SRC2DST)
    assert [e[0] for e in book.chain.stages[1].filter.seen] == ["opened", "eof"]
    held = scripted(opened=CONTINUE, data=PASS, eof=HOLD, timer=lambda self, k: Close(DST2SRC))
    book = play(held, StopDst).open()
    assert not book.chain.ended[DST2SRC]
    book.filter.link.set_timer("t", 1)
    book >> after(1) << ends(DST2SRC)


def test_eof_may_emit_and_be_held_back() -> None:
    cls = scripted(
        eof=lambda self, d: (Emit(d, b"tail"), HOLD), timer=lambda self, k: Close(SRC2DST)
    )
    book = play(cls).open()
    book.filter.link.set_timer("t", 5)
    book >> eof(SRC2DST) << passes(b"tail")
    assert not book.chain.ended[SRC2DST]
    book >> after(5) << ends(SRC2DST)


def test_emit_after_the_end_is_an_error() -> None:
    book = play(scripted(eof=PASS)) >> eof(SRC2DST) << ends(SRC2DST)
    book >> acts(Emit(SRC2DST, b"x")) << aborts("after the end", "filter-error")


def test_emit_from_data_into_the_other_direction_passes_the_filters_behind() -> None:
    first = tag(b"1")
    second = scripted(data=lambda self, d, c: (DROP, Emit(d.other, b"no")))
    third = tag(b"3")
    book = play(first, second, third)
    book >> data(SRC2DST, b"x") << passes(b"no1", DST2SRC)


def test_pause_and_resume() -> None:
    cls = scripted(data=lambda self, d, c: (PASS, Pause(d)), timer=lambda self, k: Resume(SRC2DST))
    book = play(cls).open()
    book.filter.link.set_timer("t", 1)
    book >> data(SRC2DST, b"x") << passes(b"x") << paused(SRC2DST) << paused(DST2SRC, False)
    book >> after(1) << paused(SRC2DST, False)


def test_a_timer_that_is_set_again_at_once_does_not_hold_up_everything() -> None:
    calls: list[str] = []

    def again(self: Any, key: str) -> Any:
        calls.append(key)
        self.link.set_timer(key, 0)
        return ()

    book = play(scripted(timer=again)).open()
    book.filter.link.set_timer("b", 2)
    book.filter.link.set_timer("a", 1)
    book.now = 3
    book.chain.expire()
    assert calls == ["a", "b"]
    book.chain.expire()
    assert sorted(calls) == ["a", "a", "b", "b"]


def test_opened_refuse_hold_continue() -> None:
    second = scripted(opened=CONTINUE)
    play(scripted(opened=Refuse("not you")), second) << aborts("not you", "filter")
    book = play(scripted(opened=HOLD), second) << waits()
    assert book.chain.stages[1].filter.seen == []
    book >> acts(CONTINUE) << begins()
    assert len(book.chain.stages[1].filter.seen) == 1
    play(scripted(opened=HOLD)) >> acts(Refuse("late")) << aborts("late")


def test_a_timer_of_opened_may_continue() -> None:
    cls = scripted(opened=lambda self, call: self.link.set_timer("t", 2) or HOLD, timer=CONTINUE)
    play(cls) << waits()
    book = play(cls)
    book >> after(2) << begins()


@pytest.mark.spec("PROXY-025")
@pytest.mark.parametrize("kind", [ZeroDivisionError, SystemExit, asyncio.CancelledError])
@pytest.mark.parametrize(
    "event", ["opened", "data", "eof", "timer", "drained", "closed", "__init__"]
)
def test_an_exception_in_any_event_fails_closed_and_names_file_and_line(
    event: str, kind: type[BaseException]
) -> None:
    def boom(self: Any, *args: Any) -> Any:
        raise kind("boom\x1b[31m")

    line = boom.__code__.co_firstlineno + 1
    listed = event not in ("drained", "__init__")
    cls = scripted(**{"data": PASS, **({event: boom} if listed else {})})
    if event == "__init__":
        cls.__init__ = boom  # type: ignore[misc]
    book = play(cls).open()
    changed = []
    book.chain.on_change = lambda: changed.append(book.chain.state)
    if event == "drained":
        book.filter.link.on_drained(lambda direction: boom(None))
        book.chain.drained(SRC2DST)
        assert changed == [FAILED], "nobody else looks at the chain then"
    elif event == "timer":
        book.filter.link.set_timer("t", 1)
        book >> after(1)
    elif event == "data":
        book >> data(SRC2DST, b"x")
    elif event == "eof":
        book >> eof(SRC2DST)
    elif event == "closed":
        book >> closed()
    book << aborts(f"test_proxy_chain.py:{line}", "filter-error")
    failure = book.chain.failure
    assert failure is not None
    assert failure.filter == "scripted" and failure.exit_code == 125
    assert "\x1b" not in failure.reason and "boom" in failure.reason
    assert book.take(SRC2DST) == b""


def test_an_interrupt_by_the_user_is_no_fault_of_the_filter() -> None:
    def interrupted(self: Any, *args: Any) -> Any:
        raise KeyboardInterrupt

    book = play(scripted(data=interrupted)).open()
    with pytest.raises(KeyboardInterrupt):
        book >> data(SRC2DST, b"x")


@pytest.mark.parametrize("answer", [None, "pass", 7, Refuse("x"), (PASS, None)])
def test_an_answer_that_is_no_verdict_fails_closed(answer: Any) -> None:
    play(scripted(data=answer)) >> data(SRC2DST, b"x") << aborts("to data", "filter-error")


def test_abort_stops_everything_and_closed_comes_once() -> None:
    cls = scripted(data=Abort("enough"), closed=None)
    book = play(cls, scripted(data=PASS))
    book >> data(SRC2DST, b"x") << aborts("enough", "filter")
    book >> data(SRC2DST, b"y") << nothing()
    book >> closed() >> closed()
    assert [e[0] for e in book.filter.seen] == ["data", "closed"]
    assert book.chain.failure is not None and book.chain.failure.exit_code == 126


def test_a_kept_view_does_not_see_later_bytes_as_its_own() -> None:
    """The playbook spoils the memory of a chunk, so a filter that keeps a view is found out."""
    kept: list[memoryview] = []
    book = play(scripted(data=lambda self, d, c: kept.append(c) or PASS))
    book >> data(SRC2DST, b"abc") << passes(b"abc")
    assert bytes(kept[0]) != b"abc"


# --- the first built-in filters -------------------------------------------------------------------


@pytest.mark.spec("PROXY-029")
def test_byte_limit_passes_exactly_so_many_then_ends() -> None:
    book = play(ByteLimit, src2dst=5)
    book >> data(SRC2DST, b"abc") << passes(b"abc")
    book >> data(SRC2DST, b"defg") << passes(b"de") << ends(SRC2DST) << mode(SRC2DST, "discard")
    book << mode(DST2SRC, "splice")
    play(ByteLimit, dst2src=3) >> data(DST2SRC, b"abc") << passes(b"abc") << ends(DST2SRC)


@pytest.mark.spec("PROXY-029")
def test_byte_limit_of_nothing_and_of_no_limit() -> None:
    play(ByteLimit, src2dst=0) << ends(SRC2DST) << mode(SRC2DST, "discard")
    play(ByteLimit, src2dst=-1) << mode(SRC2DST, "splice")


@pytest.mark.spec("PROXY-029")
def test_byte_limit_may_abort_at_the_first_byte_over() -> None:
    book = play(ByteLimit, src2dst="1k", over="abort")
    book >> data(SRC2DST, b"x" * 1024) << passes(b"x" * 1024)
    book >> data(SRC2DST, b"x") << aborts("more than 1024 bytes src2dst", "filter")
    play(ByteLimit, src2dst=0, over="abort") >> data(SRC2DST, b"x") << aborts("more than 0")


@pytest.mark.spec("PROXY-030")
def test_stop_src_and_stop_dst_close_one_direction() -> None:
    play(StopSrc) << ends(SRC2DST) << mode(SRC2DST, "discard") << mode(DST2SRC, "splice")
    play(StopDst) << ends(DST2SRC) << mode(DST2SRC, "discard") << mode(SRC2DST, "splice")


@pytest.mark.spec("PROXY-031")
def test_timeout_of_each_direction() -> None:
    play(Timeout, src2dst="2s") >> after(2) << aborts("src2dst has not ended after 2s", "filter")
    play(Timeout, dst2src=0.5) >> after(0.5) << aborts("dst2src has not ended after 500ms")
    play(Timeout, src2dst="2s") >> after(1.9) << nothing()
    play(Timeout) >> after(1e6) << nothing()
    book = play(Timeout, src2dst=2, dst2src=3) >> delivered(SRC2DST)
    book >> after(2.9) << nothing()
    book >> after(0.1) << aborts("dst2src")


def test_pass_inspects_nothing() -> None:
    play(Pass) << mode(SRC2DST, "splice") << mode(DST2SRC, "splice")
