"""``ask``: what is offered and what follows; docs/spec/policy.md sections 11.3, 12, 15 and 16."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from tests.support.policy import FIXTURE, brief, decide, expand, spec_param

from sluice.errors import PolicyError
from sluice.policy.confirmation import question
from sluice.policy.evaluation import Allow, Ask, Deny
from sluice.policy.memory import parse_text
from sluice.policy.pipeline import Outcome, Pipeline
from sluice.policy.problems import PolicyLoadError, PolicySyntaxError
from sluice.policy.rules import Request
from sluice.policy.system_info import Domain, SystemInfo

OTHERS = (
    "@dispvm:dvm-off,@dispvm:dvm-web,{}dvm-off,dvm-web,mail,odd,relay,relay2,rem1,rem2,"
    "sys-usb,tmpl,vault"
)
VMS = OTHERS.format("")
ALL = OTHERS.format("dom0,")
ASK = "t.S * work @default ask"

CASES = [
    spec_param("136", "t.S * work mail allow\n" + ASK, "", "ask {mail}"),
    spec_param("136", ASK + "\nt.S * work mail allow", "", "ask {mail}"),
    spec_param("136 140", ASK + "\nu.T * work mail allow\nt.S * vault odd allow", "",
               "deny NO-ASK-TARGETS"),
    spec_param("137", ASK + "\nt.S * work mail deny\nt.S * work @tag:office allow", "",
               "deny NO-ASK-TARGETS"),
    spec_param("137", ASK + "\nt.S * work @tag:office allow\nt.S * work mail deny", "",
               "ask {mail}"),
    spec_param("138", "t.S * work @default deny\nt.S * work vault ask", "vault", "ask {vault}"),
    spec_param("138", "t.S * work vault deny\nt.S * work @tag:office ask", "mail", "ask {mail}"),
    spec_param("139", ASK + "\nt.S * work mail allow target=vault", "", "ask {vault}"),
    spec_param("139", "t.S * work mail allow target=vault\n" + ASK + "\nt.S * work vault deny", "",
               "ask {vault}"),
    spec_param("140", ASK + "\nt.S +a work mail allow", "", "deny NO-ASK-TARGETS"),
    spec_param("141", "t.S * work * ask", "vault", f"ask {{{ALL}}}"),
    spec_param("141 142 145 146", "t.S * work @anyvm ask", "vault", f"ask {{{VMS}}}"),
    spec_param("142", "t.S * work @dispvm:@tag:dvm-ok ask", "@dispvm:dvm-web",
               "ask {@dispvm:dvm-web}"),
    spec_param("142", "t.S * work @dispvm:dvm-off ask", "@dispvm:dvm-off",
               "ask {@dispvm:dvm-off}"),
    spec_param("142", ASK + "\nt.S * work @dispvm:vault allow", "", "deny NO-ASK-TARGETS"),
    spec_param("143", "t.S * work @dispvm ask", "@dispvm", "ask {@dispvm:dvm-web}"),
    spec_param("144", "t.S * work @adminvm ask", "@adminvm", "ask {dom0}"),
    spec_param("144", ASK + "\nt.S * work dom0 allow", "", "ask {dom0}"),
    # dom0 and @adminvm are two elements until the end (section 12): denying one keeps the other
    spec_param("138", ASK + "\nt.S * work @adminvm deny\nt.S * work dom0 allow", "", "ask {dom0}"),
    spec_param("145", ASK + "\nt.S * work work allow\nt.S * work mail allow", "", "ask {mail}"),
    spec_param("145", ASK + "\nt.S * work U(work) allow", "", "deny NO-ASK-TARGETS"),
    spec_param("146", ASK + "\nt.S * work hid allow", "", "deny NO-ASK-TARGETS"),
    spec_param("147", ASK + "\nt.S * work U(vault) allow", "", "ask {vault}"),
    spec_param("147", ASK + "\nt.S * work ghost allow\nt.S * work uuid:x allow", "",
               "deny NO-ASK-TARGETS"),
    spec_param("147", ASK + "\nt.S * work @dispvm:ghost allow", "", "deny NO-ASK-TARGETS"),
    spec_param("147", ASK + "\nt.S * work @dispvm:U(dvm-off) allow", "", "ask {@dispvm:dvm-off}"),
    spec_param("148", ASK + "\nt.S * work @tag:dvm-ok allow", "", "ask {dvm-web}"),
    spec_param("148", "t.S * work @type:AppVM ask", "vault",
               "ask {dvm-off,dvm-web,mail,odd,relay,relay2,sys-usb,vault}"),
    spec_param("149", "t.S * work * ask autostart=no", "vault",
               "ask {dom0,relay,relay2,rem1,rem2,sys-usb} no-autostart"),
    spec_param("150", ASK + " notify=no", "", "deny NO-ASK-TARGETS"),
    spec_param("151", "t.S * work vault ask target=mail", "vault", "ask {mail}"),
    spec_param("151", "t.S * work vault ask target=@adminvm", "vault", "ask {dom0}"),
    spec_param("151", "t.S * work vault ask target=U(dom0)", "vault", "ask {dom0}"),
    spec_param("151", "t.S * work vault ask target=@dispvm", "vault", "ask {@dispvm:dvm-web}"),
    spec_param("151", "t.S * work vault ask target=U(mail)", "vault", "ask {mail}"),
    spec_param("151", "t.S * work vault ask target=ghost", "vault", "deny NO-ASK-TARGETS"),
    spec_param("151", "t.S * work vault ask target=@dispvm:ghost", "vault", "deny NO-ASK-TARGETS"),
    spec_param("152", "t.S * work vault ask default_target=vault", "vault",
               "ask {vault} default=vault"),
    spec_param("152", "t.S * work vault ask default_target=mail", "vault", "ask {vault}"),
    spec_param("153", "t.S * work @dispvm ask default_target=@dispvm", "@dispvm",
               "ask {@dispvm:dvm-web} default=@dispvm:dvm-web"),
    spec_param("153", "t.S * work dom0 ask default_target=@adminvm", "dom0",
               "ask {dom0} default=dom0"),
    spec_param("154", "t.S * work @tag:office ask", "mail", "ask {mail}"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "target", "expected"), CASES)
def test_offered(rules: str, target: str, expected: str) -> None:
    """What ``work`` is asked."""
    assert brief(decide(rules, "work", target)) == expected


@pytest.mark.spec("POL-143")
def test_no_base_no_disposable() -> None:
    """A source without a base is offered none for ``@dispvm``."""
    rules = "t.S * vault @dispvm ask\nt.S * vault mail allow"
    assert brief(decide(rules, "vault", "@dispvm")) == "ask {mail}"
    unknown_base = SystemInfo([Domain("a", default_dispvm="gone"), Domain("b")])
    rules = "t.S * a @dispvm ask\nt.S * a b allow"
    assert brief(decide(rules, "a", "@dispvm", info=unknown_base), unknown_base) == "ask {b}"


@pytest.mark.spec("POL-146")
def test_disposables_of_internal_bases() -> None:
    """A disposable of an internal base is as hidden as its base; explicit ones are not."""
    info = SystemInfo(
        [
            Domain("a", default_dispvm="secret"),
            Domain("secret", template_for_dispvms=True, internal=True),
            Domain("dom0", klass="AdminVM", internal=True),
        ]
    )
    assert brief(decide("t.S * a * ask", "a", "", info=info), info) == "deny NO-ASK-TARGETS"
    found = decide("t.S * a * ask target=@dispvm:secret", "a", "", info=info)
    assert brief(found, info) == "ask {@dispvm:secret}"


@pytest.mark.spec("POL-152")
def test_dropped_default_is_told() -> None:
    """The log learns which rule, and what was offered."""
    found = decide("t.S * work vault ask default_target=mail", "work", "vault")
    assert "policy:1" in found.warnings[0]
    assert "mail" in found.warnings[0]
    assert "vault" in found.warnings[0]


def test_unknown_source_is_denied() -> None:
    """Nothing can be offered to a source that nobody knows (Q-10)."""
    assert brief(decide("t.S * * * ask", "ghost", "vault")) == "deny NO-ASK-TARGETS"


@pytest.mark.spec("POL-155", "POL-156")
def test_answers() -> None:
    """A choice among the candidates is allowed with the options of the asking rule."""
    rules = (
        "t.S * work @default ask user=u autostart=no notify=yes\n"
        "t.S * work sys-usb allow user=other"
    )
    ask = decide(rules, "work", "")
    assert isinstance(ask, Ask)
    yes = ask.chosen("sys-usb")
    assert isinstance(yes, Allow)
    assert (yes.target, yes.user, yes.autostart, yes.notify) == ("sys-usb", "u", False, True)
    assert yes.place == ("policy", 1)
    no = ask.chosen("vault")
    assert isinstance(no, Deny)
    assert (no.cause, no.notify) == ("BAD-CHOICE", True)


class FakeAgent:
    """Answers every question alike; remembers everything."""

    def __init__(self, answer: str | Exception = "deny", *, deaf: bool = False) -> None:
        self.answer = answer
        self.deaf = deaf
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.told: list[tuple[str, dict[str, Any]]] = []

    async def ask(self, guivm: str, question: Mapping[str, Any]) -> str:
        self.asked.append((guivm, dict(question)))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def notify(self, guivm: str, notice: Mapping[str, Any]) -> None:
        self.told.append((guivm, dict(notice)))
        if self.deaf:
            raise OSError("no agent")


def settle(
    rules: str | PolicyError,
    source: str,
    target: str,
    agent: FakeAgent | None = None,
    *,
    requested: str | None = None,
    info: SystemInfo = FIXTURE,
    **flags: bool,
) -> Outcome:
    """Run a request through the whole pipeline."""
    policy = rules if isinstance(rules, PolicyError) else parse_text(expand(rules))
    request = Request.of("t.S", source, expand(target), requested)
    pipeline = Pipeline(agent or FakeAgent())
    return asyncio.run(pipeline.settle(request, policy, info, **flags))


ASK_VAULT = "t.S * work vault ask user=u"


@pytest.mark.spec("POL-156")
def test_agent_allows() -> None:
    """The chosen target is called; the agent is that of the policy source."""
    agent = FakeAgent("allow:vault")
    found = settle(ASK_VAULT, "work", "vault", agent)
    assert found.text == expand(
        "user=u\nresult=allow\ntarget=vault\ntarget_uuid=U(vault)\nautostart=True\n"
        "requested_target=vault"
    )
    assert agent.asked[0][0] == "dom0"
    assert agent.told == []


@pytest.mark.parametrize(
    ("answer", "cause", "told"),
    [
        spec_param("158", "deny", "USER-DENY", False),
        spec_param("155", "allow:mail", "BAD-CHOICE", True),
        spec_param("159", "", "BAD-ANSWER", True),
        spec_param("159", "yes", "BAD-ANSWER", True),
        spec_param("159", "allow", "BAD-ANSWER", True),
        spec_param("159", "deny\n", "BAD-ANSWER", True),
        spec_param("155 159", "allow:vault\n", "BAD-CHOICE", True),
    ],
)
def test_agent_answers_otherwise(answer: str, cause: str, told: bool) -> None:
    """Anything but an exact answer with a candidate is refused."""
    agent = FakeAgent(answer)
    found = settle(ASK_VAULT, "work", "vault", agent)
    assert (found.text, found.resolution.cause) == ("result=deny", cause)
    assert bool(agent.told) == told


@pytest.mark.spec("POL-158")
def test_user_denial_is_told_if_asked_for() -> None:
    """``notify=yes`` tells of the answer no."""
    agent = FakeAgent("deny")
    settle(ASK_VAULT + " notify=yes", "work", "vault", agent)
    assert agent.told[0][1]["resolution"] == "deny"


@pytest.mark.spec("POL-160")
def test_agent_fails() -> None:
    """No agent, no call."""
    found = settle(ASK_VAULT, "work", "vault", FakeAgent(OSError("refused")))
    assert found.text == "result=deny"


@pytest.mark.spec("POL-157")
def test_no_guivm() -> None:
    """A source without GuiVM is denied and nobody is asked or told."""
    agent = FakeAgent("allow:work")
    found = settle("t.S * rem1 work ask", "relay", "work", agent, requested="rem1")
    assert (found.text, found.resolution.cause) == ("result=deny", "USER-DENY")
    assert agent.asked == []


@pytest.mark.spec("POL-177", "POL-178")
def test_question() -> None:
    """Exactly these keys; icons of all domains and of disposables of all bases."""
    ask = decide("t.S * work @anyvm ask default_target=vault", "work", "vault", "t.S")
    assert isinstance(ask, Ask)
    asked = question(ask, FIXTURE)
    keys = {"source", "service", "argument", "targets", "default_target", "icons"}
    assert set(asked) == keys
    assert asked["argument"] == "+"
    assert asked["default_target"] == "vault"
    assert asked["icons"]["@dispvm:dvm-web"] == "dispvm-red"
    assert asked["icons"]["dom0"] == "adminvm-black"
    names = {domain.name for domain in FIXTURE}
    assert set(asked["icons"]) == names | {"@dispvm:dvm-web", "@dispvm:dvm-off"}


MODES = [
    # rules, target, assume yes, expected text of just_evaluate
    spec_param("171", "t.S * work vault allow user=u", "vault", False, "allow"),
    spec_param("171", "t.S * work vault ask", "vault", False, "deny"),
    spec_param("172", "t.S * work vault ask", "vault", True, "allow"),
    spec_param("172", "t.S * work vault ask target=mail", "vault", True, "deny"),
    spec_param("172", "t.S * work @tag:office ask", "U(mail)", True, "deny"),
    spec_param("173", ASK + "\nt.S * work mail allow", "", True, "deny"),
    spec_param("173", "t.S * work @dispvm ask", "@dispvm", True, "deny"),
    spec_param("173", "t.S * work * ask", "@adminvm", True, "deny"),
    spec_param("173", ASK + " default_target=mail\nt.S * work mail allow", "", True, "deny"),
    spec_param("176", "t.S * work work allow", "work", False, "allow"),
    spec_param("176", "t.S * work rem2 allow", "rem2", False, "allow"),
]


@pytest.mark.spec("POL-175")
@pytest.mark.parametrize(("rules", "target", "yes", "expected"), MODES)
def test_just_evaluate(rules: str, target: str, yes: bool, expected: str) -> None:
    """The bare result, nobody asked, nobody told."""
    agent = FakeAgent("allow:vault")
    flags = {"just_evaluate": True, "assume_yes_for_ask": yes}
    found = settle(rules, "work", target, agent, **flags)
    assert found.text == f"result={expected}"
    assert agent.asked == agent.told == []


@pytest.mark.spec("POL-174")
def test_assume_yes_alone() -> None:
    """The full answer, as if the request target had been chosen."""
    found = settle(ASK_VAULT, "work", "vault", assume_yes_for_ask=True)
    assert found.text.startswith("user=u\nresult=allow\ntarget=vault\n")
    assert settle(ASK, "work", "", assume_yes_for_ask=True).text == "result=deny"


NOTICES = [
    # rules, source, target, what is told
    ("t.S * work vault allow", "vault", []),
    ("t.S * work vault allow notify=yes", "vault", ["allow"]),
    ("t.S * work vault deny", "vault", ["deny"]),
    ("t.S * work vault deny notify=no", "vault", []),
    ("", "vault", ["deny"]),
    ("t.S * work * allow", "", ["deny"]),
    ("t.S * work * allow", "@dispvm:ghost", ["deny"]),
    ("t.S * work * allow", "@anyvm", []),
    ("t.S * work vault allow autostart=no", "vault", []),
    ("t.S * work vault allow autostart=no notify=yes", "vault", ["deny"]),
    ("t.S * work work allow", "work", ["deny"]),
    ("t.S * work work allow notify=yes", "work", ["allow", "deny"]),
    ("t.S * work rem2 allow notify=yes", "rem2", ["allow", "deny"]),
    (ASK, "", ["deny"]),
]


@pytest.mark.spec("POL-180")
@pytest.mark.parametrize(("rules", "target", "told"), NOTICES)
def test_who_is_told(rules: str, target: str, told: list[str]) -> None:
    """The events of section 16.3."""
    agent = FakeAgent()
    settle(rules, "work", target, agent)
    assert [notice["resolution"] for _, notice in agent.told] == told


@pytest.mark.spec("POL-179")
def test_what_is_told() -> None:
    """A denial shows what was received, an allowed call what was resolved."""
    agent = FakeAgent()
    settle("t.S * work @default allow target=@dispvm notify=yes", "work", "ghost", agent)
    settle("t.S * rem1 work deny", "relay", "work", agent, requested="rem1")
    assert agent.told[0][1] == {
        "resolution": "allow",
        "service": "t.S",
        "argument": "+",
        "source": "work",
        "target": "@dispvm:dvm-web",
    }
    assert agent.told[1][1]["source"] == "relay"
    agent = FakeAgent()
    settle("", "work", "ghost", agent)
    assert agent.told[0][1]["target"] == "ghost"


@pytest.mark.spec("POL-181")
def test_failing_notice_changes_nothing() -> None:
    """Nobody to tell is no reason to refuse."""
    found = settle("t.S * work vault allow notify=yes", "work", "vault", FakeAgent(deaf=True))
    assert found.allowed


@pytest.mark.spec("POL-182", "POL-180")
def test_broken_policy() -> None:
    """A syntax error is silent, another failure is told; both deny."""
    agent = FakeAgent()
    error = PolicySyntaxError("bad", file="f", line=1)
    assert settle(error, "work", "vault", agent).text == "result=deny"
    assert agent.told == []
    broken = PolicyLoadError("gone", file="f")
    assert settle(broken, "work", "vault", agent).text == "result=deny"
    assert len(agent.told) == 1


def test_unknown_caller_is_denied() -> None:
    """Nobody is told, and there is an answer (Q-17)."""
    agent = FakeAgent()
    assert settle("", "ghost", "vault", agent).text == "result=deny"
    assert agent.told == []
