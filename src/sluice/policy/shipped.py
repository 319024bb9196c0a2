"""The default policies that come with the system (sections 24 and 31), as files to install."""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).with_name("defaults") / "policy.d"
CASES = DIRECTORY.with_name("default.calls")
"""The table of calls that the shipped policies are tested with."""

COMPAT = "35-compat.policy"


def shipped_files(*, compat: bool = False) -> dict[str, bytes]:
    """Return relative path and content of every shipped file.

    ``compat``: with the file that reads the legacy directory. It is left out by default, for where
    that directory does not exist the file makes every call denied (section 3.3).
    """
    return {
        str(path.relative_to(DIRECTORY)): path.read_bytes()
        for path in sorted(DIRECTORY.rglob("*"))
        if path.is_file() and (compat or path.name != COMPAT)
    }
