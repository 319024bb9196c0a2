"""The documentation is true: its pictures are those of their texts, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_draw() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "pictures" / "draw.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_drawn_from_their_texts() -> None:
    draw = load_draw().draw
    sources = sorted((ROOT / "docs" / "pictures").glob("*.txt"))
    assert sources
    for source in sources:
        assert source.with_suffix(".svg").read_text() == draw(source.read_text())


def test_a_line_that_is_not_understood_is_named() -> None:
    with pytest.raises(ValueError, match="line 2"):
        load_draw().draw("title x\nnonsense here\n")


def test_links_of_the_documentation_lead_to_files() -> None:
    broken = []
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        if "spec" in page.parts:
            continue
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken
