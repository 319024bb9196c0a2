"""``qubes-policy-lint``: the linter under its Qubes name, with its options (policy.md 21.2)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sluice.policy.findings import Finding, Severity
from sluice.policy.lint_lines import lint_text
from sluice.policy.parser import split_lines
from sluice.policy.problems import visible
from sluice.wire.names import escape


def main(arguments: Sequence[str]) -> int:
    """Check the files named in ``arguments``; return 0 if they are clean, 1 for errors, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="qubes-policy-lint", description="Check policy files, each line on its own."
    )
    parser.add_argument("-s", "--show-line", action="store_true", help="show the line, too")
    parser.add_argument(
        "-i", "--include-service", action="store_true", help="the files are in service format"
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file; - is standard input")
    given = parser.parse_args(list(arguments))
    bad = False
    for name in given.files:
        bad |= _check(name, given.include_service, given.show_line)
    return 1 if bad else 0


def _check(name: str, service_format: bool, show_line: bool) -> bool:
    try:
        content = sys.stdin.buffer.read() if name == "-" else _read(name)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        message = "File does not exist." if missing else error.strerror
        print(visible(f"{name}:0: error: {message}"))
        return True
    lines = split_lines(content.decode("utf-8", "replace")) if show_line else []
    bad = False
    for finding in lint_text(content, name, service_format=service_format):
        if finding.severity is Severity.ERROR:
            bad = True
            print(visible(str(finding)) + _line(finding, lines))
        else:
            print(visible(str(finding)), file=sys.stderr)
    return bad


def _read(name: str) -> bytes:
    with open(name, "rb") as stream:
        return stream.read()


def _line(finding: Finding, lines: list[str]) -> str:
    if finding.line is None or not 0 < finding.line <= len(lines):
        return ""
    return f": {escape(lines[finding.line - 1].strip(), 1000)}"
