"""`edgetune doctor`: what is installed, what is missing, and how to get it."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

import click

from edgetune.cli.command import Command
from edgetune.cli.options import options_of
from edgetune.cli.output import print_json
from edgetune.config import ResultConfig

if TYPE_CHECKING:
    from edgetune.doctor import Finding

EXAMPLES = """
edgetune doctor
edgetune doctor --json
"""


@click.command(cls=Command, epilog=EXAMPLES)
@options_of(ResultConfig, "printing")
@click.pass_context
def command(ctx: click.Context, printing: ResultConfig) -> None:
    """Say what is installed, what is missing, and how to get it.

    Ends with exit code 0 when all that training, evaluation and answers need on a device is there, else with 1.
    """
    from edgetune.doctor import examine

    findings = examine()
    complete = all(finding.ok for finding in findings if finding.group == "device")
    if printing.json:
        print_json({"device_complete": complete, "findings": [asdict(finding) for finding in findings]})
    else:
        for group, members in groupby(findings, key=lambda finding: finding.group):
            click.secho(group, bold=True)
            for finding in members:
                _show(finding)
    if not complete:
        ctx.exit(1)


def _show(finding: Finding) -> None:
    mark, colour = ("✓", "green") if finding.ok else ("✗", "red")
    found = finding.found or ("not found" if finding.ok else "missing")
    wanted = f" (needs {finding.wanted})" if finding.wanted and not finding.ok else ""
    purpose = f", for {finding.needed_for}" if finding.needed_for and not finding.ok else ""
    click.echo(f"  {click.style(mark, fg=colour)} {finding.name}: {found}{wanted}{purpose}")
    if finding.fix:
        click.echo(f"      {finding.fix}")
