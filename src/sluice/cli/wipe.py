"""``sluice wipe``: delete what domains keep, whoever its files belong to on the host."""

from __future__ import annotations

import asyncio
import os

import click

from sluice.cli.common import places, root_option, tell_errors
from sluice.cli.up import hold_lock
from sluice.domains.model import DomainConfig
from sluice.domains.paths import Paths
from sluice.domains.store import Store
from sluice.errors import LocalError


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All domains of the system.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@root_option
@tell_errors
def command(names: tuple[str, ...], everything: bool, yes: bool, root: str | None) -> None:
    """Delete the files of domains for good, and their identities: a later one is another domain.

    The system must be down. What system.toml says of them stays.
    """
    paths = places(root)
    if bool(names) == everything:
        raise LocalError("name the domains, or say --all")
    if not paths.store.exists():
        raise LocalError(f"{paths.state}: no system has kept anything here")
    paths.create()
    lock = hold_lock(paths)
    try:
        with Store(paths.store) as store:
            known = {identity.name: identity for identity in store.identities()}
            unknown = [name for name in names if name not in known]
            if unknown:
                raise LocalError(f"there is no domain {unknown[0]!r} (known: {', '.join(known)})")
            chosen = [known[name] for name in names or known]
            if chosen and not yes:
                text = ", ".join(identity.name for identity in chosen)
                click.confirm(f"Delete all files of {text}?", abort=True)
            domains = [DomainConfig(name=i.name, qid=i.qid, uuid=i.uuid) for i in chosen]
            asyncio.run(_wipe(paths, domains, store))
    finally:
        os.close(lock)


async def _wipe(paths: Paths, domains: list[DomainConfig], store: Store) -> None:
    from sluice.domains.sandbox.bubblewrap import Bubblewrap

    sandbox = Bubblewrap(paths)
    try:
        for domain in domains:
            if (paths.appvms / domain.name).exists():
                await sandbox.wipe(domain)
            store.forget(domain.name)
    finally:
        sandbox.close()
