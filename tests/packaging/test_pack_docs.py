"""What docs/on-qubes.md and docs/install.md tell people to type does what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.packaging import ROOT, BareDebian

from sluice.policy.evaluation import Allow, Deny
from sluice.policy.memory import parse_text
from sluice.policy.rules import Request
from sluice.policy.system_info import Domain, SystemInfo

PAGE = (ROOT / "docs/on-qubes.md").read_text()
INSTALL = (ROOT / "docs/install.md").read_text()

# All qubes are one root here: a call to the proxy runs its program as the agent would, one to
# another qube runs the service that was installed. dom0's rules are judged by the test itself.
CLIENT = """#!/bin/sh
[ "$1" = "--" ] && shift
name=${2%%+*} argument=
case $2 in *+*) argument=${2#*+};; esac
[ "$name" = qrexec-proxy ] && export QREXEC_REMOTE_DOMAIN=work
for directory in /usr/local/etc/qubes-rpc /etc/qubes-rpc; do
    [ -x "$directory/$name" ] && exec "$directory/$name" $argument
done
exit 127
"""


def commands(heading: str, page: str = PAGE) -> list[tuple[str, str]]:
    """Return (where, command) of the blocks below a heading."""
    text = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert text, heading
    found = []
    for block in re.findall(r"^```\n(.*?)^```", text, flags=re.M | re.S):
        found += re.findall(r"^([\w-]*)\$ +(.*)$", block, flags=re.M)
    return found


@pytest.fixture(scope="module")
def debian(package: Path) -> Iterator[BareDebian]:
    made = BareDebian()
    made.script("usr/bin/sudo", '#!/bin/sh\nexec "$@"\n')
    made.script("usr/bin/qrexec-client-vm", CLIENT)
    incoming = made.root / "root/QubesIncoming/build"
    incoming.mkdir(parents=True)
    shutil.copy(package, incoming)
    (made.root / "root/letter.txt").write_text("a letter\n")
    yield made
    made.remove()


def test_ten_commands_lead_to_a_copy_and_others_back(debian: BareDebian) -> None:
    before = debian.contents()
    ten = commands("Ten commands")
    assert len(ten) == 10
    for where, command in ten:
        if where not in ("dom0", "build"):
            done = debian.run("bash", "-c", command)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
    (letter,) = (debian.root / "root/inbox").iterdir()
    assert letter.read_text() == "a letter\n"
    assert letter.stat().st_mode & 0o777 == 0o600

    for where, command in commands("When it does not work"):
        if where == "sys-proxy" and "journalctl" not in command:
            done = debian.run("bash", "-c", command)
            if command == "sluice proxy log":
                assert b"work" in done.stdout and b"inbox.Put" in done.stdout
            else:
                assert done.stdout == b"0\n"
    for _, command in commands("Many calls"):
        if not command.startswith("sudo systemctl"):
            debian.check("bash", "-c", command)
    assert debian.resident("/usr/local/etc/qubes-rpc/qrexec-proxy") == "0"
    assert "one way" in [letter.read_text() for letter in (debian.root / "root/inbox").iterdir()]
    debian.check("rm", "/usr/local/etc/qubes-rpc/qrexec-proxy")

    for _, command in commands("Changing chains"):
        assert debian.run("bash", "-c", command).stdout == b"1048576\n"

    for where, command in commands("Back out again"):
        if where != "dom0":
            debian.check("bash", "-c", command)
    left = {name for name in debian.contents() - before if not name.startswith("root/")}
    assert {name for name in left if not name.startswith(("rw", "usr/local"))} == set()
    # The rest goes with the qubes: configuration, state, and the directories made for them.
    assert not list((debian.root / "usr/local/etc/qubes-rpc").iterdir())


def test_the_rules_for_dom0_allow_that_copy_and_nothing_else() -> None:
    (command,) = [c for where, c in commands("Ten commands") if "policy.d" in c]
    rules = subprocess.run(
        ["sh", "-c", command.partition("|")[0]], capture_output=True, text=True, check=True
    ).stdout
    assert rules.count("\n") == 2
    policy = parse_text(rules)
    info = SystemInfo([Domain(name) for name in ("work", "vault", "sys-proxy", "other")])

    def ask(service: str, argument: str, source: str, target: str) -> object:
        return policy.evaluate(Request(service, argument, source, target), info)

    chain = "+one-way+vault+inbox.Put"
    assert isinstance(ask("qrexec-proxy", chain, "work", "sys-proxy"), Allow)
    assert isinstance(ask("inbox.Put", "+", "sys-proxy", "vault"), Allow)
    for request in (
        ("inbox.Put", "+", "work", "vault"),
        ("qrexec-proxy", chain, "other", "sys-proxy"),
        ("qrexec-proxy", "+one-way+vault+qubes.VMShell", "work", "sys-proxy"),
        ("qubes.VMShell", "+", "sys-proxy", "vault"),
    ):
        assert isinstance(ask(*request), Deny), request


def test_an_unpacked_single_file_serves_as_the_service(single: Path, tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    shutil.copy(single, tmp_path / "dist")
    (tmp_path / "rpc").mkdir()
    unpacking = [c for _, c in commands("The single file", INSTALL) if "/qrexec-proxy " in c + " "]
    assert any("zipfile" in c for c in unpacking) and any("printf" in c for c in unpacking)
    for command in unpacking:
        if "zipfile" in command or "compileall" in command or "printf" in command:
            here = command.replace("sudo ", "").replace("/usr/lib/sluice", f"{tmp_path}/lib")
            here = here.replace("/etc/qubes-rpc", f"{tmp_path}/rpc").replace(
                "python3 -m", "/usr/bin/python3 -m"
            )
            subprocess.run(["sh", "-c", here], check=True, cwd=tmp_path)
    client = tmp_path / "client"
    client.write_text("#!/bin/sh\nexec cat\n")
    client.chmod(0o755)
    (tmp_path / "proxy.toml").write_text(
        f'[proxy]\nclient = "{client}"\naudit = "none"\nstate = "{tmp_path}/state"\n'
        '[chains.pass]\nservices = "any"\ntargets = "any"\nfilters = ["pass"]\n'
    )
    done = subprocess.run(
        [str(tmp_path / "rpc/qrexec-proxy"), "pass+vault+mirror"],
        input=b"hello", capture_output=True, check=False, cwd=tmp_path,
        env={"QREXEC_REMOTE_DOMAIN": "work", "SLUICE_PROXY_CONFIG": f"{tmp_path}/proxy.toml",
             "PATH": "/usr/bin:/bin", "XDG_STATE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"hello")
