"""The filters that judge what is sent, each as a script of events and answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from sluice.proxy.filters.content import Content
from sluice.proxy.filters.json import Json
from sluice.proxy.filters.lines import Lines
from sluice.proxy.json_rules import Judge, has_long_number, too_deep
from sluice.proxy.kinds import kind_of
from sluice.proxy.line_rules import LineRules
from sluice.proxy.playbook import (
    DST2SRC,
    SRC2DST,
    aborts,
    data,
    ends,
    eof,
    mode,
    nothing,
    passes,
    play,
)
from sluice.proxy.schema import FieldError

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
