"""Each line of the checklists of docs/spec is named by a test; the count of those that are not
only goes down."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("unnamed_lines.json")


def listed() -> set[str]:
    """Return every checklist line of the specifications, as ``WIRE-001``."""
    found: set[str] = set()
    for path in sorted((ROOT / "docs" / "spec").glob("*.md")):
        found |= set(re.findall(r"^- ((?:WIRE|POL|CORE|PROXY)-\d{3})\b", path.read_text(), re.M))
    return found


def named() -> dict[str, list[str]]:
    """Return the lines that ``@pytest.mark.spec(...)`` names, with the files that name them."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id == "spec_param":
                # A row of a table of tests: the numbers of POL lines, see tests.support.policy.
                assert isinstance(node.args[0], ast.Constant)
                for number in str(node.args[0].value).split():
                    found.setdefault(f"POL-{number}", []).append(path.name)
                continue
            if not isinstance(node.func, ast.Attribute) or node.func.attr != "spec":
                continue
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    found.setdefault(argument.value, []).append(path.name)
    return found


def counts(lines: set[str]) -> dict[str, int]:
    result: dict[str, int] = {}
    for line in lines:
        prefix = line.split("-")[0]
        result[prefix] = result.get(prefix, 0) + 1
    return dict(sorted(result.items()))


def test_tests_name_only_lines_that_exist() -> None:
    unknown = {line: where for line, where in named().items() if line not in listed()}
    assert not unknown


def test_the_number_of_unnamed_lines_only_goes_down() -> None:
    """The record is the number that holds; whoever names more lines lowers it."""
    missing = listed() - set(named())
    record = json.loads(RECORD.read_text())
    now = counts(missing)
    assert all(now.get(key, 0) == record.get(key, 0) for key in {*now, *record}), (
        f"lines that no test names: {now}, recorded: {record}\n{sorted(missing)}"
    )
