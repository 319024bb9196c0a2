"""Anything at all against the proxy's parsers and filters: a clear answer, within the bounds."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sluice.errors import ConfigError, LocalError
from sluice.proxy import recording
from sluice.proxy.chain import FAILED
from sluice.proxy.configuration import load
from sluice.proxy.filters.content import Content
from sluice.proxy.filters.count import parse as parse_count
from sluice.proxy.filters.json import Json
from sluice.proxy.filters.lines import Lines
from sluice.proxy.filters.streamline import Streamline
from sluice.proxy.filters.throttle import Throttle
from sluice.proxy.kinds import KINDS, kind_of
from sluice.proxy.metrics_file import parse as parse_metrics
from sluice.proxy.names import CallNameError, parse_call_name
from sluice.proxy.places import Places
from sluice.proxy.playbook import SRC2DST, Playbook, play
from sluice.proxy.replaying import load as load_record
from sluice.proxy.viewing import record_line, recording_lines
from sluice.wire.names import SAFE

WORDS = st.sampled_from(
    ["[proxy]", "[chains.x]", "[chains]", "filters", "=", "[", "]", "{", "}", ",", "'pass'", "use",
     "'timeout'", "src2dst", "'5s'", "-1", "1e999", "\n", "\n", "#", '"""', "'''", ".", "services",
     "'any'", "max_calls", "true", "\\", '"lines"', "allow", "'(a*)*'", "\x00", "\u202e"]
)  # fmt: skip


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as name:
        yield Path(name)


@given(st.lists(WORDS, max_size=40).map(" ".join) | st.text(max_size=200) | st.binary(max_size=99))
@example("[chains.x]\nfilters=[" + "[" * 2000)
@example("a" + ".a" * 3000 + "=1")
def test_configuration(folder: Path, text: str | bytes) -> None:
    path = folder / "proxy.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        load(str(path))
    except ConfigError as error:
        assert error.file == str(path)
        assert str(error).startswith(str(path))


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    | st.sampled_from(["pass", "plugins", "config", "timeout", "byte_limit"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["plugins", "config", "x", "0", "timeout", "src2dst_timeout"]), inner
    ),
    max_leaves=15,
))  # fmt: skip
def test_the_earlier_configuration(folder: Path, value: Any) -> None:
    import json

    path = folder / "config.json"
    path.write_text(json.dumps(value))
    try:
        load(str(path))
    except ConfigError as error:
        assert str(path) in str(error)


@given(st.lists(WORDS, max_size=40).map(" ".join) | st.text(max_size=100))
def test_places_never_raise(text: str) -> None:
    Places(text).line(("chains", "x", "filters", 0, "use"))


@given(
    st.binary(max_size=100)
    | st.lists(
        st.sampled_from(["+", "pass", "vault", "@default", "-dispvm-x", "a.b", "..", "\0", "\xe9"])
    ).map("".join)
)
def test_call_names(name: str | bytes) -> None:
    try:
        call = parse_call_name(name, own_name="me")
    except CallNameError as error:
        assert all(" " <= c <= "~" for c in str(error))
        return
    given_text = name.decode() if isinstance(name, bytes) else name
    assert given_text.startswith(f"{call.chain}+") and given_text.endswith(f"+{call.descriptor}")
    assert not call.descriptor.encode().translate(None, SAFE + b"+")


# --- filters --------------------------------------------------------------------------------------

CHUNKS = st.lists(
    st.binary(max_size=300)
    | st.lists(
        st.sampled_from([b"GET ", b"a", b"\n", b"\r\n", b'{"op":', b'"x"}', b"[", b"]", b"\\", b'"',
                         b"%PDF-", b"PK\x03\x04", b"\xff", b"\xc3", b"1e9", b"9" * 70, b"RIFF"])
    ).map(b"".join),
    max_size=12,
)  # fmt: skip

