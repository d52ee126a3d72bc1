"""`edgetune preview`: the exact token ids and labels that each row becomes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, bundle_folder, row_sources
from edgetune.cli.options import options_of
from edgetune.cli.output import notices, print_json
from edgetune.config import PreviewConfig, ResultConfig
from edgetune.data.folder import rows_file
from edgetune.text.printable import printable

if TYPE_CHECKING:
    from edgetune.preview import Preview

EXAMPLES = """
edgetune preview bundle --data train.jsonl
edgetune preview bundle --data train.jsonl | less
edgetune preview bundle --data train.jsonl --json | head -n 1
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("bundle", type=PATH)
@click.option("--data", type=PATH, required=True, help="JSONL rows to show; of a folder, train.jsonl.")
@options_of(PreviewConfig)
@options_of(ResultConfig, "printing")
def command(bundle: Path, data: Path, config: PreviewConfig, printing: ResultConfig) -> None:
    """Show what training would see of each row.

    Text that is trained on is green on a terminal and [[in double brackets]] elsewhere. With --json one object a
    row: `line`, `input_ids`, and `labels` with -100 where nothing is trained.
    """
    data = rows_file(data, "train", option="--data")
    row_sources({"--data": data})
    bundle_folder(bundle)
    from edgetune.formats.manifest import RowEncoding
    from edgetune.preview import preview

    encoding = RowEncoding(raw_prompts=config.raw_prompts, content_as_text=config.content_as_text)
    for row in preview(bundle, data, encoding=encoding, say=notices(quiet=False)):
        if printing.json:
            print_json({"line": row.line, "input_ids": row.input_ids, "labels": row.labels})
        else:
            _show(row, data)


def _show(row: Preview, data: Path) -> None:
    from edgetune.data.encode import IGNORED
    from edgetune.data.source import name_of

    trained = sum(label != IGNORED for label in row.labels[1:])
    note = ", longer than the bundle's maximum: left out, or cut with --truncate" if row.too_long else ""
    click.secho(f"{name_of(data)}:{row.line}: {len(row.input_ids)} tokens, {trained} trained{note}", bold=True)
    marked = not sys.stdout.isatty()
    for piece in row.pieces:
        text = printable(piece.text)
        if piece.trained:
            click.secho(f"[[{text}]]" if marked else text, fg="green", nl=False)
        else:
            click.echo(text, nl=False)
    click.echo("\n")
