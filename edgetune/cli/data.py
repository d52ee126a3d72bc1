"""`edgetune data`: rows of other people's files, and what rows will be to a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import get_args

import click

from edgetune.cli.command import Command, Group
from edgetune.cli.inputs import PATH, bundle_folder, row_sources
from edgetune.cli.options import options_of
from edgetune.cli.output import notices, print_json
from edgetune.config import ConvertConfig, FormName, ProgressConfig

EXAMPLES = """
edgetune data convert alpaca.json --output train.jsonl
edgetune data convert faq.csv --output train.jsonl --prompt-column Question --completion-column Answer
edgetune data convert tools.jsonl --output train.jsonl --bundle bundle
zcat *.jsonl.gz | edgetune data convert - --output train.jsonl --json
"""


@click.group(cls=Group, epilog=EXAMPLES)
def command() -> None:
    """Make rows of other people's files, and check rows before they are trained on."""


@command.command("convert", cls=Command, epilog=EXAMPLES)
@click.argument("file", type=PATH)
@click.option("--output", type=PATH, required=True, help="JSONL file to write.")
@click.option(
    "--from", "form", type=click.Choice(get_args(FormName)), help="What the file holds; without it, its rows say so."
)
@click.option("--bundle", type=PATH, help="Model for which tools and tool calls are written.")
@options_of(ConvertConfig)
@options_of(ProgressConfig, "printing")
def convert_file(
    file: Path,
    output: Path,
    form: FormName | None,
    bundle: Path | None,
    config: ConvertConfig,
    printing: ProgressConfig,
) -> None:
    """Make rows of FILE: JSONL, JSON, CSV or Parquet, packed with gzip or not.

    It may hold conversations (messages of OpenAI, Azure or TRL, ShareGPT), Alpaca rows, prompts and completions
    under any names, or texts. What it is, its first record says. All bad records are named, and then nothing is
    written.
    """
    row_sources({"FILE": file})
    if bundle is not None:
        bundle_folder(bundle)
    from edgetune.data.convert import convert

    done = convert(file, output, config, form=form, bundle=bundle, say=notices(quiet=printing.quiet))
    if printing.json:
        print_json(asdict(done))
        return
    left = f", {done.bad_rows:,} records left out" if done.bad_rows else ""
    click.echo(f"{done.path}: {done.rows:,} rows{left}")
