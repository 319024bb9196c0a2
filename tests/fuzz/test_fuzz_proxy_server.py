"""Whatever comes to the resident proxy's sockets, or is found as configuration or plugin."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sluice.errors import ConfigError, LocalError, RemoteError
from sluice.proxy.control import ControlServer
from sluice.proxy.handover import decode_request, encode_request
from sluice.proxy.intake import split_descriptor
from sluice.proxy.legacy import as_toml, load_legacy
from sluice.proxy.names import PROXY_SERVICE, is_valid_source
from sluice.proxy.plugin_files import names_in
from sluice.proxy.session import named_call

WORDS = st.sampled_from([b"qrexec-proxy", b"+", b" ", b"work", b"pass", b"vault", b"@", b"\0", b"\xff", b"-"])  # noqa: E501  # fmt: skip
BYTES = st.one_of(st.binary(max_size=200), st.lists(WORDS, max_size=12).map(b"".join))


@given(BYTES)
@example(b"qrexec-proxy+pass+vault+mirror work")
@example(b"qrexec-proxy+pass+vault+mirror+a+b work name dom0")
def test_a_descriptor_is_a_call_or_an_error(untrusted: bytes) -> None:
    try:
        name, source = split_descriptor(untrusted)
        call = named_call(name, source, "raw")
    except LocalError as error:
        assert str(error).isascii() and str(error).isprintable()
        return
    assert untrusted.startswith(PROXY_SERVICE.encode() + b"+")
    assert is_valid_source(call.source) and "+" not in call.service


@given(BYTES)
def test_a_launchers_message_is_taken_apart_or_refused(untrusted: bytes) -> None:
    try:
        source, name = decode_request(untrusted)
    except RemoteError:
        return
    assert encode_request(source, name)[:7] == untrusted[:7]


@given(st.text(max_size=20), st.text(max_size=60))
def test_what_a_launcher_sends_arrives(source: str, name: str) -> None:
    source, name = source.replace("\0", ""), name.replace("\0", "")
    try:
        encoded = encode_request(source, name)
    except UnicodeEncodeError:
        return
    assert decode_request(encoded) == (source, name)


@given(st.binary(max_size=100))
def test_the_control_socket_answers_anything(line: bytes) -> None:
    server = ControlServer(None, {"status": dict})  # type: ignore[arg-type]
    answer = server.answer(line)
    assert set(answer) in ({"ok", "result"}, {"ok", "error"})
    json.dumps(answer)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="s-", dir="/tmp") as directory:
        yield Path(directory)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
PLUGINS = st.lists(
    st.sampled_from(["pass", "byte_limit", "timeout", "sniff", "default", "nothing", "../x", ""]),
    max_size=4,
)
OPTIONS = st.dictionaries(
    st.sampled_from(["0", "1", "byte_limit", "timeout", "src_plugin", "x"]),
    st.one_of(
        VALUES, st.fixed_dictionaries({}, optional={"src2dst_limit": VALUES, "decode": VALUES})
    ),
    max_size=3,
)
CONFIGS = st.dictionaries(
    st.text(max_size=8),
    st.one_of(VALUES, st.fixed_dictionaries({}, optional={"plugins": PLUGINS, "config": OPTIONS})),
    max_size=3,
)


@given(raw=st.one_of(CONFIGS.map(json.dumps).map(str.encode), st.binary(max_size=60)))
def test_a_config_json_loads_or_says_why_not(scratch: Path, raw: bytes) -> None:
    file = scratch / "config.json"
    file.write_bytes(raw)
    try:
        configuration = load_legacy(str(file))
    except ConfigError as error:
        assert error.file == str(file)
        return
    import tomllib

    assert len(tomllib.loads(as_toml(configuration)).get("chains", {})) == len(configuration.chains)


@given(source=st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode)))
def test_any_file_may_lie_among_the_plugins(scratch: Path, source: bytes) -> None:
    file = scratch / "plugin.py"
    file.write_bytes(source)
    try:
        names = names_in(str(file))
    except ConfigError as error:
        assert error.file == str(file)
    else:
        assert all(isinstance(name, str) for name in names)
