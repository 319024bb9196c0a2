"""docs/writing-a-service.md followed in real sandboxes: services, failures, the library."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.sandbox import Machine, machine, wait_for

pytestmark = [pytest.mark.sandbox, pytest.mark.xdist_group("sandbox")]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "services"
PAGE = (ROOT / "docs" / "writing-a-service.md").read_text()
RPC = "/usr/local/etc/qubes-rpc"

SYSTEM = f"""
[domains.work]
[domains.vault]
[domains.vault.files]
"{RPC}/test.Add" = "test.Add"
"{RPC}/test.File" = "test.File"
"{RPC}/test.Greet" = "test.Greet"
"{RPC}/test.Greet+de" = "test.Greet+de"
"{RPC}/test.Garbage" = "garbage"
"{RPC}/test.Windows" = "windows"
"{RPC}/test.Told" = "told"
"{RPC}/test.OneSocket" = "one-socket"
"/usr/local/bin/ask-server" = "ask-server"
"/usr/local/etc/qubes/rpc-config/example.Ask" = "example.Ask"
"""
FILES = {
    "garbage": "\x01garbage\n",
    "told": '#!/bin/sh\necho "$QREXEC_SERVICE_FULL_NAME ${QREXEC_SERVICE_ARGUMENT-unset}"\n',
    "one-socket": (
        '#!/bin/sh\nread -r line\nkill -USR1 "$QREXEC_AGENT_PID" || exit\n'
        'echo "$line over stdin" >&0\nexec >&-\n'
    ),
    "windows": "#!/bin/sh\r\nexit\r\n",
    "ask-server": (EXAMPLES / "ask-server").read_text(),
    "example.Ask": (EXAMPLES / "rpc-config" / "example.Ask").read_text(),
    **{name: (EXAMPLES / "rpc" / name).read_text() for name in ("test.Add", "test.File")},
    **{name: (EXAMPLES / "rpc" / name).read_text() for name in ("test.Greet", "test.Greet+de")},
}


@pytest.fixture(scope="module", params=["ranges", "single"])
def inside(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with machine(request.param, SYSTEM, "* * work vault allow\n", FILES) as made:
        yield made


def run(inside: Machine, domain: str, command: str, user: str = "DEFAULT") -> tuple[int, str]:
    """Run a shell command in a domain; return its status and all that it wrote."""
    done = inside.shell(command, domain, user)
    return done.returncode, (done.stdout + done.stderr).decode()


def call(inside: Machine, service: str, before: str = ":") -> tuple[int, str]:
    """Call a service of vault from work."""
    return run(inside, "work", f"{before} | qrexec-client-vm vault {service}")


def test_the_first_services(inside: Machine) -> None:
    assert call(inside, "test.Add", "echo 1 2") == (0, "3\n")
    assert call(inside, "test.Add", "echo a b") == (2, "test.Add: two numbers, please\n")
    assert call(inside, "test.Greet+de") == (0, "guten Tag, work\n")
    assert call(inside, "test.Greet+fr") == (0, "hello, work\n")
    assert run(inside, "vault", "mkdir -p ~/shared && echo text >~/shared/notes")[0] == 0
    assert call(inside, "test.File+notes") == (0, "text\n")
    assert call(inside, "test.File+..")[0] == 2


def test_a_call_that_policy_allowed_has_a_plus(inside: Machine) -> None:
    """As the page says of arguments; dom0's own client passes on what it was given."""
    assert call(inside, "test.Told") == call(inside, "test.Told+") == (0, "test.Told+ \n")
    assert call(inside, "test.Told+a") == (0, "test.Told+a a\n")
    assert inside.shell("QUBESRPC test.Told dom0", "vault").stdout == b"test.Told unset\n"


