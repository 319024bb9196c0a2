"""The private tree of a domain: what persists, and to whom it belongs on the host.

Theory. ``private`` (``disposable`` where it is to be forgotten) is ours and holds three
directories, ``rw``, ``home`` and ``usrlocal``, each of which belongs to the domain and is shown
inside as /rw, /home and /usr/local. (/rw/home and /rw/usrlocal are links to those.) That way no
path that is opened outside, and no mount point, has a component that the domain could have replaced
by a link. It is made once; from then on only the domain writes in the three.
docs/spec/core-stack.md 2.7, 12.3.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from sluice import runtime
from sluice.domains.model import DomainConfig
from sluice.domains.sandbox.ids import RANGES, IdMap
from sluice.domains.sandbox.namespaces import Namespaces
from sluice.domains.trees import remove_tree
from sluice.errors import LocalError, ResourceError
from sluice.wire.names import escape

TREES = ("rw", "home", "usrlocal")

KEPT = "private"
# A disposable's tree has a name of its own, so that what a killed AdminVM left is known as such,
# whatever the system file says by then.
DISPOSABLE = "disposable"
EVERY_TREE = (KEPT, f"{KEPT}.new", DISPOSABLE, "process")


def tree_of(domain: DomainConfig) -> str:
    """Return under which name a domain's own tree lies."""
    return DISPOSABLE if domain.klass == "DispVM" else KEPT


async def prepare(place: Path, domain: DomainConfig, ids: IdMap, spaces: Namespaces | None) -> Path:
    """Return the private directory below ``place``, made if there is none.

    ``place`` is ours alone (mode 0700). ``spaces`` are those of the domain, where it has any.
    Raises LocalError where the trees belong to other ids than the domain has now.
    """
    place.mkdir(mode=0o700, exist_ok=True)
    private = place / tree_of(domain)
    if domain.klass == "DispVM":
        await remove(place, DISPOSABLE, spaces if ids.mode != RANGES else None)
    if not os.path.lexists(private):
        await _make(place, domain, ids, spaces)
    expected = ids.root[0] if ids.root is not None else ids.user[0]
    for name in TREES:
        owner = os.lstat(private / name).st_uid
        if owner != expected:
            raise LocalError(
                f"{private / name} belongs to user id {owner}, but the domain has {expected}: it"
                " was made when domains had other ids (see sluice doctor); start it as it was"
                f" then, or delete what it has kept with `sluice wipe {domain.name}`"
            )
    return private


async def _make(place: Path, domain: DomainConfig, ids: IdMap, spaces: Namespaces | None) -> None:
    """Make a new tree under another name and put it in place when it is whole."""
    await remove(place, f"{KEPT}.new", spaces if ids.mode != RANGES else None)
    new = place / f"{KEPT}.new"
    new.mkdir(mode=0o700)
    for name in TREES:
        (new / name).mkdir()
        (new / name).chmod(0o755)  # whatever umask the operator has
    (new / "rw/home").symlink_to("/home")
    (new / "rw/usrlocal").symlink_to("/usr/local")
    homes = [] if domain.default_user == "root" else [f"home/{domain.default_user}"]
    for name in homes:
        (new / name).mkdir(mode=0o700)
    if ids.mode == RANGES:
        assert ids.root is not None
        for name in TREES:
            os.chown(new / name, *ids.root)
        for name in homes:
            os.chown(new / name, *ids.user)
    elif spaces is not None:
        # Only a process in a namespace that has both our id and theirs may give files away.
        give = "".join(f"chown 2:2 {name} && " for name in homes) + "chown 1:1 " + " ".join(TREES)
        await spaces.run(["/bin/sh", "-c", give], str(new))
    os.rename(new, place / tree_of(domain))


async def remove(place: Path, name: str, spaces: Namespaces | None) -> None:
    """Remove one tree below ``place``, whatever is in it. Raises LocalError if some of it stays.

    ``spaces`` are needed where the files belong to subordinate ids.
    """
    if not os.path.lexists(place / name):
        return
    if spaces is not None:
        helper = [runtime.INTERPRETER, "-IS", runtime.launcher("sluice-remove-tree"), name]
        await spaces.run(helper, str(place))
        return
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        await asyncio.to_thread(remove_tree, directory, name)
    except OSError as error:
        raise LocalError(f"{place / name}: cannot be removed: {error.strerror}") from error
    finally:
        os.close(directory)


async def sweep_trees(appvms: Path, *, as_all_ids: bool) -> list[str]:
    """Remove the trees of all disposables: an AdminVM that was killed could not.

    Nothing runs yet. Returns what could not be removed, one text each.
    """
    failures = []
    for place in sorted(appvms.iterdir()):
        try:
            if as_all_ids:
                await remove_as_all_ids(place, DISPOSABLE)
            else:
                await remove(place, DISPOSABLE, None)
        except (LocalError, ResourceError, OSError) as error:
            failures.append(str(error))
    return failures


async def remove_as_all_ids(place: Path, name: str) -> None:
    """Remove one tree whose files belong to any of our subordinate ids.

    Raises LocalError where some of it stays.
    """
    if not os.path.lexists(place / name):
        return
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--user", "--map-root-user", "--map-auto", "--"),
        *(runtime.INTERPRETER, "-IS", runtime.launcher("sluice-remove-tree"), name),
        cwd=place,
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    if process.returncode != 0:
        raise LocalError(f"{place / name}: cannot be removed: {escape(said.strip())}")
