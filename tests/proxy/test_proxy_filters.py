"""The built-in filters, each as a script of events and answers."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from sluice.proxy import recording, state
from sluice.proxy.filters import count as counting
from sluice.proxy.filters.concurrent import Concurrent
from sluice.proxy.filters.content import Content
from sluice.proxy.filters.count import Count
from sluice.proxy.filters.idle_timeout import IdleTimeout
from sluice.proxy.filters.json import Json
from sluice.proxy.filters.lines import Lines
from sluice.proxy.filters.record import Record
from sluice.proxy.filters.sniff import Sniff
from sluice.proxy.filters.streamline import Streamline
from sluice.proxy.filters.throttle import Throttle
from sluice.proxy.json_rules import Judge, has_long_number, too_deep
from sluice.proxy.kinds import kind_of
from sluice.proxy.line_rules import LineRules
from sluice.proxy.link import Call
from sluice.proxy.playbook import (
    DST2SRC,
    SRC2DST,
    Playbook,
    aborts,
    after,
    begins,
    closed,
    data,
    delivered,
    ends,
    eof,
    logs,
    mode,
    nothing,
    passes,
    paused,
    play,
    waits,
)
from sluice.proxy.schema import FieldError, use_filter

ROOT = Path(__file__).resolve().parents[2]

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


# --- content --------------------------------------------------------------------------------------

SAMPLES = {
    b"%PDF-1.7 x": "pdf", b"\x89PNG\r\n\x1a\nxx": "png", b"\xff\xd8\xff\xe0": "jpeg",
    b"GIF89a": "gif", b"RIFF\0\0\0\0WEBP": "webp", b"RIFF\0\0\0\0XXXX": "unknown",
    b"PK\x03\x04" + b"\0" * 26 + b"[Content_Types].xml": "ooxml", b"PK\x03\x04" + b"\0" * 40: "zip",
    b"PK\x03\x04" + b"\0" * 26 + b"mimetypeapplication/vnd.oasis.opendocument.text": "odf",
    b"\x7fELF\x02": "elf", b"MZ\x90": "pe", b"#!/bin/sh": "script", b"\x1f\x8b\x08": "gzip",
    b"\0" * 257 + b"ustar": "tar", b"hello world\n": "text", "gr\u00fc\u00df".encode(): "text",
    "gr\u00fc\u00df".encode()[:-1]: "text", b"caf\xe9 x": "unknown", b"a\x00b": "unknown",
    b"<!DOCTYPE html><p>": "html", b"<?xml version='1.0'?><a/>": "xml",
    b"<svg xmlns='x'>": "svg", b'{"a": 1}': "json", b"{not": "text", b"": "empty",
    b"\0\0\0\x18ftypmp42": "mp4",
}  # fmt: skip


@pytest.mark.spec("PROXY-042")
@pytest.mark.parametrize("sample", SAMPLES, ids=list(SAMPLES.values()))
def test_kinds(sample: bytes) -> None:
    assert kind_of(sample) == SAMPLES[sample]


@pytest.mark.spec("PROXY-042")
def test_content_holds_the_preview_then_lets_the_kernel_move_the_rest() -> None:
    book = play(Content, allow=["image"], preview=16)
    book >> data(SRC2DST, b"\x89PNG\r\n") << nothing()
    book >> data(SRC2DST, b"\x1a\n" + b"x" * 20) << passes(b"\x89PNG\r\n\x1a\n" + b"x" * 20)
    book << mode(SRC2DST, "splice") << mode(DST2SRC, "splice")


@pytest.mark.spec("PROXY-042")
def test_content_denies_before_the_first_byte_passes() -> None:
    book = play(Content, deny=["executable"])
    book >> data(SRC2DST, b"\x7fELF" + b"\0" * 5000) << aborts("of kind elf", "filter") << nothing()
    play(Content, allow=["pdf"]) >> data(SRC2DST, b"x" * 5000) << aborts("of kind text")


@pytest.mark.spec("PROXY-042")
def test_content_judges_a_stream_shorter_than_the_preview_and_an_empty_one() -> None:
    book = play(Content, allow=["text"]) >> data(SRC2DST, b"hi") << nothing()
    book >> eof(SRC2DST) << passes(b"hi") << ends(SRC2DST)
    play(Content, allow=["pdf"]) >> data(SRC2DST, b"hi") >> eof(SRC2DST) << aborts("kind text")
    play(Content, allow=["pdf"]) >> eof(SRC2DST) << ends(SRC2DST)
    play(Content, deny=["empty"]) >> eof(SRC2DST) << aborts("kind empty")


@pytest.mark.spec("PROXY-042")
def test_content_limits_the_whole_size() -> None:
    book = play(Content, max_size=5000, preview=16)
    book >> data(SRC2DST, b"x" * 5000) << passes(b"x" * 5000) << mode(SRC2DST, "inspect")
    book >> data(SRC2DST, b"x") << aborts("longer than 4.883k")


def test_content_of_an_unknown_kind_is_a_mistake() -> None:
    with pytest.raises(FieldError, match="did you mean 'jpeg'"):
        play(Content, allow=["jpg", "jpe"])


# --- lines ----------------------------------------------------------------------------------------


@pytest.mark.spec("PROXY-040")
def test_lines_allow_and_deny() -> None:
    rules = {"allow": ["GET [^ ]+", "BYE"], "deny": ["secret", r"\.\./"]}
    book = play(Lines, src2dst=rules) << mode(DST2SRC, "splice")
    book >> data(SRC2DST, b"GET /a\nGET /b\r\nBY") << passes(b"GET /a\nGET /b\r\n")
    book >> data(SRC2DST, b"E\n") << passes(b"BYE\n")
    book >> data(SRC2DST, b"GET /c\nGET /secret\nBYE\n") << aborts("a line matches no rule")
    book << nothing()
    play(Lines, src2dst=rules) >> data(SRC2DST, b"GET a b\n") << aborts()
    play(Lines, src2dst=rules) >> data(SRC2DST, b"get /a\n") << aborts()
    play(Lines, src2dst=rules) >> data(SRC2DST, b"GET /../x\n") << aborts()
    play(Lines, src2dst={"allow": []}) >> data(SRC2DST, b"x\n") << aborts()


@pytest.mark.spec("PROXY-040")
def test_lines_drop() -> None:
    book = play(Lines, src2dst={"deny": ["no"]}, on_mismatch="drop", max_line=10)
    book >> data(SRC2DST, b"a\nno\nb\n") << passes(b"a\nb\n")
    book >> data(SRC2DST, b"x" * 11) << nothing()
    book >> data(SRC2DST, b"x" * 100) << nothing()
    book >> data(SRC2DST, b"xx\nfine\n") << passes(b"fine\n")
    book >> data(SRC2DST, b"fine\n" + b"x" * 11 + b"\nfine\n") << passes(b"fine\nfine\n")
    book >> data(SRC2DST, b"fine\n" + b"y" * 11) << passes(b"fine\n")
    book >> data(SRC2DST, b"y\nok\n") << passes(b"ok\n")


@pytest.mark.spec("PROXY-040")
def test_lines_over_long_aborts_before_it_is_complete() -> None:
    play(Lines, src2dst={}, max_line=5) >> data(SRC2DST, b"123456") << aborts("longer than 5")
    book = play(Lines, src2dst={}, max_line=5) >> data(SRC2DST, b"123") << nothing()
    book >> data(SRC2DST, b"456") << aborts("longer than 5")
    play(Lines, src2dst={}, max_line=5) >> data(SRC2DST, b"123456\n") << aborts()


@pytest.mark.spec("PROXY-040")
def test_lines_missing_last_newline() -> None:
    rules = {"allow": ["a+"]}
    book = play(Lines, src2dst=rules) >> data(SRC2DST, b"aa\naaa") << passes(b"aa\n")
    book >> eof(SRC2DST) << passes(b"aaa") << ends(SRC2DST)
    play(Lines, src2dst=rules) >> data(SRC2DST, b"ab") >> eof(SRC2DST) << aborts()
    play(Lines, src2dst=rules) >> eof(SRC2DST) << ends(SRC2DST)


@pytest.mark.spec("PROXY-040")
def test_lines_replace_is_judged_after_it() -> None:
    rules = {"allow": ["to: [a-z]+"], "replace": {"To: ([a-z]+).*": r"to: \1"}}
    book = play(Lines, dst2src=rules) >> data(DST2SRC, b"To: bob <x>\r\n")
    book << passes(b"to: bob\r\n", DST2SRC)
    play(Lines, dst2src=rules) >> data(DST2SRC, b"From: x\n") << aborts()
    with pytest.raises(FieldError, match="newline"):
        play(Lines, dst2src={"replace": {"a": "b\nc"}})


@pytest.mark.spec("PROXY-040")
def test_lines_with_a_pattern_that_would_blow_up_a_backtracking_engine() -> None:
    book = play(Lines, src2dst={"allow": ["(a|a)*b", "(a*)*c"]})
    begun = time.process_time()
    book >> data(SRC2DST, b"a" * 30_000 + b"\n") << aborts()
    assert time.process_time() - begun < 10


@pytest.mark.parametrize(
    ("rules", "part"),
    [({"allow": ["(a"]}, "is no pattern"), ({"alow": []}, "did you mean 'allow'"),
     ({"allow": ["(?=a)"]}, "is no pattern"), ({"replace": ["a"]}, "table"),
     ({"allow": {"a": "b"}}, "lists"), ({"deny": [r"(a)\1"]}, "is no pattern")],
)  # fmt: skip
def test_lines_rules_that_cannot_be_meant(rules: Any, part: str) -> None:
    with pytest.raises(FieldError, match=part):
        play(Lines, src2dst=rules)


PATTERNS = ["a+", "[^x]*", r"\s*b", r"\D+", "(a|b)c?", ".*", "[ab\\n]+", "a\\nb", "(?s).*", "$^",
            "a$", "[^]x]+", r"[\W]", r"x{2,3}", "(?i)ABC", r"\x61\x0a", "b|", r"a\z", "^a", "^a$",
            r"[[:space:]]*", r"\C", r"\bab\b", ".{2}", r"a\r",
            "[[:alpha:]\\s]+", r"\Q[^x\E"]  # fmt: skip
LINE = st.text("aab x\r\v", max_size=3).map(str.encode)
LINES = st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n"])), max_size=4)


@pytest.mark.spec("PROXY-040")
@hypothesis.settings(max_examples=500)
@hypothesis.given(
    st.lists(st.sampled_from(PATTERNS), max_size=3),
    st.lists(st.sampled_from(PATTERNS), max_size=2),
    LINES,
)
def test_judging_by_the_chunk_never_passes_what_judging_by_the_line_would_not(
    allow: list[str], deny: list[str], lines: list[tuple[bytes, bytes]]
) -> None:
    rules = LineRules(allow, deny, {}, bool(allow))
    text = b"".join(body + end for body, end in lines)
    if text and rules.all_pass(text, 1000):
        for line in text.split(b"\n")[:-1]:
            assert rules.line(line + b"\n", 1000) == line + b"\n"


@pytest.mark.spec("PROXY-040")
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize(
    ("rules", "line", "passes_it"),
    [({"deny": ["evil$"]}, b"evil", False), ({"deny": ["evil$"]}, b"evil x", True),
     ({"deny": ["^$"]}, b"", False), ({"deny": ["^$"]}, b"x", True),
     ({"allow": [".{2}"]}, b"a", False), ({"allow": [".{2}"]}, b"ab", True),
     ({"allow": ["[a-z]+[^a-z]"]}, b"abc", False), ({"allow": ["^a+$"]}, b"aa", True),
     ({"allow": ["^a+$"]}, b"aab", False), ({"allow": [r"a\s"]}, b"a\v", False),
     ({"allow": ["[[:alpha:]\\s]+"]}, b"a b", True), ({"allow": [r"\Q[^x]\E"]}, b"[^x]", True)],
)  # fmt: skip
def test_lines_are_judged_without_their_end(
    rules: Any, line: bytes, passes_it: bool, end: bytes
) -> None:
    """Whichever end a line has, and however many lines a chunk has: what its body says counts."""
    for count in (1, 2):
        text = (line + end) * count
        book = play(Lines, src2dst=rules) >> data(SRC2DST, text)
        book << (passes(text) if passes_it else aborts("a line matches no rule"))


def test_simple_patterns_are_judged_by_the_chunk() -> None:
    for pattern in ("GET [^ ]+", "[a-z]+", r"\d{1,3}(\.\d+)?", r".*", r"key=\S+", r"a\s+b", r"\D"):
        assert LineRules([pattern], [pattern], {}, True).by_chunk, pattern
    for pattern in ("(?s).", "a\nb", r"\x0a", r"[\s]", r"\C", r"\pN"):
        assert not LineRules([pattern], [], {}, True).by_chunk, pattern
    whole = LineRules(["^GET [^ ]+$"], ["[^ -~]", "^$", r"\s$"], {}, True)
    for text in (b"GET /a\nGET /b\n", b"GET /a\r\nGET /b\r\n"):
        assert whole.all_pass(text, 100), "one by one, which is slower"


# --- json -----------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"op": {"enum": ["get", "put"]}, "n": {"type": "integer"}},
    "required": ["op"],
    "additionalProperties": False,
}


@pytest.fixture
def schema(tmp_path: Path) -> str:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return str(path)


JSON_PIECES = [
    b"{", b"}", b"[", b"]", b",", b":", b'"a"', b'"', b"\\u12", b'"\\ud800"', b'"\\x"', b"1", b"01",
    b"-", b"1.", b"1e5", b"1E400", b"-1e309", b"1e12345", b"9" * 65, b"true", b"tru", b"NaN", b" ",
    b"\t", b"\x0b", b"\xff", b'"\xff"', b'"\x01"', b"\xef\xbb\xbf", b'"\xed\xa0\x80"',
    b'"\xc3\xa9"', b"\n", b'{"a": [1]}\n', b"[]\n", b"[[[]]]\n", b"[[[[]]]]\n",
    b'["[[[[", [[["]"]]]]\n',
]  # fmt: skip


@pytest.mark.spec("PROXY-041")
@hypothesis.settings(max_examples=1000)
@hypothesis.given(st.lists(st.sampled_from(JSON_PIECES), max_size=8).map(b"".join))
def test_judging_many_messages_at_once_is_judging_each(text: bytes) -> None:
    judge = Judge(None, 3)
    each = [judge.wrong(line) for line in text.split(b"\n")]
    assert (judge.wrong_among(text) is None) == (set(each) == {None})
    for line, wrong in zip(text.split(b"\n"), each, strict=True):
        if wrong is None and line.strip():
            json.loads(line)


@pytest.mark.spec("PROXY-041")
def test_json_must_fit_the_schema(schema: str) -> None:
    book = play(Json, src2dst=schema) << mode(DST2SRC, "splice")
    book >> data(SRC2DST, b'{"op": "get"}\n\n{"op":') << passes(b'{"op": "get"}\n\n')
    book >> data(SRC2DST, b' "put", "n": 3}\n') << passes(b'{"op": "put", "n": 3}\n')
    for bad in (
        b'{"op": "del"}',
        b'{"op": "get", "x": 1}',
        b"{}",
        b"3",
        b'{"op": "get", "n": 1.5}',
    ):
        play(Json, src2dst=schema) >> data(SRC2DST, bad + b"\n") << aborts("does not fit")
    book >> data(SRC2DST, b'{"op": "get"}') << nothing()
    book >> eof(SRC2DST) << passes(b'{"op": "get"}') << ends(SRC2DST)


@pytest.mark.spec("PROXY-041")
def test_json_of_a_whole_stream(schema: str) -> None:
    book = play(Json, dst2src="any", framing="whole", max_message=100)
    book >> data(DST2SRC, b"[1,\n2,") << nothing()
    book >> data(DST2SRC, b"3]\n") >> eof(DST2SRC) << passes(b"[1,\n2,3]\n") << ends(DST2SRC)
    play(Json, dst2src="any", framing="whole") >> data(DST2SRC, b"1 2") >> eof(DST2SRC) << aborts()
    play(Json, dst2src="any", max_message=9) >> data(DST2SRC, b"[" * 10) << aborts("longer than 9")


@pytest.mark.spec("PROXY-041")
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper"),
        (b"[" * 500_000, "nested deeper"),
        (b'["\\"", ' + b"[" * 65 + b"]" * 65 + b"]", "nested deeper"),
        (b"9" * 65, "number"),
        (b"[1e99999]", "number"),
        (b"[1." + b"1" * 100 + b"]", "number"),
        (b'"\xff"', "no valid JSON"),
        (b'"\xed\xa0\x80"', "no valid JSON"),
        (b"{'a': 1}", "no valid JSON"),
        (b"NaN", "no valid JSON"),
        (b"[1,]", "no valid JSON"),
        (b"\xef\xbb\xbf{}", "no valid JSON"),
    ],
)
def test_json_bombs_and_nonsense(bad: bytes, reason: str) -> None:
    begun = time.process_time()
    book = play(Json, src2dst="any", max_message="4M")
    book >> data(SRC2DST, bad + b"\n") << aborts(reason, "filter") << nothing()
    assert time.process_time() - begun < 10


@pytest.mark.spec("PROXY-041")
def test_json_that_only_looks_like_a_bomb() -> None:
    for good in (
        json.dumps("[" * 1000).encode(), json.dumps(["\\" * 5 + '"[' * 100] * 3).encode(),
        b"[" * 64 + b"]" * 64, json.dumps([[]] * 1000).encode(), json.dumps("9" * 500).encode(),
        json.dumps({"e": "1e99999"}).encode(), b"[1e300, -0.5, 123456789012345678]",
    ):  # fmt: skip
        play(Json, src2dst="any") >> data(SRC2DST, good + b"\n") << passes(good + b"\n")


@hypothesis.given(
    st.recursive(
        st.none() | st.text() | st.floats(allow_nan=False) | st.integers(-(2**63), 2**63),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=60,
    )
)
def test_depth_is_what_it_is(value: Any) -> None:
    def depth(value: Any) -> int:
        if isinstance(value, dict):
            return 1 + max(map(depth, value.values()), default=0)
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        for limit in (depth(value), depth(value) - 1):
            if limit >= 0:
                assert too_deep(text, limit) is (depth(value) > limit)
        assert not has_long_number(text)


def test_a_schema_that_cannot_be_used(tmp_path: Path) -> None:
    for name, text, part in (
        ("a", '{"type": 5}', "no valid schema"),
        ("b", "{", "no valid JSON"),
        ("c", '{"$ref": "http://127.0.0.1:9/x.json"}', "no valid schema"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(FieldError, match=part):
            play(Json, src2dst=str(tmp_path / name))
    with pytest.raises(FieldError, match="No such file"):
        play(Json, src2dst=str(tmp_path / "none"))


# --- count ----------------------------------------------------------------------------------------


def attempt(directory: Path, wall: float = 1e9, call: Call | None = None, **options: Any) -> bool:
    """Tell whether a call is let through."""
    options = {"limit": 2, "interval": "180s", "state": str(directory), **options}
    book = play(Count, call=call, **options)
    book.wall = wall
    book.open()
    failure = book.take_failure()
    if failure is None:
        book << begins()
        book >> closed()
    return failure is None


@pytest.mark.spec("PROXY-033")
def test_count_lets_so_many_begin_in_a_sliding_interval(tmp_path: Path) -> None:
    assert [attempt(tmp_path, 1e9 + at) for at in (0, 100, 179, 181, 182, 279, 281)] == [
        True, True, False, True, False, False, True]  # fmt: skip


@pytest.mark.spec("PROXY-033")
def test_count_with_the_clock_set_back_gains_nothing(tmp_path: Path) -> None:
    assert attempt(tmp_path, 1e9) and attempt(tmp_path, 1e9)
    assert not attempt(tmp_path, 1e9 - 5000)
    assert not attempt(tmp_path, 1e9 + 100)
    assert attempt(tmp_path, 1e9 + 181)


@pytest.mark.spec("PROXY-033")
def test_count_per_chain_per_source_per_call(tmp_path: Path) -> None:
    def call(source: str, service: str) -> Call:
        return Call(source, "vault", service, chain="c")

    assert attempt(tmp_path / "a", call=call("one", "x"), limit=1)
    assert not attempt(tmp_path / "a", call=call("two", "y"), limit=1)
    for source, service, passes_ in (("one", "x", True), ("one", "y", False), ("two", "x", True)):
        assert attempt(tmp_path / "b", call=call(source, service), limit=1, per="source") is passes_
    for source, service, passes_ in (("one", "x", True), ("one", "y", True), ("one", "x", False)):
        assert passes_ is attempt(
            tmp_path / "c", call=call(source, service), limit=1, per="source+service+target"
        )


@pytest.mark.spec("PROXY-033")
@pytest.mark.parametrize("damage", [b"", b"junk", b"\xff\xfe", b"sluice-count 1 180.0\n1.0\n"])
def test_count_refuses_where_the_state_is_unreadable(tmp_path: Path, damage: bytes) -> None:
    assert attempt(tmp_path)
    (kept,) = (p for p in (tmp_path / "count").iterdir() if len(p.name) == 64)
    kept.write_bytes(damage)
    assert not attempt(tmp_path)
    kept.unlink()
    kept.mkdir()
    assert not attempt(tmp_path)


@pytest.mark.spec("PROXY-033")
def test_count_refuses_where_others_can_write_the_state(tmp_path: Path) -> None:
    assert attempt(tmp_path)
    (tmp_path / "count").chmod(0o777)
    assert not attempt(tmp_path)


@pytest.mark.spec("PROXY-033")
def test_count_refuses_the_10001st_key_until_old_ones_are_out_of_their_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "count"
    where.mkdir(mode=0o700)
    for number in range(10_000):
        (where / f"{number:064x}").write_bytes(counting.encode(100.0, [1e9]))
    scans: list[float] = []
    real = counting._forget_old

    def forget(where: str, now: float) -> None:
        scans.append(now)
        real(where, now)

    monkeypatch.setattr(counting, "_forget_old", forget)
    # Looking through them all is dear: a source that is refused again and again cannot have it done
    # each time.
    assert [attempt(tmp_path, 1e9 + 50 + at / 10) for at in range(5)] == [False] * 5
    assert scans == [1e9 + 50]
    monkeypatch.setattr(counting, "_scanned", {})
    assert attempt(tmp_path, 1e9 + 101)
    assert len(list(where.iterdir())) < 10


@pytest.mark.spec("PROXY-033")
def test_count_waits_for_who_holds_the_state_and_then_refuses(tmp_path: Path) -> None:
    where = state.directory(str(tmp_path), "count")
    lock = state.try_lock(f"{where}/lock")
    assert lock is not None
    books = [play(Count, limit=1, interval="1h", state=str(tmp_path)).open() for _ in range(2)]
    assert [book.chain.state for book in books] == ["opening", "opening"]
    books[0].advance(1)
    assert books[0].chain.state == "opening"
    os.close(lock)
    books[0].advance(0.1)
    books[0] << begins()
    books[1].advance(0.1)
    books[1] << aborts("1 calls in 1h, 1 are allowed")

    lock = state.try_lock(f"{where}/lock")
    assert lock is not None
    late = play(Count, limit=9, interval="1h", state=str(tmp_path)).open()
    late.advance(6)
    late << aborts("locked by another process")
    os.close(lock)


WORKER = """
import os, sys
sys.path.insert(0, {src!r})
from sluice.proxy import state
kill_at = int(sys.argv[2])
step = 0
def traced(name, real):
    def wrapper(*args, **options):
        global step
        step += 1
        if step == kill_at:
            os.kill(os.getpid(), 9)
        return real(*args, **options)
    return wrapper
