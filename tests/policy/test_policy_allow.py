"""``allow`` and its answer: docs/spec/policy.md sections 11.2, 13, 14."""

from __future__ import annotations

import dataclasses

import pytest
from tests.support.policy import FIXTURE, brief, decide, expand, spec_param

from sluice.policy.evaluation import Allow, Deny
from sluice.policy.response import DENIED, Direction, direct, encode
from sluice.policy.system_info import Domain, SystemInfo


def answer(rules: str, source: str, target: str, **more: object) -> str:
    """Return the text of the answer."""
    resolution = decide(rules, source, target, **more)  # type: ignore[arg-type]
    assert not hasattr(resolution, "candidates")
    return encode(resolution, FIXTURE)  # type: ignore[arg-type]


@pytest.mark.spec("POL-118", "POL-121")
def test_answer_for_a_domain() -> None:
    """Six lines in this order, without a final newline."""
    text = answer("t.S * work vault allow user=u", "work", "vault")
    assert text == expand(
        "user=u\nresult=allow\ntarget=vault\ntarget_uuid=U(vault)\nautostart=True\n"
        "requested_target=vault"
    )


@pytest.mark.spec("POL-119", "POL-127")
@pytest.mark.parametrize("target", ["dom0", "@adminvm", "U(dom0)"])
def test_answer_for_dom0(target: str) -> None:
    """No UUID, and one spelling, whatever the caller wrote."""
    text = answer("t.S * work @adminvm allow", "work", target)
    expected = "user=DEFAULT\nresult=allow\ntarget=dom0\nautostart=True\nrequested_target="
    assert text == expected + expand(target)
    assert "target=dom0\n" in answer("t.S * work vault allow target=@adminvm", "work", "vault")


@pytest.mark.spec("POL-120")
def test_answer_for_a_disposable() -> None:
    """Name and UUID of the base."""
    text = answer("t.S * work @dispvm:dvm-web allow", "work", "@dispvm:dvm-web")
    lines = text.splitlines()
    assert lines[2:4] == [
        "target=@dispvm:dvm-web",
        expand("target_uuid=@dispvm:U(dvm-web)"),
    ]


@pytest.mark.spec("POL-122")
def test_redirect_keeps_the_requested_target() -> None:
    """``target=`` changes what is called, not what was asked for."""
    lines = answer("t.S * work vault allow target=mail", "work", "vault").splitlines()
    assert "target=mail" in lines
    assert "requested_target=vault" in lines


CASES = [
    spec_param("123", "t.S * work vault allow target=mail\nt.S * work mail deny", "work", "vault",
               "allow mail"),
    spec_param("123", "t.S * work mail deny\nt.S * work vault allow target=mail", "work", "vault",
               "allow mail"),
    spec_param("124", "t.S * work vault allow target=ghost", "work", "vault", "deny NO-TARGET"),
    spec_param("125", "t.S * work vault allow target=@dispvm", "work", "vault",
               "allow @dispvm:dvm-web"),
    spec_param("125", "t.S * sys-usb vault allow target=@dispvm", "sys-usb", "vault",
               "deny NO-DVM"),
    spec_param("125", "t.S * ghost vault allow target=@dispvm", "ghost", "vault", "deny NO-DVM"),
    spec_param("126", "t.S * work vault allow target=@dispvm:vault", "work", "vault",
               "deny NOT-TEMPLATE"),
    spec_param("126", "t.S * work vault allow target=@dispvm:ghost", "work", "vault",
               "deny NOT-TEMPLATE"),
    spec_param("128", "t.S * work * allow", "work", "", "deny NO-TARGET"),
    spec_param("128", "t.S * work @anyvm allow", "work", "@default", "deny NO-TARGET"),
    spec_param("129", "t.S * work vault allow autostart=no", "work", "vault",
               "deny AUTOSTART silent"),
    spec_param("129", "t.S * work vault allow autostart=no notify=yes", "work", "vault",
               "deny AUTOSTART"),
    spec_param("130", "t.S * work sys-usb allow autostart=no", "work", "sys-usb",
               "allow sys-usb no-autostart"),
    spec_param("131", "t.S * work dom0 allow autostart=no", "work", "dom0",
               "allow dom0 no-autostart"),
    spec_param("131", "t.S * work @dispvm allow autostart=no", "work", "@dispvm",
               "deny AUTOSTART silent"),
    spec_param("131", "t.S * work @anyvm allow autostart=no", "work", "@dispvm:dvm-web",
               "deny AUTOSTART silent"),
    spec_param("133", "t.S * work work allow", "work", "work", "deny LOOPBACK"),
    spec_param("133", "t.S * work vault allow target=work", "work", "vault", "deny LOOPBACK"),
    spec_param("134", "t.S * work vault allow user=root", "work", "vault",
               "allow vault user=root"),
    spec_param("057", "t.S * work vault allow user=", "work", "vault", "allow vault"),
    spec_param("058", "t.S * work vault allow user=a=b", "work", "vault", "allow vault user=a=b"),
    spec_param("135", "t.S * odd @dispvm allow", "odd", "@dispvm", "allow @dispvm:vault"),
    spec_param("060", "t.S * work vault deny", "work", "vault", "deny POLICY-DENY"),
    spec_param("060", "t.S * work vault allow", "work", "vault", "allow vault"),
    spec_param("060", "t.S * work vault ask", "work", "vault", "ask {vault}"),
    spec_param("056 060", "t.S * work vault allow notify=yes", "work", "vault",
               "allow vault notify"),
    spec_param("052 056", "t.S * work vault deny notify=no", "work", "vault",
               "deny POLICY-DENY silent"),
    spec_param("061", "t.S * work mail allow", "work", "mail", "allow mail"),
    # 13: RemoteVM
    spec_param("165", "t.S * work rem2 allow", "work", "rem2", "deny NO-TRANSPORT"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "source", "target", "expected"), CASES)
