"""Every row of docs/spec/policy.md section 26: the examples of the documents that people read."""

from __future__ import annotations

import dataclasses

import pytest
from tests.support.policy import brief, decide

from sluice.policy.memory import from_files
from sluice.policy.rules import Request
from sluice.policy.system_info import Domain, SystemInfo

DOM0 = Domain("dom0", klass="AdminVM")
pytestmark = pytest.mark.spec("POL-245")


def world(*names: str, **more: Domain) -> SystemInfo:
    """Return ordinary domains of these names, dom0, and others."""
    return SystemInfo([DOM0, *(Domain(name) for name in names), *more.values()])


PROXY = "qrexec-proxy +timeout+dst+qrexec-mirror    src             proxy     allow\n" + (
    "#allow all\nqrexec-mirror *                            proxy           dst       allow\n"
)


@pytest.mark.parametrize(
    ("source", "target", "call", "expected"),
    [
        ("src", "proxy", "qrexec-proxy+timeout+dst+qrexec-mirror", "allow proxy"),
        ("src", "proxy", "qrexec-proxy+timeout+dst", "deny NO-MATCH"),
        ("src", "dst", "qrexec-proxy+timeout+dst+qrexec-mirror", "deny NO-MATCH"),
        ("src", "dst", "qrexec-mirror", "deny NO-MATCH"),
        ("proxy", "dst", "qrexec-mirror", "allow dst"),
        ("proxy", "dst", "qrexec-mirror+x", "allow dst"),
    ],
)
def test_proxy_readme(source: str, target: str, call: str, expected: str) -> None:
    """(a) The readme of the proxy."""
    info = world("src", "proxy", "dst")
    assert brief(decide(PROXY, source, target, call, info=info), info) == expected


NAMED = "* * anon-whonix @dispvm:anon-whonix-dvm allow"
REDIRECT = "* * anon-whonix @dispvm allow target=@dispvm:anon-whonix-dvm"
NAMED_DENY = "* * anon-whonix @dispvm:anon-whonix-dvm deny"
ANON = "@dispvm:anon-whonix-dvm"


@pytest.mark.parametrize(
    ("rules", "base", "target", "expected"),
    [
        (NAMED, "dvm", ANON, f"allow {ANON}"),
        (NAMED, "dvm", "@dispvm", "deny NO-MATCH"),
        (NAMED, "anon-whonix-dvm", "@dispvm", f"allow {ANON}"),
        (NAMED, "dvm", "", "deny NO-MATCH"),
        (REDIRECT, "dvm", "@dispvm", f"allow {ANON}"),
        (REDIRECT, "dvm", ANON, "deny NO-MATCH"),
        (f"{REDIRECT}\n{NAMED_DENY}", "dvm", "@dispvm", f"allow {ANON}"),
        (f"{REDIRECT}\n{NAMED_DENY}", "anon-whonix-dvm", "@dispvm", f"allow {ANON}"),
        (f"{NAMED_DENY}\n{REDIRECT}", "dvm", "@dispvm", f"allow {ANON}"),
        (f"{NAMED_DENY}\n{REDIRECT}", "anon-whonix-dvm", "@dispvm", "deny POLICY-DENY"),
        ("* * anon-whonix @dispvm allow", "dvm", "@dispvm", "allow @dispvm:dvm"),
    ],
)
def test_disposables(rules: str, base: str, target: str, expected: str) -> None:
    """(b) Disposables, by name, by default and by redirect."""
    info = SystemInfo(
        [
            DOM0,
            Domain("anon-whonix", default_dispvm=base),
            Domain("dvm", template_for_dispvms=True),
            Domain("anon-whonix-dvm", template_for_dispvms=True),
        ]
    )
    found = decide(rules, "anon-whonix", target, info=info)
    assert brief(found, info) == expected
    assert found.requested_target == (target or "@default")


