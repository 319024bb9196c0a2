"""A system file that is no TOML: the place, the key, what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice.domains.system_file import load
from sluice.errors import ConfigError


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"[system]\nkind = bubblewrap\n",
            ":2: system.kind: no valid TOML: Invalid value"
            ' (texts stand in quotes, as in kind = "bubblewrap")',
        ),
        (
            b"[domains.a]\nautostart = True\n",
            ":2: domains.a.autostart: no valid TOML: Invalid value (write true)",
        ),
        (
            b'[domains.a]\nlabel = "red\n',
            ":2: domains.a.label: no valid TOML: Illegal character '\\n'"
            " (is a quote missing at the end of the line?)",
        ),
        (
            b"[domains.a\n",
            ":1: no valid TOML: Expected ']' at the end of a table declaration",
        ),
        (b"[domains.a]\nx = [1,\n", ":3: no valid TOML: Invalid value"),
        (b"[domains.a]\nlabel 9\n", ":2: no valid TOML: Expected '=' after a key"),
        (
            b"[domains.a]\n[domains.a]\n",
            ":2: no valid TOML: Cannot declare ('domains', 'a') twice",
        ),
        (b"[system]\n# \xff\n", ":2: is not UTF-8"),
        (b"x = " + b"[" * 20000, ": is nested too deeply"),
    ],
)
def test_what_is_no_toml(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "system.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}{said}")
