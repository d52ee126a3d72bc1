"""`edgetune eval`: how well a bundle, with or without an adapter, gives the answers of a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, adapter_at, bundle_folder, row_sources
from edgetune.cli.options import options_of
from edgetune.cli.output import console, notices, print_json
from edgetune.config import EvaluateConfig, ProgressConfig
from edgetune.data.folder import rows_file

EXAMPLES = """
edgetune eval bundle --data valid.jsonl
edgetune eval bundle --data valid.jsonl --adapter adapter
edgetune eval bundle --data valid.jsonl --adapter adapter --json
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("bundle", type=PATH)
@click.option(
    "--data", type=PATH, required=True, help="JSONL rows to measure on; of a folder, test.jsonl, or else valid.jsonl."
)
@click.option("--adapter", type=PATH, help="Adapter to measure; without it the base alone.")
@options_of(EvaluateConfig)
@options_of(ProgressConfig, "printing")
def command(
    bundle: Path,
    data: Path,
    adapter: Path | None,
    config: EvaluateConfig,
    printing: ProgressConfig,
) -> None:
    """Measure loss and perplexity of the answers in a file.

    Only what training would train on counts: the assistant's answers, the completion, or the whole text. With an
    adapter that was trained with --raw-prompts or --content-as-text, rows are encoded so.
    """
    data = rows_file(data, "test", "valid", option="--data")
    row_sources({"--data": data})
    if adapter is not None:
        adapter_at(adapter)
    bundle_folder(bundle)
    from edgetune.evaluation import evaluate

    evaluation = evaluate(bundle, data, config, adapter=adapter, say=notices(quiet=printing.quiet))
    if printing.json:
        print_json(asdict(evaluation))
        return
    from rich.table import Table

    table = Table("rows", "trained tokens", "loss", "perplexity", "token accuracy", "exact match")
    table.add_row(
        f"{evaluation.rows:,}",
        f"{evaluation.trained_tokens:,}",
        f"{evaluation.loss:.4f}",
        f"{evaluation.perplexity:.3f}",
        f"{evaluation.token_accuracy:.1%}",
        f"{evaluation.exact_match:.1%}",
    )
    console().print(table)
    if evaluation.left_out:
        click.echo(f"{evaluation.left_out} rows are longer than the bundle's maximum and were left out")
