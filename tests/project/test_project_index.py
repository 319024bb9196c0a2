"""The list of pages is whole, and the manual pages know all commands."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from sluice.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    linked = {(DOCS / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)\)", index)}
    # A directory's own index leads on to its pages.
    pages = {
        page
        for page in DOCS.rglob("*.md")
        if page.parent in (DOCS, DOCS / "spec") or page.name == "index.md"
    }
    assert {str(page.relative_to(DOCS)) for page in pages - linked} == {"index.md"}


@pytest.mark.parametrize(("page", "path"), [("sluice", ()), ("sluice-proxy", ("proxy",))])
def test_the_manual_page_names_every_command(page: str, path: tuple[str, ...]) -> None:
    group: click.Command = main
    for name in path:
        assert isinstance(group, click.Group)
        found = group.get_command(click.Context(group), name)
        assert found is not None
        group = found
    assert isinstance(group, click.Group)
    text = (ROOT / f"packaging/man/{page}.1").read_text().partition(".SH EXAMPLES")[0]
    named = set()
    for line in re.findall(r"^\.TP\n\.BR? (.*)$", text, flags=re.M):
        named |= set(re.findall(r"[a-z][a-z-]+", line))
    commands = set(group.list_commands(click.Context(group)))
    assert commands
    assert commands - named == set()
