"""`edgetune eval`: how well a bundle, with or without an adapter, gives the answers of a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from edgetune.cli.command import Command, json_option, quiet_option
from edgetune.cli.inputs import PATH, adapter_at, bundle_folder, row_sources
from edgetune.cli.output import console, notices, print_json
from edgetune.cli.run_options import content_as_text_option, raw_prompts_option, threads_option, truncate_option
from edgetune.config import EvaluateConfig

EXAMPLES = """
edgetune eval bundle --data valid.jsonl
edgetune eval bundle --data valid.jsonl --adapter adapter
edgetune eval bundle --data valid.jsonl --adapter adapter --json
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("bundle", type=PATH)
@click.option("--data", type=PATH, required=True, help="JSONL rows to measure on.")
@click.option("--adapter", type=PATH, help="Adapter to measure; without it the base alone.")
@truncate_option
@raw_prompts_option
@content_as_text_option
@threads_option
@quiet_option
@json_option
def command(
    bundle: Path,
    data: Path,
    adapter: Path | None,
    truncate: bool,
    raw_prompts: bool,
    content_as_text: bool,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure loss and perplexity of the answers in a file.

    Only what training would train on counts: the assistant's answers, the completion, or the whole text. With an
    adapter that was trained with --raw-prompts or --content-as-text, rows are encoded so.
    """
    row_sources({"--data": data})
    if adapter is not None:
        adapter_at(adapter)
    bundle_folder(bundle)
    from edgetune.evaluation import evaluate

    config = EvaluateConfig(
        truncate=truncate, raw_prompts=raw_prompts, content_as_text=content_as_text, threads=threads
    )
    evaluation = evaluate(bundle, data, config, adapter=adapter, say=notices(quiet=quiet))
    if as_json:
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