FILTERS: list[tuple[type[Any], dict[str, Any]]] = [
    (Lines, {"src2dst": {"allow": ["GET [^ ]+", "a*"]}, "max_line": 100}),
    (Lines, {"src2dst": {"deny": ["x"], "replace": {"a+": "b"}}, "on_mismatch": "drop",
             "max_line": 50}),
    (Lines, {"src2dst": {"allow": ["(?s).*"]}, "max_line": 60}),
    (Json, {"src2dst": "any", "max_depth": 3, "max_message": 200}),
    (Json, {"src2dst": "any", "framing": "whole", "max_message": 300}),
    (Content, {"allow": ["pdf", "text"], "preview": 16}),
    (Content, {"deny": ["archive"], "preview": 64, "max_size": 500}),
    (Throttle, {"src2dst": 50, "burst": 20}),
    (Streamline, {"buf_size": 30, "delay_write": 1}),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(FILTERS)))
@given(chunks=CHUNKS, ends=st.booleans())
def test_filters_pass_drop_or_abort_within_their_bound(
    place: int, chunks: list[bytes], ends: bool
) -> None:
    """Whatever is sent, in whatever pieces: no exception, no more held than declared."""
    cls, options = FILTERS[place]
    book = play(cls, **options).open()
    out = drive(book, chunks, ends)
    failure = book.chain.failure
    assert failure is None or failure.kind == "filter", failure
    assert book.memory.peak <= book.chain.stages[0].limit
    if cls not in (Throttle, Streamline):
        # How the bytes were cut into chunks makes no difference to what passes of them.
        again = play(cls, **options).open()
        whole = drive(again, [b"".join(chunks)], ends)
        assert (again.chain.failure is None) == (failure is None)
        if failure is None:
            assert whole == out
    elif failure is None and ends:
        assert out == b"".join(chunks)


def drive(book: Playbook, chunks: list[bytes], ends: bool) -> bytes:
    out = b""
    for chunk in filter(None, chunks):
        while book.chain.paused[SRC2DST] and book.chain.timers.next_due() is not None:
            book.advance(1)
            out += book.take(SRC2DST)
        book.send(SRC2DST, chunk)
        out += book.take(SRC2DST)
    if ends and book.chain.state != FAILED:
        book.end(SRC2DST)
        book.advance(1e6)
        book._collect()
    return out + book.take(SRC2DST)


@given(st.binary(max_size=400))
def test_kinds_of_anything(data: bytes) -> None:
    assert kind_of(data) in KINDS


# --- files ----------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.integers(0, 3))
def test_records_of_calls(folder: Path, data: bytes, form: int) -> None:
    head = recording.MAGIC + b'{"service":"s","target":"t"}\n'
    frame = recording.FRAME.pack(form, 1.5, len(data))
    path = folder / "x.rec"
    path.write_bytes((b"", recording.MAGIC, head, head + frame)[form] + data)
    try:
        with path.open("rb") as stream:
            for line in recording_lines(stream):
                assert all(" " <= c <= "~" for c in line)
    except recording.RecordingError:
        pass
    with contextlib.suppress(LocalError):
        load_record(str(path))


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda t: t.encode("utf-8", "ignore")))
def test_state_of_filters(data: bytes) -> None:
    parse_metrics(b"sluice-metrics 1\n" + data + b"end\n")
    with contextlib.suppress(ValueError):
        parse_count(b"sluice-count 1 5.0\n" + data + b"end\n")


@given(st.text(max_size=200))
def test_lines_of_the_audit_file(text: str) -> None:
    assert all(" " <= c <= "~" for c in record_line(text))


@pytest.mark.soak
@settings(max_examples=20_000)
@given(chunks=CHUNKS, place=st.integers(0, len(FILTERS) - 1), ends=st.booleans())
def test_filters_for_long(chunks: list[bytes], place: int, ends: bool) -> None:
    test_filters_pass_drop_or_abort_within_their_bound.hypothesis.inner_test(  # type: ignore[attr-defined]
        place=place, chunks=chunks, ends=ends
    )
    assert os.getpid()