MAIL = """\
* * work-mail work-archive allow
* * work-mail @tag:work ask default_target=work-files
* * work-mail @default ask default_target=work-files
"""
MAIL_WORLD = SystemInfo(
    [
        DOM0,
        Domain("work-mail", default_dispvm="dvm"),
        Domain("work-archive"),
        Domain("work-files", tags=frozenset({"work"})),
        Domain("work-web", tags=frozenset({"work"})),
        Domain("personal"),
        Domain("dvm", template_for_dispvms=True),
    ]
)
OFFERED = "ask {work-archive,work-files,work-web} default=work-files"


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("work-mail", "work-archive", "allow work-archive"),
        ("work-mail", "work-web", OFFERED),
        ("work-mail", "work-files", OFFERED),
        ("work-mail", "", OFFERED),
        ("work-mail", "gone", OFFERED),
        ("work-mail", "personal", "deny NO-MATCH"),
        ("work-mail", "dom0", "deny NO-MATCH"),
        ("work-mail", "@dispvm", "deny NO-MATCH"),
        ("personal", "work-files", "deny NO-MATCH"),
    ],
)
def test_policy_m(source: str, target: str, expected: str) -> None:
    """(b) Policy M."""
    assert brief(decide(MAIL, source, target, info=MAIL_WORLD), MAIL_WORLD) == expected


def test_policy_m_without_tags() -> None:
    """(b) Policy M where work-files lacks the tag, and where the caller has it."""
    files = dataclasses.replace(MAIL_WORLD.domains["work-files"], tags=frozenset())
    info = SystemInfo([*MAIL_WORLD, files])
    found = decide(MAIL, "work-mail", "work-web", info=info)
    assert brief(found, info) == "ask {work-archive,work-web}"
    assert "work-files" in found.warnings[0]
    caller = dataclasses.replace(MAIL_WORLD.domains["work-mail"], tags=frozenset({"work"}))
    info = SystemInfo([*MAIL_WORLD, caller])
    assert brief(decide(MAIL, "work-mail", "work-web", info=info), info) == OFFERED


DEVICE = ["Device +device1 * * allow", "Device +device2 * * deny", "Device * * * ask"]
DEVICE_WORLD = world("usb-vm", "work", dvm=Domain("dvm", template_for_dispvms=True))
EVERYTHING = "ask {@dispvm:dvm,dom0,dvm,usb-vm}"


@pytest.mark.parametrize(
    ("call", "target", "expected"),
    [
        ("Device+device1", "usb-vm", "allow usb-vm"),
        ("Device+device1", "dom0", "allow dom0"),
        ("Device+device1", "", "deny NO-TARGET"),
        ("Device+device2", "usb-vm", "deny POLICY-DENY"),
        ("Device+device3", "usb-vm", EVERYTHING),
        ("Device", "usb-vm", EVERYTHING),
    ],
)
def test_policy_d(call: str, target: str, expected: str) -> None:
    """(b) Policy D."""
    found = decide("\n".join(DEVICE), "work", target, call, info=DEVICE_WORLD)
    assert brief(found, DEVICE_WORLD) == expected
    if expected == "deny POLICY-DENY":
        assert found.place == ("policy", 2)
    turned = decide("\n".join(DEVICE[::-1]), "work", "usb-vm", call, info=DEVICE_WORLD)
    # As every rule of the call counts for what is offered, denied ones still are not.
    assert turned.place == ("policy", 1)
    assert brief(turned, DEVICE_WORLD).startswith("ask")


FILES = """\
test.File +testfile1 source_vm1 target_vm allow
test.File +testfile2 source_vm2 target_vm allow
test.File *           *           *           deny
"""


@pytest.mark.parametrize(
    ("source", "target", "argument", "expected"),
    [
        ("source_vm1", "target_vm", "+testfile1", "allow target_vm"),
        ("source_vm2", "target_vm", "+testfile1", 3),
        ("source_vm2", "target_vm", "+testfile2", "allow target_vm"),
        ("source_vm1", "target_vm", "+other", 3),
        ("source_vm1", "target_vm", "", 3),
        ("source_vm1", "source_vm2", "+testfile1", 3),
    ],
)
def test_policy_t(source: str, target: str, argument: str, expected: str | int) -> None:
    """(b) Policy T; a number is the line that denies."""
    info = world("source_vm1", "source_vm2", "target_vm")
    found = decide(FILES, source, target, "test.File" + argument, info=info)
    if isinstance(expected, int):
        assert (brief(found, info), found.place) == ("deny POLICY-DENY", ("policy", expected))
    else:
        assert brief(found, info) == expected


