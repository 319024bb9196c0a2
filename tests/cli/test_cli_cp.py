"""``sluice cp``: what the other side says while a copy goes on."""

from __future__ import annotations

import subprocess
import sys

from sluice.cli.cp import LastWords


def test_a_flood_of_stderr_is_read_while_other_things_go_on() -> None:
    code = "import sys; sys.stderr.write('x' * 5_000_000 + 'the end'); print('done')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        words = LastWords(process)
        assert process.stdout.read() == b"done\n"
        said = words.text()
    assert len(said) == 4096 and said.endswith(b"the end")
