"""The filters of time and pace, and ``sniff``, each as a script of events and answers."""

from __future__ import annotations

import base64
import os
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from sluice.proxy.filters.idle_timeout import IdleTimeout
from sluice.proxy.filters.sniff import Sniff
from sluice.proxy.filters.streamline import Streamline
from sluice.proxy.filters.throttle import Throttle
from sluice.proxy.link import Call
from sluice.proxy.playbook import (
    DST2SRC,
    SRC2DST,
    Playbook,
    aborts,
    after,
    data,
    delivered,
    ends,
    eof,
    mode,
    nothing,
    passes,
    paused,
    play,
)
from sluice.proxy.schema import FieldError, use_filter

# --- idle-timeout ---------------------------------------------------------------------------------


@pytest.mark.spec("PROXY-032")
def test_idle_timeout_ends_a_call_in_which_nothing_moves() -> None:
    book = play(IdleTimeout, both="4s") << mode(SRC2DST, "splice")
    book >> after(3.9) << nothing()
    book >> data(SRC2DST, b"x") << passes(b"x")
    book >> after(4) << nothing()
    book >> data(DST2SRC, b"y") << passes(b"y")
    book >> after(3.9) << nothing()
    book >> after(1.2) << aborts("no byte moved for 4s", "filter")


@pytest.mark.spec("PROXY-032")
def test_idle_timeout_sees_what_is_delivered_of_what_was_read_long_ago() -> None:
    """Nothing is read while a slow filter hands on what it holds: that is not idle."""
    uses = [use_filter(Throttle, {"src2dst": 1000, "burst": 1000}),
            use_filter(IdleTimeout, {"both": "4s"})]  # fmt: skip
    book = Playbook(uses, Call("work", "vault", "x"))
    book >> data(SRC2DST, b"x" * 20_000) << passes(b"x" * 1000)
    book >> after(18.5)
    assert book.chain.failure is None and len(book.take(SRC2DST)) >= 18_000
    book >> after(2)
    assert len(book.take(SRC2DST)) <= 1000
    book >> after(5) << aborts("no byte moved for 4s", "filter")


@pytest.mark.spec("PROXY-032")
def test_idle_timeout_of_one_direction() -> None:
    book = play(IdleTimeout, src2dst="4s")
    book >> data(DST2SRC, b"y") << passes(b"y")
    book >> after(5) << aborts("no byte moved src2dst")
    book = play(IdleTimeout, dst2src="4s") >> delivered(DST2SRC)
    book >> after(100) << nothing()
    play(IdleTimeout) >> after(1e6) << nothing()
    with pytest.raises(FieldError, match="at least 100ms"):
        play(IdleTimeout, both=0)


# --- throttle -------------------------------------------------------------------------------------


@pytest.mark.spec("PROXY-035")
@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 3)), min_size=1, max_size=20),
    st.integers(1, 3000),
    st.integers(1, 4000),
)
def test_throttle_never_passes_more_than_rate_times_time_plus_burst(
    steps: list[tuple[int, float]], rate: int, burst: int
) -> None:
    book = play(Throttle, src2dst=rate, burst=burst).open()
    sent = got = b""
    seen = [(0.0, 0)]
    for size, pause in steps:
        if not book.chain.paused[SRC2DST]:
            piece = os.urandom(size)
            sent += piece
            book >> data(SRC2DST, piece)
            got += book.take(SRC2DST)
        for _ in range(4):
            book.advance(pause / 4)
            got += book.take(SRC2DST)
            # From whatever moment on: what was not used before cannot be saved up.
            for moment, size in seen:
                assert len(got) - size <= rate * (book.now - moment) + burst + 1e-6
            seen.append((book.now, len(got)))
    book.end(SRC2DST)
    book.advance(len(sent) / rate + 10)
    got += book.take(SRC2DST)
    assert got == sent
    book << ends(SRC2DST)


@pytest.mark.spec("PROXY-035")
def test_throttle_lets_a_burst_pass_after_a_pause_however_long() -> None:
    book = play(Throttle, src2dst=10, burst=100).open()
    book >> data(SRC2DST, b"x" * 100) << passes(b"x" * 100)
    book >> after(3600)
    book >> data(SRC2DST, b"y" * 300) << passes(b"y" * 100) << paused(SRC2DST)


