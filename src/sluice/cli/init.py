"""``sluice init``: lay the configuration of a new system."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from sluice import runtime
from sluice.cli.common import chosen_root, places, root_option, tell_errors
from sluice.domains.paths import Paths
from sluice.errors import LocalError

SYSTEM = """\
# The domains of this system. `sluice up` starts them; `sluice doctor` says what the machine can do.
# A wrong or misspelt key is an error with its line; nothing is started then.

[system]
# What runs the domains: "bubblewrap" (sandboxes), or "process" (NO isolation, for tests).
kind = "bubblewrap"
# Whose user ids the domains have on the host: "auto" (their own, where the machine gives them), or
# "single" (all of them yours).
# ids = "auto"
# The domain from which disposables are made when a call asks for `@dispvm`.
# default_dispvm = "dvm"

[domains.work]
label = "blue"

[domains.vault]
label = "black"

[domains.untrusted]
label = "red"
tags = ["hostile"]

# All settings of a domain, with their defaults:
#
# [domains.NAME]
# class = "AppVM"              # or DispVM, StandaloneVM, TemplateVM, RemoteVM
# label = "red"                # red orange yellow green gray blue purple black
# template = "host"            # the host's /usr, read-only, with additions from template/host/ here
# tags = []                    # for policy: @tag:NAME
# default_user = "user"        # who services run as
# autostart = true             # start with the system
# memory = 400                 # MiB that it can rely on
# maxmem = 4000                # MiB that it may use at most
# vcpus = 2
# qrexec_timeout = 60          # seconds to wait for its agent
# template_for_dispvms = false # may disposables be made from it
# netvm = ""                   # no domain has a network device; see the manual
# debug = false
# [domains.NAME.features]
# "sandbox.pids-max" = "4096"
# [domains.NAME.files]         # laid inside at each start: place inside = file beside this one
# "/usr/local/etc/qubes-rpc/my.Service" = "files/my.Service"
"""

RPC_README = """\
Services of the AdminVM: `qrexec-client-vm dom0 NAME` in a domain runs rpc/NAME here, if policy
allows it. Executable files, sockets, or links to /dev/tcp/HOST/PORT. The host's own
/etc/qubes-rpc is never used.
"""

TEMPLATE_README = """\
Additions to the template `host`: etc/qubes-rpc/NAME here is /etc/qubes-rpc/NAME in every domain
made from it; etc/qubes/rpc-config, etc/profile.d and etc/skel likewise. Files below usr/local are
put in a domain's own /usr/local at its first start.
"""

POLICY_README = """\
The policy: files NN-NAME.policy, read in the order of their names; the first rule that matches a
call decides, and a call that no rule matches is refused. A changed file counts from the next call.

    SERVICE  ARGUMENT  SOURCE  TARGET  ACTION
"""

USER_POLICY = """\
# Your rules. The first that matches decides; what nothing matches is refused.
#
# test.Add   *           work      vault    allow
# test.File  +testfile1  work      vault    allow
# qubes.ConnectTCP  +8080  untrusted  @adminvm  allow
"""


# Whoever listens at a port expects no service descriptor.
TCP_SETTINGS = "skip-service-descriptor = true\n"

# Each domain may be a proxy: one that has a proxy.toml. Each may serve its TCP ports, and so may
# dom0. Both only where policy lets others call it.
LINKS = {
    "template/host/etc/qubes-rpc/qrexec-proxy": f"{runtime.INSIDE_BIN}/qrexec-proxy",
    "template/host/etc/qubes-rpc/qubes.ConnectTCP": "/dev/tcp/127.0.0.1",
    "rpc/qubes.ConnectTCP": "/dev/tcp/127.0.0.1",
}


@click.command()
@root_option
@tell_errors
def command(root: str | None) -> None:
    """Write a commented system.toml, a policy and a place for services."""
    paths = places(root)
    made = lay(paths)
    for path in made:
        click.echo(f"wrote {path}")
    where = f" --root {shlex.quote(chosen)}" if (chosen := chosen_root(root)) else ""
    click.echo(f"next: edit {paths.system_file}, then `sluice up{where}`")


def lay(paths: Paths) -> list[Path]:
    """Write what is missing of a system's configuration. Raises LocalError if there is one."""
    config = paths.config
    if paths.system_file.exists():
        raise LocalError(f"{paths.system_file}: there is a system already")
    contents = {
        "system.toml": SYSTEM,
        "policy.d/README": POLICY_README,
        "policy.d/30-user.policy": USER_POLICY,
        "rpc/README": RPC_README,
        "template/host/README": TEMPLATE_README,
        "rpc-config/qubes.ConnectTCP": TCP_SETTINGS,
        "template/host/etc/qubes/rpc-config/qubes.ConnectTCP": TCP_SETTINGS,
        **{f"policy.d/{name}": text for name, text in default_policies().items()},
    }
    for directory in (
        "policy.d/include",
        "rpc",
        "rpc-config",
        "policy.legacy",
        "template/host/etc/qubes-rpc",
        "template/host/etc/qubes/rpc-config",
    ):
        (config / directory).mkdir(mode=0o755, parents=True, exist_ok=True)
    made = []
    for name, text in contents.items():
        try:
            descriptor = os.open(config / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            continue
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        made.append(config / name)
    for name, target in LINKS.items():
        if not os.path.lexists(config / name):
            (config / name).symlink_to(target)
            made.append(config / name)
    return made


def default_policies() -> dict[str, str]:
    """Return the shipped policy files (policy.md 24 and 31): name below policy.d -> content."""
    from sluice.policy.shipped import shipped_files

    files = shipped_files(compat=True)  # with policy.legacy, which ``lay`` makes
    return {name: text.decode() for name, text in files.items() if name != "README"}