for name in ("open", "write", "fdatasync", "replace", "close", "read", "lstat", "listdir"):
    setattr(os, name, traced(name, getattr(os, name)))
from sluice.proxy.playbook import play
from sluice.proxy.filters.count import Count
book = play(Count, limit=3, interval="1h", state=sys.argv[1]).open()
print("yes" if book.chain.state == "open" else "no", flush=True)
os._exit(0)
"""


def worker(directory: Path, kill_at: int = 0) -> subprocess.Popen[str]:
    code = WORKER.format(src=str(ROOT / "src"))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(directory), str(kill_at)],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.spec("PROXY-033")
def test_count_across_processes_lets_exactly_the_limit_through(tmp_path: Path) -> None:
    workers = [worker(tmp_path) for _ in range(6)]
    answers = [process.communicate(timeout=60)[0].strip() for process in workers]
    # One that found the lock taken has not begun; it would try again.
    assert answers.count("yes") <= 3
    while answers.count("yes") < 3:
        answers.append(worker(tmp_path).communicate(timeout=60)[0].strip())
        assert len(answers) < 20
    assert worker(tmp_path).communicate(timeout=60)[0].strip() == "no"


@pytest.mark.spec("PROXY-033")
def test_count_killed_at_each_step_neither_hangs_nor_forgets(tmp_path: Path) -> None:
    """After a kill the next call is decided at once, and no call that began is forgotten."""
    killed = 0
    for step in range(1, 40):
        directory = tmp_path / str(step)
        assert attempt(directory, limit=3, interval="1h", wall=time.time())
        process = worker(directory, step)
        answer = process.communicate(timeout=60)[0].strip()
        killed += process.returncode == -9
        begun = 1 + (answer == "yes")
        let = [attempt(directory, limit=3, interval="1h", wall=time.time()) for _ in range(3)]
        assert let.count(True) in (3 - begun, 2 - begun)
        assert let[-1] is False
        if process.returncode == 0:
            break
    assert killed >= 6


# --- concurrent -----------------------------------------------------------------------------------


@pytest.mark.spec("PROXY-034")
def test_concurrent_without_a_queue(tmp_path: Path) -> None:
    books = [play(Concurrent, limit=2, state=str(tmp_path)) for _ in range(3)]
    books[0] << begins()
    books[1] << begins()
    books[2] << aborts("2 calls are under way already", "filter")
    books[0] >> closed()
    play(Concurrent, limit=2, state=str(tmp_path)) << begins()


@pytest.mark.spec("PROXY-034")
def test_concurrent_with_a_queue(tmp_path: Path) -> None:
    def one() -> Playbook:
        return play(Concurrent, limit=1, queue=1, wait="5s", state=str(tmp_path))

    first, second, third = one() << begins(), one() << waits(), one() << aborts("under way")
    second >> after(3) << waits()
    first >> closed()
    second >> after(0.2) << begins()
    fourth = one() << waits()
    fourth >> after(5.2) << aborts("no place became free")
    third >> closed()
    fourth >> closed()
    one() << waits()


@pytest.mark.spec("PROXY-034")
def test_concurrent_counts_per_source_and_a_dead_process_leaves_its_place(tmp_path: Path) -> None:
    def one(source: str) -> Playbook:
        call = Call(source, "vault", "x", chain="c")
        return play(Concurrent, call=call, limit=1, per="source", state=str(tmp_path))

    kept = [one("a") << begins(), one("b") << begins()]
    one("a") << aborts()
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
        "import os\n"
        "from sluice.proxy.link import Call\n"
        "from sluice.proxy.playbook import play\n"
        "from sluice.proxy.filters.concurrent import Concurrent\n"
        "book = play(Concurrent, call=Call('c', 'vault', 'x', chain='c'), limit=1, per='source',"
        f" state={str(tmp_path)!r}).open()\n"
        "print(book.chain.state, flush=True)\nsys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"open\n"
    one("c") << aborts("under way")
    process.kill()
    process.wait()
    one("c") << begins()
    assert kept


# --- record ---------------------------------------------------------------------------------------


def frames(path: Path) -> list[tuple[int, float, bytes]]:
    with path.open("rb") as stream:
        return list(recording.read(stream)[1])


@pytest.mark.spec("PROXY-037")
def test_record_writes_both_directions_times_and_ends(tmp_path: Path) -> None:
    book = play(Record, directory=str(tmp_path), call=Call("work", "vault", "x", "a", chain="c"))
    book >> data(SRC2DST, b"ask") << passes(b"ask")
    book >> after(2) >> data(DST2SRC, b"answer") << passes(b"answer")
    book >> eof(SRC2DST) << ends(SRC2DST)
    book >> closed("done")
    (path,) = tmp_path.iterdir()
    assert frames(path) == [
        (0, 0.0, b"ask"), (1, 2.0, b"answer"), (2, 2.0, b""), (4, 2.0, b"done")]  # fmt: skip
    with path.open("rb") as stream:
        call = recording.read(stream)[0]
    assert (call["source"], call["service"], call["argument"]) == ("work", "x", "a")


@pytest.mark.spec("PROXY-064")
def test_record_names_cannot_be_steered_and_links_are_not_followed(tmp_path: Path) -> None:
    directory = tmp_path / "records"
    directory.mkdir()
    directory.chmod(0o755)
    call = Call("../../etc", "..", "../x", "/../../y", chain="c")
    for _ in range(3):
        play(Record, directory=str(directory), call=call).open() >> closed()
    names = [path.name for path in directory.iterdir()]
    assert len(set(names)) == 3
    assert all(len(name) == 28 and name.endswith(".rec") for name in names)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in directory.iterdir())
    assert sorted(os.listdir(tmp_path)) == ["records"]
    link = tmp_path / "link"
    link.symlink_to(directory)
    play(Record, directory=str(link)) << aborts("cannot record")
    book = play(Record, directory=str(directory))
    directory.chmod(0o777)
    book << aborts("can be written by others")
    directory.chmod(0o700)
    assert len(list(directory.iterdir())) == 3


@pytest.mark.spec("PROXY-064")
def test_record_aborts_at_its_bounds_and_when_the_disk_is_full(tmp_path: Path) -> None:
    book = play(Record, directory=str(tmp_path), max_bytes=1000)
    book >> data(SRC2DST, b"x" * 100) << passes(b"x" * 100)
    book >> data(SRC2DST, b"x" * 1000) << aborts("larger than is allowed") << nothing()
    book >> closed()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000
    book = play(Record, directory=str(tmp_path), quota=5000)
    book >> data(SRC2DST, b"x" * 800) << aborts("larger than is allowed")
    book = play(Record, directory=str(tmp_path)).open()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, book.filter._file._fd)
    os.close(full)
    book >> data(SRC2DST, b"x") << aborts("No space left", "filter") << nothing()
    book >> closed() << logs("the record has no end")


@pytest.mark.spec("PROXY-064")
def test_record_aborts_when_only_a_part_of_it_fits_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = play(Record, directory=str(tmp_path)).open()
    monkeypatch.setattr(os, "writev", lambda fd, pieces: os.write(fd, b"".join(pieces)[:-1]))
    book >> data(SRC2DST, b"xyz") << aborts("no space left", "filter") << nothing()


@pytest.mark.spec("PROXY-064")
def test_calls_that_are_recorded_at_once_share_the_quota(tmp_path: Path) -> None:
    quota, piece = 1 << 20, b"x" * 4096
    books = [play(Record, directory=str(tmp_path), quota=quota).open() for _ in range(8)]
    alive = list(books)
    while alive:
        for book in list(alive):
            book >> data(SRC2DST, piece)
            try:
                book << passes(piece)
            except AssertionError:
                book << aborts("larger than is allowed")
                alive.remove(book)
    assert (
        sum(path.stat().st_size for path in tmp_path.iterdir()) < quota + len(books) * quota // 32
    )


@pytest.mark.spec("PROXY-064")
def test_many_small_records_use_up_the_quota(tmp_path: Path) -> None:
    for _ in range(4):
        play(Record, directory=str(tmp_path), quota=16384).open() >> closed()
    play(Record, directory=str(tmp_path), quota=16384) << aborts("cannot record")