@pytest.mark.spec("PROXY-035")
def test_throttle_is_not_much_slower_than_its_rate() -> None:
    book = play(Throttle, dst2src="1k", burst="1k") << mode(SRC2DST, "splice")
    book >> data(DST2SRC, b"x" * 11264) << paused(DST2SRC)
    assert len(book.take(DST2SRC)) == 1024
    book.advance(5)
    assert len(book.take(DST2SRC)) >= 4 * 1024
    book.advance(5.5)
    book.take(DST2SRC)
    book << paused(DST2SRC, False)


def test_throttle_of_nothing_is_a_mistake() -> None:
    with pytest.raises(FieldError, match="lets nothing pass"):
        play(Throttle, src2dst=0)


# --- streamline -----------------------------------------------------------------------------------


@pytest.mark.spec("PROXY-038")
def test_streamline_releases_full_blocks_after_its_delays() -> None:
    book = play(Streamline, buf_size=10, delay_read=2, delay_write=8, chance=0.5)
    book << paused(SRC2DST) << paused(DST2SRC)
    book >> after(0.9) << paused(SRC2DST)
    book >> after(0.1) << paused(SRC2DST, False)
    book >> data(SRC2DST, b"abcd") << nothing() << paused(SRC2DST, False)
    book >> data(SRC2DST, b"efghi") << nothing() << paused(SRC2DST, False)
    book >> data(SRC2DST, b"jkl") << nothing() << paused(SRC2DST)
    book >> after(3.9) << nothing()
    book >> after(0.1) << passes(b"abcdefghij") << paused(SRC2DST)
    book >> after(1) << paused(SRC2DST, False)
    book >> eof(SRC2DST) << nothing()
    book >> after(4) << passes(b"kl") << ends(SRC2DST)


@pytest.mark.spec("PROXY-038")
def test_streamline_delivers_several_blocks_and_an_empty_stream() -> None:
    book = play(Streamline, buf_size=4, delay_read=0, delay_write=1)
    book >> after(0.01)
    book >> data(SRC2DST, b"0123456789") << nothing()
    book >> eof(SRC2DST)
    got = b""
    for _ in range(3):
        book.advance(0.5)
        got += book.take(SRC2DST)
    assert got == b"0123456789"
    book << ends(SRC2DST)
    book >> eof(DST2SRC) >> after(1) << ends(DST2SRC)


def test_streamline_uses_chance_up_to_its_delay() -> None:
    for chance, moment in ((0.0, 0.0), (0.25, 0.5), (0.99, 1.98)):
        book = play(Streamline, buf_size=1, delay_read=2, chance=chance).open()
        assert book.chain.timers.next_due() == pytest.approx(moment)


# --- sniff ----------------------------------------------------------------------------------------


@pytest.mark.spec("PROXY-036", "PROXY-053")
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "src2dst: " + base64.b64encode(b"a\x1b[1m\n\xff").decode()),
        ({"decode": "hex"}, "src2dst: 61 1b 5b 31 6d 0a ff"),
        ({"decode": "string"}, r"src2dst: a\x1b[1m\x0a\xff"),
        ({"decode": "string", "encoding": "latin-1"}, r"src2dst: a\x1b[1m\x0a\xff"),
    ],
)
def test_sniff_logs_in_three_ways_and_never_raw(options: dict[str, Any], line: str) -> None:
    book = play(Sniff, **options) >> data(SRC2DST, b"a\x1b[1m\n\xff")
    book << passes(b"a\x1b[1m\n\xff")
    assert book.log == [f"sniff: {line}"]


@pytest.mark.spec("PROXY-036")
def test_sniff_stops_at_max_bytes_and_leaves_the_rest_to_the_kernel() -> None:
    book = play(Sniff, decode="string", max_bytes=5)
    book >> data(SRC2DST, b"abc") << passes(b"abc") << mode(SRC2DST, "inspect")
    book >> data(SRC2DST, b"defg") << passes(b"defg") << mode(SRC2DST, "splice")
    book << mode(DST2SRC, "inspect")
    assert book.log == ["sniff: src2dst: abc", "sniff: src2dst: de"]


def test_sniff_of_an_unknown_encoding() -> None:
    with pytest.raises(FieldError, match="no known encoding"):
        play(Sniff, encoding="klingon")
