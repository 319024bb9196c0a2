"""What a domain sends, validated: the examples of the specification, and anything else."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.wire import messages as m
from sluice.wire import names as n


def trigger4(
    service: bytes = b"svc\0",
    target: bytes = b"dst",
    source: bytes = b"",
    ident: bytes = b"SOCKET",
) -> bytes:
    """The body of a TRIGGER_SERVICE4 with raw fields."""
    return (
        source.ljust(64, b"\0")[:64]
        + target.ljust(64, b"\0")[:64]
        + ident.ljust(32, b"\0")[:32]
        + service
    )


@pytest.mark.parametrize(
    ("raw", "after"),
    [(b"q/S$\xff+a*:@ ", "q_S__+a____"), (b"plain.Service+arg-1", "plain.Service+arg-1")],
)
def test_services(raw: bytes, after: str) -> None:
    assert n.parse_trigger(m.TRIGGER_SERVICE4, trigger4(raw + b"\0")).service == after


@pytest.mark.parametrize(
    ("raw", "after"),
    [
        (b"$disp@vm:x y", "_disp@vm:x_y"),
        (b"a$b@c:", "a_b@c:"),
        (b"x" * 64, "x" * 63),
        (b"", ""),
        (b"a\0rubbish", "a"),
    ],
)
def test_domains(raw: bytes, after: str) -> None:
    trigger = n.parse_trigger(m.TRIGGER_SERVICE4, trigger4(target=raw, source=raw))
    assert (trigger.target, trigger.source) == (after, after)


@pytest.mark.parametrize("ident", [b"a b", b"a_-.b", b"", b"i" * 31, b"SOCKET12"])
def test_idents_accepted(ident: bytes) -> None:
    trigger = n.parse_trigger(m.TRIGGER_SERVICE4, trigger4(ident=ident))
    assert trigger.ident == ident.ljust(32, b"\0")


@pytest.mark.parametrize(
    "ident", [b"a/b", b"a\0b", b"i" * 32, b"\1\2\3", b"\xff", b"\0" * 31 + b"x"]
)
def test_idents_refused(ident: bytes) -> None:
    with pytest.raises(n.BadTrigger) as caught:
        n.parse_trigger(m.TRIGGER_SERVICE4, trigger4(ident=ident))
    assert caught.value.ident == ident.ljust(32, b"\0")


@pytest.mark.parametrize("service", [b"\0", b"+\0", b"+a\0", b"a\0b\0", b"missing"])
def test_services_refused(service: bytes) -> None:
    with pytest.raises(n.BadTrigger):
        n.parse_trigger(m.TRIGGER_SERVICE4, trigger4(service))


def test_trigger_3_has_no_source() -> None:
    trigger = n.parse_trigger(m.TRIGGER_SERVICE3, trigger4(b"svc+x\0", b"dst")[64:])
    assert (trigger.source, trigger.target, trigger.service) == (None, "dst", "svc+x")


@pytest.mark.parametrize(
    ("service", "target", "expected"),
    [
        (b"svc+a", b"dst", ("svc+a", "dst")),
        (b"s" * 64, b"t" * 32, ("s" * 63, "t" * 31)),
        (b"a\0b", b"c\0d", ("a", "c")),
        (b"a b", b"c d", ("a_b", "c_d")),
    ],
)
def test_trigger_2(service: bytes, target: bytes, expected: tuple[str, str]) -> None:
    body = service.ljust(64, b"\0") + target.ljust(32, b"\0") + b"ID".ljust(32, b"\0")
    trigger = n.parse_trigger(m.TRIGGER_SERVICE, body)
    assert (trigger.service, trigger.target) == expected
    assert trigger.source is None


@pytest.mark.parametrize("service", [b"", b"+a"])
def test_trigger_2_refused(service: bytes) -> None:
    with pytest.raises(n.BadTrigger):
        n.parse_trigger(m.TRIGGER_SERVICE, service.ljust(128, b"\0"))


def test_other_types_are_a_bug_of_ours() -> None:
    with pytest.raises(ValueError, match="0x200"):
        n.parse_trigger(m.EXEC_CMDLINE, bytes(200))


SAFE = set(string.ascii_letters + string.digits + "_-.")


@given(
    kind_and_size=st.sampled_from(
        [
            (m.TRIGGER_SERVICE, 128, 128),
            (m.TRIGGER_SERVICE3, 97, 300),
            (m.TRIGGER_SERVICE4, 161, 400),
        ]
    ),
    data=st.data(),
)
def test_any_body_is_refused_or_clean(
    kind_and_size: tuple[int, int, int], data: st.DataObject
) -> None:
    kind, least, most = kind_and_size
    body = data.draw(
        st.binary(min_size=least, max_size=most)
        | st.binary(max_size=most - 96).map(
            lambda tail: (b"a".ljust(64, b"\0") * 2 + bytes(32) + tail + b"\0").ljust(least, b"\0")[
                :most
            ]
        )
    )
    if not least <= len(body) <= most:
        return
    try:
        trigger = n.parse_trigger(kind, body)
    except n.BadTrigger as error:
        assert len(error.ident) == 32 and error.ident in body
        assert str(error).isprintable()
        return
    assert set(trigger.service) <= SAFE | {"+"} and trigger.service[0] != "+"
    assert set(trigger.target) <= SAFE | {"@", ":"} and len(trigger.target) <= 63
    assert trigger.source is None or set(trigger.source) <= SAFE | {"@", ":"}
    assert n.is_valid_ident(trigger.ident)


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("work", True),
        ("a", True),
        ("A-b_c.9", True),
        ("x" * 31, True),
        ("x" * 32, False),
        ("", False),
        ("9lives", False),
        ("-x", False),
        ("a b", False),
        ("a/b", False),
        ("ä", False),
        ("a\n", False),
        ("\udcff", False),
    ],
)
def test_domain_names(name: str, valid: bool) -> None:
    assert n.is_valid_domain_name(name) == valid


@given(untrusted=st.binary(max_size=400) | st.text(max_size=400), limit=st.integers(4, 300))
def test_what_is_shown_is_harmless(untrusted: bytes | str, limit: int) -> None:
    shown = n.escape(untrusted, limit)
    assert len(shown) <= limit
    assert all(" " <= character <= "~" for character in shown)


def test_escaping_keeps_what_is_plain() -> None:
    assert n.escape("plain text 1+2") == "plain text 1+2"
    assert n.escape(b"a\x1b[31m\n\xff") == "a\\x1b[31m\\x0a\\xff"
    assert n.escape("é\u202e") == "\\xe9\\u202e"
    assert n.escape(b"x" * 300, 10) == "xxxxxxx..."


def test_terminal_table() -> None:
    kept = bytes(byte for byte in range(256) if n.TERMINAL_TABLE[byte] == byte)
    assert kept == b"\x07\x08\x09\x0a\x0d" + bytes(range(0x20, 0x7F))
    assert set(bytes(range(256)).translate(n.TERMINAL_TABLE)) - set(kept) == set()
