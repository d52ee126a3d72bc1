"""`edgetune report`: a page that shows how adapters were trained, side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, input_file
from edgetune.cli.options import options_of
from edgetune.cli.output import print_json
from edgetune.config import ResultConfig
from edgetune.text.byte_size import bytes_text
from edgetune.text.printable import printable

EXAMPLES = """
edgetune report adapter --output report.html
edgetune report adapters/a adapters/b --output both.html
edgetune report adapter --output report.html --answers answers.jsonl
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("adapters", nargs=-1, required=True, type=PATH)
@click.option("--output", type=PATH, required=True, help="HTML file to write; an earlier report there is replaced.")
@click.option("--answers", type=PATH, help="JSONL rows of prompt, before and after, to show as well.")
@options_of(ResultConfig, "printing")
def command(adapters: tuple[Path, ...], output: Path, answers: Path | None, printing: ResultConfig) -> None:
    """Show how ADAPTERS were trained, in one HTML file: curves over each other, and settings with what differs.

    Of a run that was interrupted its saved state is shown: give the adapter that it was to write. The file fetches
    nothing and runs no script.
    """
    if answers is not None:
        input_file(answers, "--answers", "JSONL rows of prompt, before and after")
    from edgetune.reporting import write_report

    written = write_report(adapters, output, answers=answers)
    if printing.json:
        print_json(asdict(written))
        return
    runs = f"{written.runs} runs" if written.runs > 1 else "a run"
    click.echo(printable(f"{written.path}: {runs}, {bytes_text(written.bytes)}"))
