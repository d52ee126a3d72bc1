"""`python -m edgetune`."""

from edgetune.cli import main

main(prog_name="edgetune")
