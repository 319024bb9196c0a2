"""The house of docs/DESIGN.md: imports go downward only, and modules stay readable."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "sluice"

# From the top of the house to its ground. A room may import itself and what stands after it.
ROOMS = [
    "cli",
    "console",
    "remote",
    "proxy",
    "adminvm",
    "domains",
    "agent",
    "service",
    "policy",
    "flow",
    "vchan",
    "wire",
    "runtime",
    "errors",
]
# The library for people who write services and callers stands on the agent's room.
BESIDE = {"api": "agent"}


def modules() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def room_of(parts: tuple[str, ...]) -> str | None:
    """Return the room of ``sluice.<room>...``; None for the package itself."""
    if len(parts) < 2 or parts[0] != "sluice":
        return None
    name = BESIDE.get(parts[1], parts[1])
    return name if name in ROOMS else None


def imported(tree: ast.AST) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for node in walk(tree):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            base = tuple(node.module.split("."))
            found.add(base)
            if base == ("sluice",):
                found |= {(*base, alias.name) for alias in node.names}
    return found


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree but for what is there for the type checker only: it is never executed."""
    queue = [tree]
    while queue:
        node = queue.pop()
        yield node
        for child in ast.iter_child_nodes(node):
            test = getattr(child, "test", None)
            typing_only = isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"
            queue += child.orelse if isinstance(child, ast.If) and typing_only else [child]


def violations(source: str, parts: tuple[str, ...]) -> list[str]:
    """List the imports of one module that go upward. ``parts`` is its dotted name."""
    own = room_of(parts)
    if own is None:
        return []
    bad = []
    for name in imported(ast.parse(source)):
        other = room_of(name)
        if other is not None and ROOMS.index(other) < ROOMS.index(own):
            bad.append(f"{'.'.join(parts)} imports {'.'.join(name)}")
    return sorted(bad)


def test_the_check_sees_an_upward_import() -> None:
    assert violations("from sluice.proxy import flow", ("sluice", "wire", "names"))
    assert not violations("from sluice.wire import names", ("sluice", "proxy", "flow"))
    typed = "if TYPE_CHECKING:\n    from sluice.flow import reactor\nelse:\n    import sluice.cli"
    assert violations(typed, ("sluice", "wire", "x")) == ["sluice.wire.x imports sluice.cli"]


def test_imports_go_downward_only() -> None:
    bad: list[str] = []
    for path in modules():
        parts = path.relative_to(SRC.parent).with_suffix("").parts
        bad += violations(path.read_text(), parts)
    assert not bad, "\n".join(bad)


def test_every_room_is_known() -> None:
    rooms = {p.name for p in SRC.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert rooms <= set(ROOMS), rooms - set(ROOMS)


@pytest.mark.parametrize("room", ["wire", "policy"])
def test_pure_rooms_do_no_io(room: str) -> None:
    """Sans-I/O: these rooms import nothing that opens, connects or waits (files.py may)."""
    forbidden = {"socket", "_socket", "select", "subprocess", "asyncio", "selectors", "threading"}
    for path in sorted((SRC / room).glob("*.py")):
        if path.name == "files.py":
            continue
        names = {name[0] for name in imported(ast.parse(path.read_text()))}
        assert not names & forbidden, f"{path.name}: {names & forbidden}"
