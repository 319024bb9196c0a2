"""Messages of qrexec as bytes, against the vectors and tables of the specification."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.errors import LocalError, RemoteError
from sluice.wire import messages as m

U32 = st.integers(0, 2**32 - 1)
BODY = st.binary(max_size=300)

ANY: m.Lengths = dict.fromkeys(m.TYPE_NAMES, (0, 1 << 20))


# The vectors of section 3.4, as they stand there.
VECTORS = [
    (m.encode_hello(4), "00 03 00 00 04 00 00 00 04 00 00 00"),
    (m.encode_hello(3), "00 03 00 00 04 00 00 00 03 00 00 00"),
    (
        m.encode_exec(m.EXEC_CMDLINE, 0, 513, b"user:id\0"),
        "00 02 00 00 10 00 00 00 00 00 00 00 01 02 00 00 75 73 65 72 3a 69 64 00",
    ),
    (
        m.encode_exec(m.EXEC_CMDLINE, 42, 513),
        "00 02 00 00 08 00 00 00 2a 00 00 00 01 02 00 00",
    ),
    (
        m.encode_exec(m.SERVICE_CONNECT, 43, 514, m.pad(b"SOCKET12", 32)),
        "02 02 00 00 28 00 00 00 2b 00 00 00 02 02 00 00 53 4f 43 4b 45 54 31 32" + 24 * " 00",
    ),
    (
        m.encode_refused(b"SOCKET12"),
        "03 02 00 00 20 00 00 00 53 4f 43 4b 45 54 31 32" + 24 * " 00",
    ),
    (m.encode_terminated(43, 514), "11 02 00 00 08 00 00 00 2b 00 00 00 02 02 00 00"),
    (m.encode(m.DATA_STDIN, b"hi\n"), "90 01 00 00 03 00 00 00 68 69 0a"),
    (m.encode(m.DATA_STDOUT), "91 01 00 00 00 00 00 00"),
    (m.encode_exit_code(42), "93 01 00 00 04 00 00 00 2a 00 00 00"),
]


@pytest.mark.spec("WIRE-001", "WIRE-002", "WIRE-003")
@pytest.mark.parametrize(("encoded", "vector"), VECTORS)
def test_vectors(encoded: bytes, vector: str) -> None:
    assert encoded == bytes.fromhex(vector)


@pytest.mark.spec("WIRE-001")
@given(kind=U32, body=BODY)
def test_header(kind: int, body: bytes) -> None:
    encoded = m.encode(kind, body)
    assert encoded[:4] == kind.to_bytes(4, "little")
    assert encoded[4:8] == len(body).to_bytes(4, "little")
    assert encoded[8:] == body
    assert m.HEADER.size == 8


@pytest.mark.spec("WIRE-002")
@given(version=U32)
def test_hello_round_trip(version: int) -> None:
    encoded = m.encode_hello(version)
    assert len(encoded) == 12
    assert m.decode_hello(m.HELLO, encoded[8:]) == version


@pytest.mark.spec("WIRE-003")
@given(domain=U32, port=U32, text=BODY)
def test_exec_params(domain: int, port: int, text: bytes) -> None:
    body = m.encode_exec(m.JUST_EXEC, domain, port, text)[8:]
    assert struct.unpack("<II", body[:8]) == (domain, port)
    assert body[8:] == text
    assert m.decode_exec(body) == (domain, port, text)


@pytest.mark.parametrize("size", range(8))
def test_short_exec_params_are_refused(size: int) -> None:
    with pytest.raises(RemoteError):
        m.decode_exec(bytes(size))


TRIGGER4 = m.encode_trigger4(b"src", b"dst", b"SOCKET", b"svc+a")


@pytest.mark.spec("WIRE-004")
def test_trigger_2() -> None:
    message = m.downgrade_trigger4(TRIGGER4[8:], 2)
    assert message is not None
    assert m.HEADER.unpack_from(message) == (m.TRIGGER_SERVICE, 128)
    body = message[8:]
    assert len(body) == 128
    assert body[:64] == b"svc+a".ljust(64, b"\0")
    assert body[64:96] == b"dst".ljust(32, b"\0")
    assert body[96:128] == b"SOCKET".ljust(32, b"\0")


@pytest.mark.spec("WIRE-005")
def test_trigger_3() -> None:
    message = m.downgrade_trigger4(TRIGGER4[8:], 3)
    assert message is not None
    assert m.HEADER.unpack_from(message) == (m.TRIGGER_SERVICE3, 96 + 6)
    body = message[8:]
    assert body[:64] == b"dst".ljust(64, b"\0")
    assert body[64:96] == b"SOCKET".ljust(32, b"\0")
    assert body[96:] == b"svc+a\0"


@pytest.mark.spec("WIRE-006")
def test_trigger_4() -> None:
    assert m.HEADER.unpack_from(TRIGGER4) == (m.TRIGGER_SERVICE4, 160 + 6)
    body = TRIGGER4[8:]
    assert body[:64] == b"src".ljust(64, b"\0")
    assert body[64:128] == b"dst".ljust(64, b"\0")
    assert body[128:160] == b"SOCKET".ljust(32, b"\0")
    assert body[160:] == b"svc+a\0"
    assert m.downgrade_trigger4(body, 4) == TRIGGER4


@pytest.mark.spec("WIRE-006")
def test_domains_are_cut_and_services_are_not() -> None:
    body = m.encode_trigger4(b"s" * 70, b"d" * 64, b"I", b"x" * 64999)[8:]
    assert body[:64] == b"s" * 63 + b"\0"
    assert body[64:128] == b"d" * 63 + b"\0"
    assert len(body) == 65160
    with pytest.raises(LocalError):
        m.encode_trigger4(b"", b"", b"I", b"x" * 65000)
    with pytest.raises(LocalError):
        m.encode_trigger4(b"", b"", b"I" * 33, b"x")


@pytest.mark.parametrize(
    ("service", "target", "fits"),
    [(63, 31, True), (64, 31, False), (63, 32, False), (1, 1, True)],
)
def test_what_version_2_can_express(service: int, target: int, fits: bool) -> None:
    body = m.encode_trigger4(b"", b"t" * target, b"I", b"s" * service)[8:]
    assert (m.downgrade_trigger4(body, 2) is not None) == fits


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 255),
        (b"\1\0\0", 255),
        (b"\x2a\0\0\0", 42),
        (b"\xff\xff\xff\xff", -1),
        (b"\0\0\0\0rest", 0),
    ],
)
def test_exit_codes(body: bytes, status: int) -> None:
    assert m.decode_exit_code(body) == status


@given(status=st.integers(-(2**31), 2**31 - 1))
def test_exit_code_round_trip(status: int) -> None:
    assert m.decode_exit_code(m.encode_exit_code(status)[8:]) == status


# --- versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("received", "effective"), [(2, 2), (3, 3), (4, 4), (5, 4), (0xFFFFFFFF, 4), (-1, 4)]
)
def test_negotiation(received: int, effective: int) -> None:
    assert m.negotiate(received) == effective


@pytest.mark.parametrize("received", [0, 1])
def test_versions_too_old(received: int) -> None:
    with pytest.raises(RemoteError):
        m.negotiate(received)


def test_local_clients_need_version_3() -> None:
    assert m.negotiate(9, own=m.LOCAL_VERSION, minimum=m.LOCAL_MINIMUM) == 3
    with pytest.raises(RemoteError):
        m.negotiate(2, own=m.LOCAL_VERSION, minimum=m.LOCAL_MINIMUM)


@given(kind=U32, body=st.binary(max_size=8))
def test_anything_but_hello_is_refused(kind: int, body: bytes) -> None:
    if kind == m.HELLO and len(body) == 4:
        assert m.decode_hello(kind, body) == int.from_bytes(body, "little")
    else:
        with pytest.raises(RemoteError):
            m.decode_hello(kind, body)


# --- putting messages together --------------------------------------------------------------

MESSAGES = st.lists(st.tuples(st.sampled_from(sorted(m.TYPE_NAMES)), BODY), max_size=10)


def take_all(reader: m.MessageReader) -> list[tuple[int, bytes]]:
    """Take every whole message."""
    found = []
    while (message := reader.next()) is not None:
        found.append(message)
    return found


@pytest.mark.spec("WIRE-007")
def test_one_byte_at_a_time() -> None:
    reader = m.MessageReader(ANY)
    stream = m.encode(m.DATA_STDIN, b"payload") + m.encode(m.DATA_STDIN)
    found = []
    for at in range(len(stream)):
        reader.feed(stream[at : at + 1])
        found += take_all(reader)
        assert bool(found) == (at >= 14)
    assert found == [(m.DATA_STDIN, b"payload"), (m.DATA_STDIN, b"")]
    assert reader.pending == 0


@pytest.mark.spec("WIRE-008")
def test_several_at_once() -> None:
    reader = m.MessageReader(ANY)
    messages = [(m.DATA_STDIN, b"one"), (m.EXEC_CMDLINE, b""), (m.HELLO, b"\4\0\0\0")]
    reader.feed(b"".join(m.encode(kind, body) for kind, body in messages) + b"\1")
    assert take_all(reader) == messages
    assert reader.pending == 1


@pytest.mark.spec("WIRE-007", "WIRE-008")
@given(messages=MESSAGES, cuts=st.lists(st.integers(1, 50), min_size=1))
def test_any_fragments(messages: list[tuple[int, bytes]], cuts: list[int]) -> None:
    stream = b"".join(m.encode(kind, body) for kind, body in messages)
    reader = m.MessageReader(ANY)
    found, turn = [], 0
    while stream:
        size = cuts[turn % len(cuts)]
        turn += 1
        reader.feed(memoryview(stream)[:size])
        stream = stream[size:]
        found += take_all(reader)
    assert found == messages
    assert reader.pending == 0


@given(messages=MESSAGES)
def test_wanted_never_goes_past_a_message(messages: list[tuple[int, bytes]]) -> None:
    stream = b"".join(m.encode(kind, body) for kind, body in messages)
    reader = m.MessageReader(ANY)
    found, at = [], 0
    while at < len(stream):
        wanted = reader.wanted
        assert wanted > 0
        reader.feed(stream[at : at + wanted])
        at += wanted
        message = reader.next()
        if message is not None:
            assert reader.pending == 0
            found.append(message)
    assert at == len(stream)
    assert found == messages


@pytest.mark.parametrize(
    "header",
    [
        m.HEADER.pack(m.EXEC_CMDLINE, 8),
        m.HEADER.pack(m.EXEC_CMDLINE, m.MAX_LOCAL_BODY + 1),
        m.HEADER.pack(m.EXEC_CMDLINE, 0xFFFFFFFF),
        m.HEADER.pack(m.HELLO, 4),
        m.HEADER.pack(0, 0),
    ],
)
def test_a_header_is_refused_before_its_body_is_collected(header: bytes) -> None:
    reader = m.MessageReader(m.FROM_LOCAL_CLIENT)
    reader.feed(header)
    with pytest.raises(RemoteError):
        reader.next()


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "least", "most", "versions"),
    [
        (m.TRIGGER_SERVICE, 128, 128, {2}),
        (m.TRIGGER_SERVICE3, 97, 65096, {3, 4}),
        (m.TRIGGER_SERVICE4, 161, 65160, {4}),
        (m.CONNECTION_TERMINATED, 8, 8, {2, 3, 4}),
        (m.HELLO, 4, 4, set()),
        (m.EXEC_CMDLINE, 9, 9, set()),
        (m.SERVICE_REFUSED, 32, 32, set()),
    ],
)
def test_what_an_agent_may_send(
    version: int, kind: int, least: int, most: int, versions: set[int]
) -> None:
    def accepted(size: int) -> bool:
        reader = m.MessageReader(m.from_agent(version))
        reader.feed(m.HEADER.pack(kind, size))
        try:
            reader.next()
        except RemoteError:
            return False
        return True

    allowed = version in versions
    assert [accepted(size) for size in (least - 1, least, most, most + 1)] == [
        False,
        allowed,
        allowed,
        False,
    ]


# --- fuzz -----------------------------------------------------------------------------------------

TABLES = [
    m.HELLO_ONLY,
    m.FROM_CLIENT_VM,
    m.FROM_LOCAL_CLIENT,
    m.FROM_DAEMON,
    m.from_agent(2),
    m.from_agent(3),
    m.from_agent(4),
]


@given(
    table=st.sampled_from(TABLES),
    pieces=st.lists(
        st.binary(max_size=60)
        | st.builds(m.encode, st.sampled_from(sorted(m.TYPE_NAMES)) | U32, st.binary(max_size=170)),
        max_size=8,
    ),
)
def test_any_bytes_give_messages_or_a_remote_error(table: m.Lengths, pieces: list[bytes]) -> None:
    reader = m.MessageReader(table)
    for piece in pieces:
        reader.feed(piece)
        try:
            for kind, body in take_all(reader):
                least, most = table[kind]
                assert least <= len(body) <= most
        except RemoteError:
            return
        # Never more than one message is collected.
        assert reader.pending <= 8 + max(most for _, most in table.values())


@given(body=st.binary(max_size=200))
def test_any_body_can_be_decoded_or_refused(body: bytes) -> None:
    status = m.decode_exit_code(body)
    assert -(2**31) <= status < 2**31
    assert b"\0" not in m.c_string(body)
    try:
        domain, port, text = m.decode_exec(body)
    except RemoteError:
        assert len(body) < 8
    else:
        assert m.encode_exec(m.EXEC_CMDLINE, domain, port, text)[8:] == body


@given(body=st.binary(min_size=161, max_size=400), version=st.integers(2, 4))
def test_any_trigger_can_be_downgraded(body: bytes, version: int) -> None:
    message = m.downgrade_trigger4(body, version)
    if message is None:
        assert version == 2
        return
    kind, size = m.HEADER.unpack_from(message)
    assert size == len(message) - 8
    least, most = m.from_agent(version)[kind]
    assert least <= size <= most


@given(kind=U32)
def test_every_type_has_a_name(kind: int) -> None:
    assert m.type_name(kind).isprintable()
    assert m.type_name(m.HELLO) == "HELLO"