def test_case(rules: str, source: str, target: str, expected: str) -> None:
    """The policy decides the call as the line of the checklist says."""
    assert brief(decide(rules, source, target)) == expected


@pytest.mark.spec("POL-132")
@pytest.mark.parametrize(
    ("state", "running"),
    [("Running", True), ("running", False), ("Transient", False), ("Paused", False), ("", False)],
)
def test_only_running_counts(state: str, running: bool) -> None:
    """Any other power state needs a start."""
    info = SystemInfo([Domain("a"), Domain("b", power_state=state)])
    found = decide("t.S * a b allow autostart=no", "a", "b", info=info)
    assert isinstance(found, Allow) == running


@pytest.mark.spec("POL-134")
def test_user_default() -> None:
    """Without ``user=`` the answer says DEFAULT."""
    assert answer("t.S * work vault allow", "work", "vault").startswith("user=DEFAULT\n")


@pytest.mark.spec("POL-161", "POL-162", "POL-164")
def test_remote_target() -> None:
    """The relay is called, with the transport service; user= has no effect but a warning."""
    allow = decide("t.S * work rem1 allow user=root", "work", "rem1", "t.S+q")
    assert isinstance(allow, Allow)
    direction = direct(allow, FIXTURE)
    assert isinstance(direction, Direction)
    assert str(direction) == expand(
        "user=DEFAULT\nresult=allow\ntarget=relay\ntarget_uuid=U(relay)\nautostart=True\n"
        "requested_target=rem1\nservice=x.Transport+rem1+t.S+q"
    )
    assert "user=root" in direction.warnings[0]
    assert not direct(
        decide("t.S * work rem1 allow", "work", "rem1"),  # type: ignore[arg-type]
        FIXTURE,
    ).warnings
    empty = answer("t.S * work rem1 allow", "work", "rem1")
    assert empty.endswith("\nservice=x.Transport+rem1+t.S+")


@pytest.mark.spec("POL-163")
def test_remote_by_redirect() -> None:
    """The transport service is told the requested target, not the redirect (Q-11)."""
    text = answer("t.S * work @default allow target=rem1", "work", "")
    assert text.endswith("service=x.Transport+@default+t.S+")


@pytest.mark.spec("POL-165")
@pytest.mark.parametrize(
    ("relay", "transport", "cause"),
    [
        (None, "x.T", "NO-RELAY"),
        ("ghost", "x.T", "NO-RELAY"),
        ("relay", None, "NO-TRANSPORT"),
    ],
)
def test_incomplete_remote(relay: str | None, transport: str | None, cause: str) -> None:
    """A RemoteVM without a relay, with an unknown one, or without a transport is refused."""
    remote = Domain("far", klass="RemoteVM", relayvm=relay, transport_rpc=transport)
    info = SystemInfo([*FIXTURE, remote])
    allow = decide("t.S * work far allow", "work", "far", info=info)
    assert isinstance(allow, Allow)
    denied = direct(allow, info)
    assert isinstance(denied, Deny)
    assert (denied.cause, denied.notify) == (cause, True)
    assert "far" in denied.message


