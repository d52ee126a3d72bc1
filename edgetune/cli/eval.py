"""`edgetune eval`: how well a model gives the answers of a file, token by token or answer by answer."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, adapter_at, bundle_folder, model_at, row_sources
from edgetune.cli.options import flag_of, options_of
from edgetune.cli.output import console, notices, print_json
from edgetune.cli.values import fields_of
from edgetune.config import AnswersConfig, AskingConfig, EvalCommandConfig, EvaluateConfig, ProgressConfig
from edgetune.data.folder import rows_file
from edgetune.errors import UsageError

if TYPE_CHECKING:
    from edgetune.evaluation import Evaluation
    from edgetune.evaluation.answers import AnswersEvaluation

EXAMPLES = """
edgetune eval bundle --data valid.jsonl
edgetune eval bundle --data valid.jsonl --adapter adapter
edgetune eval bundle --data valid.jsonl --adapter adapter --json
edgetune eval model --generate --data test.jsonl --metric accuracy --metric macro-f1
edgetune eval model --generate --data test.jsonl --metric bleu --compare bundle --rows-output rows.jsonl
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("model", type=PATH)
@click.option(
    "--data", type=PATH, required=True, help="JSONL rows to measure on; of a folder, test.jsonl, or else valid.jsonl."
)
@click.option("--adapter", help="Adapter to measure, without it the base; with --generate its name in MODEL.")
@options_of(EvalCommandConfig)
@options_of(ProgressConfig, "printing")
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    data: Path,
    adapter: str | None,
    config: EvalCommandConfig,
    printing: ProgressConfig,
) -> None:
    """Measure how well MODEL gives the answers in a file.

    Of a bundle, loss and perplexity: only what training would train on counts, the assistant's answers, the completion,
    or the whole text. With an adapter that was trained with --raw-prompts or --content-as-text, rows are encoded so.

    With --generate, MODEL, which `edgetune export` wrote, answers each row's prompt, and its answers are measured.
    """
    data = rows_file(data, "test", "valid", option="--data")
    _refuse_other_options(ctx, config)
    from edgetune.describe import kind_of

    row_sources({"--data": data})
    say = notices(quiet=printing.quiet)
    if config.generate:
        model_at(model)
        from edgetune.evaluation.answers import evaluate_answers

        _print_answers(evaluate_answers(model, data, config, adapter=adapter, say=say), printing)
        return
    folder = None if adapter is None else adapter_at(Path(adapter))
    if kind_of(model) == "model":
        flag = flag_of(fields_of(EvalCommandConfig)["generate"])
        raise UsageError(f"{model} is an exported model, which has no loss graph; measure its answers with {flag}")
    bundle_folder(model)
    from edgetune.evaluation import evaluate

    _print(evaluate(model, data, config, adapter=folder, say=say), printing)


def _refuse_other_options(ctx: click.Context, config: EvalCommandConfig) -> None:
    """Refuse what means nothing with, or without, `--generate`."""
    foreign = EvaluateConfig if config.generate else AnswersConfig
    names = {each.name for each in fields(foreign)} - {each.name for each in fields(AskingConfig)}
    known = fields_of(EvalCommandConfig)
    given = [
        flag_of(known[name])
        for name in known
        if name in names and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if given:
        when = "with" if config.generate else "without"
        raise click.UsageError(f"{', '.join(given)} means nothing {when} {flag_of(known['generate'])}; leave it out")


def _print(evaluation: Evaluation, printing: ProgressConfig) -> None:
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


def _print_answers(evaluation: AnswersEvaluation, printing: ProgressConfig) -> None:
    if printing.json:
        print_json(asdict(evaluation))
        return
    from rich.table import Table

    compared = bool(evaluation.differences)
    table = Table("metric", f"{evaluation.rows:,} rows", *(["other", "difference", "95 %", ""] if compared else []))
    for name, score in evaluation.scores.items():
        cells = [name, f"{score:.4f}"]
        if compared:
            found = evaluation.differences[name]
            bounds = "" if found.low is None else f"{found.low:+.4f} to {found.high:+.4f}"
            cells += [f"{found.other:.4f}", f"{found.difference:+.4f}", bounds, found.verdict]
        table.add_row(*cells)
    console().print(table)
    if evaluation.left_out:
        click.echo(f"{evaluation.left_out} rows leave the model no place for an answer and were left out")
