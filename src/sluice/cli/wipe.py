"""``sluice wipe``: delete what domains keep, whoever its files belong to on the host."""

from __future__ import annotations

import click

from sluice.cli.common import places, root_option, tell_errors
from sluice.cli.up import only_one
from sluice.domains.paths import Paths
from sluice.domains.store import Store
from sluice.errors import LocalError
from sluice.flow.selector import run


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
    if not paths.appvms.exists():
        raise LocalError(f"{paths.state}: no system has kept anything here")
    paths.create()
    with only_one(paths), Store(paths.store) as store:
        # A tree may be there without an identity, and the other way round.
        known = {identity.name for identity in store.identities()}
        known |= {entry.name for entry in paths.appvms.iterdir()}
        unknown = [name for name in names if name not in known]
        if unknown:
            listed = ", ".join(sorted(known)) or "none"
            raise LocalError(f"there is no domain {unknown[0]!r} (known: {listed})")
        chosen = sorted(names or known)
        if chosen and not yes:
            click.confirm(f"Delete all files of {', '.join(chosen)}?", abort=True)
        run(_wipe(paths, chosen, store))


async def _wipe(paths: Paths, names: list[str], store: Store) -> None:
    from sluice.domains.sandbox.bubblewrap import Bubblewrap
    from sluice.domains.sandbox.ids import Slots

    sandbox = Bubblewrap(paths)
    try:
        for name in names:
            if (paths.appvms / name).exists():
                await sandbox.wipe(name)
            for identity in store.identities():
                if identity.name == name:
                    Slots().release(identity.uuid)
            store.forget(name)
    finally:
        sandbox.close()
