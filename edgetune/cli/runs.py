"""`edgetune runs`: the adapters below a folder, with how they were trained and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH
from edgetune.cli.options import options_of
from edgetune.cli.output import cell, console, print_json
from edgetune.config import ResultConfig, RunsConfig

if TYPE_CHECKING:
    from edgetune.reporting.listing import Entry

EXAMPLES = """
edgetune runs .
edgetune runs adapters --sort validation
edgetune runs adapters --json
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("folder", type=PATH)
@options_of(RunsConfig)
@options_of(ResultConfig, "printing")
def command(folder: Path, config: RunsConfig, printing: ResultConfig) -> None:
    """List the adapters in FOLDER and below it: what each was trained on, for how long, and to what loss.

    `edgetune report` shows some of them side by side.
    """
    from edgetune.reporting.listing import list_runs

    entries = list_runs(folder, config)
    if printing.json:
        print_json([entry.record() for entry in entries])
        return
    if not entries:
        click.echo("no adapters here", err=True)
        return
    _show(entries)


def _show(entries: list[Entry]) -> None:
    from rich.table import Table

    columns = list(entries[0].words())
    table = Table()
    for name in columns:
        table.add_column(name, overflow="fold")
    for entry in entries:
        table.add_row(*map(cell, entry.words().values()))
    console().print(table)
    for entry in entries:
        if entry.problem:
            click.echo(cell(f"{entry.path}: {entry.problem}").plain, err=True)
