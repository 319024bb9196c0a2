"""``python -m sluice``: the same as the command ``sluice``."""

from sluice.cli.main import main

main(prog_name="sluice")