def test_add_walkthrough() -> None:
    """(b) The walkthrough of test.Add."""
    info = world("someVM", "anotherVM")
    found = decide("test.Add * * * ask", "someVM", "anotherVM", "test.Add", info=info)
    assert brief(found, info) == "ask {anotherVM,dom0}"


@pytest.mark.parametrize(
    ("text", "source", "target", "expected"),
    [
        ("anyvm anyvm ask", "a", "b", "deny NO-MATCH"),
        ("$anyvm $anyvm ask", "a", "b", "ask {b,c}"),
        ("$anyvm $anyvm ask", "a", "dom0", "deny NO-MATCH"),
        ("$anyvm $anyvm allow,user=root,target=b", "a", "c", "allow b user=root"),
        (None, "a", "b", "deny NO-MATCH"),
    ],
)
def test_oldest_readme(text: str | None, source: str, target: str, expected: str) -> None:
    """(c) The oldest readme, in the legacy directory."""
    info = world("a", "b", "c")
    legacy = {} if text is None else {"/etc/qubes-rpc/policy/test.Add": text}
    elsewhere = {"/etc/qubes_rpc/policy/test.Add": "$anyvm $anyvm allow"}
    policy = from_files(
        {"/p/35-compat.policy": "!compat-4.0", **legacy, **elsewhere},
        ("/p", "/etc/qubes-rpc/policy"),
        legacy_directory="/etc/qubes-rpc/policy",
    )
    found = policy.evaluate(Request.of("test.Add", source, target), info)
    assert brief(found, info) == expected
    assert found.requested_target == target


DATE = "qubes.GetDate * @anyvm @default allow target=sys-net"
DATE_ANY = "qubes.GetDate * @anyvm @anyvm allow target=sys-net"
COPY = "qubes.FileCopy * @tag:personal @tag:work deny"
PRICE = "my.GetBTCprice * wallet untrusted "
NEWS = world(
    "wallet",
    "untrusted",
    "sys-net",
    "work",
    me=Domain("me", tags=frozenset({"personal"})),
    office=Domain("office", tags=frozenset({"work"})),
    ready=Domain("ready", template_for_dispvms=True),
)


@pytest.mark.parametrize(
    ("rules", "source", "target", "call", "expected"),
    [
        (COPY, "me", "office", "qubes.FileCopy", "deny POLICY-DENY"),
        (DATE, "wallet", "", "qubes.GetDate", "allow sys-net"),
        (DATE_ANY, "wallet", "work", "qubes.GetDate", "allow sys-net"),
        (DATE_ANY, "wallet", "dom0", "qubes.GetDate", "deny NO-MATCH"),
        (DATE_ANY, "sys-net", "", "qubes.GetDate", "deny LOOPBACK"),
        (PRICE + "ask", "wallet", "untrusted", "my.GetBTCprice", "ask {untrusted}"),
        (PRICE + "allow", "wallet", "untrusted", "my.GetBTCprice", "allow untrusted"),
        ("x * * * allow", "wallet", "@dispvm:work", "x", "deny NOT-TEMPLATE"),
        ("x * * * allow", "wallet", "@dispvm:ready", "x", "allow @dispvm:ready"),
    ],
)
def test_news(rules: str, source: str, target: str, call: str, expected: str) -> None:
    """(d) The news."""
    assert brief(decide(rules, source, target, call, info=NEWS), NEWS) == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("$anyvm $anyvm allow", "SVC * @anyvm @anyvm allow"),
        ("work $dispvm allow", "SVC * work @dispvm allow"),
        ("work dom0 allow", "SVC * work dom0 allow"),
        ("work $adminvm allow", "SVC * work @adminvm allow"),
        ("a b allow,user=root,target=c", "SVC * a b allow target=c user=root"),
        ("a $default ask,default_target=c", "SVC * a @default ask default_target=c"),
    ],
)
@pytest.mark.spec("POL-075", "POL-076")
def test_mapping_of_old_rules(old: str, new: str) -> None:
    """8.4: what old lines mean in the current format."""
    policy = from_files({"/p/a.policy": "!compat-4.0", "/legacy/SVC": old}, ("/p",))
    assert [str(rule).replace("\t", " ") for rule in policy.rules] == [new]