@pytest.mark.spec("POL-166")
@pytest.mark.parametrize(
    ("relay", "requested", "cause", "text"),
    [
        ("relay", "ghost", "RS-UNKNOWN", "unknown requested source qube 'ghost'"),
        (
            "relay",
            "vault",
            "RS-NOT-REMOTE",
            "vault: requested source is only authorized for RemoteVM",
        ),
        ("relay2", "rem1", "RS-WRONG-RELAY", "relay2 is not a relay for rem1"),
    ],
)
def test_requested_source_refused(relay: str, requested: str, cause: str, text: str) -> None:
    """Each check has its canonical text; the default notification applies."""
    found = decide("t.S * * * allow", relay, "work", requested=requested)
    assert isinstance(found, Deny)
    assert (found.cause, found.message, found.notify) == (cause, text, True)


@pytest.mark.spec("POL-166")
def test_bad_target_before_bad_source() -> None:
    """The checks of the source come after the target was normalised."""
    found = decide("t.S * * * allow", "relay", "@dispvm:ghost", requested="ghost")
    assert found.cause == "NOT-TEMPLATE"


@pytest.mark.spec("POL-167")
def test_rules_see_the_remote() -> None:
    """A presented source is what rules match, and the relay's own rules do not."""
    rules = "t.S * rem1 work allow\nt.S * relay work deny"
    assert brief(decide(rules, "relay", "work", requested="rem1")) == "allow work"
    assert brief(decide(rules, "relay", "work")) == "deny POLICY-DENY"
    rules = "t.S * rem1 @dispvm allow"
    info = SystemInfo(
        [*FIXTURE, dataclasses.replace(FIXTURE.domains["rem1"], default_dispvm="dvm-off")]
    )
    found = decide(rules, "relay", "@dispvm", requested="rem1", info=info)
    assert found.target == "@dispvm:dvm-off"


@pytest.mark.spec("POL-168")
@pytest.mark.parametrize(
    ("target", "given"),
    [("work", True), ("@dispvm:dvm-web", True), ("rem1", True), ("dom0", False)],
)
def test_policy_source_line(target: str, given: bool) -> None:
    """There for domains, disposables and RemoteVMs; not for dom0 (Q-12)."""
    text = answer("t.S * rem2 * allow", "relay2", target, requested="rem2")
    assert text.endswith("\npolicy_source=rem2") == given
    assert "policy_source" not in answer("t.S * work * allow", "work", "vault")


@pytest.mark.spec("POL-169")
def test_empty_requested_source() -> None:
    """Empty is the same as none."""
    rules = "t.S * relay work allow"
    assert answer(rules, "relay", "work", requested="") == answer(rules, "relay", "work")


@pytest.mark.spec("POL-170")
def test_remote_to_remote() -> None:
    """Both lines, service first."""
    text = answer("t.S * rem2 rem1 allow", "relay2", "rem1", requested="rem2", call="t.S+z")
    assert text.splitlines()[-2:] == ["service=x.Transport+rem1+t.S+z", "policy_source=rem2"]


def test_unknown_default_base_is_denied() -> None:
    """A base that vanished: the answer cannot be built, so the call is refused (Q-6)."""
    info = SystemInfo([Domain("a", default_dispvm="gone"), Domain("b")])
    allow = decide("t.S * a @dispvm allow", "a", "@dispvm", info=info)
    assert isinstance(allow, Allow)
    assert encode(allow, info) == DENIED
    assert brief(decide("t.S * a @dispvm:@tag:x allow", "a", "@dispvm", info=info)) == (
        "deny NO-MATCH"
    )


def test_uuid_of_dom0_is_its_own() -> None:
    """No entry can pass for dom0 by claiming its UUID."""
    nil = "00000000-0000-0000-0000-000000000000"
    info = SystemInfo([Domain("evil", uuid=nil), Domain("dom0", klass="AdminVM")])
    assert info.get(f"uuid:{nil}") is info.get("dom0")
    found = decide("t.S * dom0 dom0 allow", "evil", "evil", info=info)
    assert brief(found, info) == "deny NO-MATCH"