@pytest.mark.spec("WIRE-134", "WIRE-164", "WIRE-165")
def test_what_cannot_be_started(inside: Machine) -> None:
    """With the launchers that stand before a service in a sandbox the statuses are the same."""
    owner = "DEFAULT" if inside.mode == "single" else "root"
    script = f"cp {RPC}/test.Add {RPC}/test.Mode && chmod 644 {RPC}/test.Mode"
    assert run(inside, "vault", script, owner) == (0, "")
    missing = "qrexec-client-vm: status 127: the target has no service {}\n"
    failed = "qrexec-client-vm: status 125: the target could not start {}; its log says why\n"
    assert call(inside, "test.None") == (127, missing.format("test.None"))
    assert call(inside, "test.Windows") == (127, missing.format("test.Windows"))
    for service in ("test.Garbage", "test.Mode"):
        assert call(inside, service) == (125, failed.format(service))

    def logged() -> str:
        return subprocess.run(
            [*inside.sluice("log"), "--domain", "vault"],
            env=inside.environment,
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    # What an agent says arrives in the log a moment after the answer to the caller.
    for text in (
        "begins neither with #! nor as a program",
        "its interpreter /bin/sh\\x0d is missing",
        "test.Mode is neither executable nor a socket",
    ):
        wait_for(lambda text=text: text in logged())


@pytest.mark.spec("WIRE-197")
def test_one_socket_for_both_directions(inside: Machine) -> None:
    """A service may signal the agent, although that may be root and the service not."""
    assert call(inside, "test.OneSocket", "echo word") == (0, "word over stdin\n")


def test_a_domains_user_cannot_end_it_by_a_signal(inside: Machine) -> None:
    """That the agent hears its services must not mean that it obeys them."""
    agent = inside.agent_pid("vault")
    for name in ("TERM", "INT", "HUP", "USR1", "USR2", "ALRM", "CHLD", "STOP", "KILL", "SEGV"):
        run(inside, "vault", f"kill -{name} 1")
    assert call(inside, "test.Add", "echo 1 2") == (0, "3\n")
    assert inside.agent_pid("vault") == agent


def test_a_socket_service(inside: Machine) -> None:
    """The example's server, at the place that the page names, asked in the ways it shows."""
    links = re.findall(r"^ln -s (\S+) /usr/local/etc/qubes-rpc/(\S+)$", PAGE, re.M)
    assert len(links) == 2
    owner = "DEFAULT" if inside.mode == "single" else "root"
    script = " && ".join(f"ln -s {path} {RPC}/{name}" for path, name in links)
    assert run(inside, "vault", script, owner) == (0, "")
    server = subprocess.Popen(
        inside.command("ask-server", "vault"), env=inside.environment, cwd="/"
    )
    try:
        wait = f"timeout 20 sh -c 'until test -S {links[0][0]}; do sleep 0.05; done'"
        assert run(inside, "vault", wait) == (0, "")
        assert call(inside, "example.Ask", "echo tea") == (0, "allow\n")
        assert call(inside, "example.Ask", "echo gin") == (0, "deny\n")
        assert call(inside, "example.Count") == (0, "2 for work\n")
        # From dom0, as the page has it.
        asked = inside.shell("QUBESRPC example.Ask dom0", "vault", input=b"tea\n")
        assert (asked.returncode, asked.stdout) == (0, b"allow\n")
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("user", ["DEFAULT", "root"])
def test_calling_from_python(inside: Machine, user: str) -> None:
    """The page's program runs with the interpreter of a domain."""
    if user == "root" and inside.mode == "single":
        pytest.skip("the domain has no root")
    program = re.search(r"```python\n(import asyncio, sluice\n.*?)```", PAGE, re.S)
    assert program is not None
    text = program[1].replace('"test.Log", argument="today"', '"test.Greet", argument="de"')
    assert text != program[1]
    done = inside.shell("python3 -", user=user, input=text.encode())
    assert done.stdout == b"b'3\\n'\nb'guten Tag, work\\n'\n0\n", done.stderr
