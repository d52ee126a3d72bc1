"""`edgetune data`: rows of other people's files, and what rows will be to a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from edgetune.cli.command import Command, Group
from edgetune.cli.inputs import PATH, bundle_folder, row_sources
from edgetune.cli.options import options_of
from edgetune.cli.output import cell, console, notices, print_json
from edgetune.config import ConvertConfig, FormName, PreviewConfig, ProgressConfig
from edgetune.data.folder import training_files

if TYPE_CHECKING:
    from edgetune.data.check import Check, SameRows

CONVERT_EXAMPLES = """
edgetune data convert alpaca.json --output train.jsonl
edgetune data convert faq.csv --output train.jsonl --prompt-column Question --completion-column Answer
edgetune data convert tools.jsonl --output train.jsonl --bundle bundle
zcat *.jsonl.gz | edgetune data convert - --output train.jsonl --json
"""

CHECK_EXAMPLES = """
edgetune data check train.jsonl --bundle bundle
edgetune data check train.jsonl --valid valid.jsonl --bundle bundle --json
"""
_BAR = 40
"""Characters of the longest bar."""


@click.group(cls=Group, epilog=CONVERT_EXAMPLES + CHECK_EXAMPLES.lstrip())
def command() -> None:
    """Make rows of other people's files, and check rows before they are trained on."""


@command.command("convert", cls=Command, epilog=CONVERT_EXAMPLES)
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


@command.command("check", cls=Command, epilog=CHECK_EXAMPLES)
@click.argument("file", type=PATH)
@click.option("--bundle", type=PATH, required=True, help="Model that the rows are counted for.")
@click.option("--valid", type=PATH, help="Rows to measure on, which should not be among those of FILE.")
@options_of(PreviewConfig)
@options_of(ProgressConfig, "printing")
def check_file(file: Path, bundle: Path, valid: Path | None, config: PreviewConfig, printing: ProgressConfig) -> None:
    """Count what the rows of FILE, or of the folder that it is, will be to a model, before it is trained.

    Lengths in tokens, what is too long, which rows are there twice or in --valid as well, how much is trained, where
    messages spell control tokens, and which rows have the most tokens a word.
    """
    rows, measured = training_files(file, valid)
    row_sources({"FILE": rows, "--valid": measured})
    bundle_folder(bundle)
    from edgetune.data.check import check
    from edgetune.formats.manifest import RowEncoding

    encoding = RowEncoding(raw_prompts=config.raw_prompts, content_as_text=config.content_as_text)
    found = check(file, bundle, valid=valid, encoding=encoding, say=notices(quiet=printing.quiet))
    if printing.json:
        print_json({**asdict(found), "trained_share": found.trained_share})
    else:
        _show(found, measured)


def _show(found: Check, measured: Path | None) -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in _facts(found, measured).items():
        table.add_row(cell(name, "bold"), cell(value))
    console().print(table)
    most = max(each.rows for each in found.lengths)
    bars = Table("tokens", "rows", "", title="Lengths", title_justify="left", box=None)
    for each in found.lengths:
        mark = "" if each.least <= found.max_length else " too long"
        bars.add_row(f"{each.least:,} to {each.most:,}", f"{each.rows:,}", "#" * -(-_BAR * each.rows // most) + mark)
    console().print(bars)


def _facts(found: Check, measured: Path | None) -> dict[str, str]:
    messages = ", ".join(f"{count:,} of {role}" for role, count in found.messages.items())
    silent = f", {found.untrained_answers:,} answers of weight 0" if found.untrained_answers else ""
    facts = {"file": found.path, "rows": f"{found.rows:,} of {found.kind}"}
    if messages:
        facts["messages"] = messages + silent
    facts["tokens"] = f"{found.tokens:,}, {found.shortest:,} to {found.longest:,} a row"
    facts["trained"] = f"{found.trained_tokens:,} tokens, {found.trained_share:.1%}"
    over = f"{found.too_long:,} rows have more than {found.max_length:,} tokens"
    cut = f"; --truncate cuts {found.cut_tokens:,} tokens off, and {found.cut_away:,} rows then have no answer"
    facts["too long"] = over + (cut if found.too_long else "")
    facts["duplicates"] = _named(found.duplicates, found.first_duplicates)
    if measured is not None:
        facts["also in valid"] = _named(found.in_valid, found.first_in_valid)
    lines = ", ".join(f"{line}" for line in found.first_control_token_rows)
    spelt = f": lines {lines}" + (", …" if found.control_token_rows > len(found.first_control_token_rows) else "")
    facts["control tokens"] = f"in {found.control_token_rows:,} rows" + (spelt if lines else "")
    facts["tokens a word"] = ", ".join(f"{each.tokens / each.words:.1f} in line {each.line}" for each in found.wordiest)
    return facts


def _named(count: int, first: list[SameRows]) -> str:
    pairs = ", ".join(f"line {each.line} is line {each.first_line}" for each in first)
    return f"{count:,} rows" + (f": {pairs}" if pairs else "") + (", …" if count > len(first) else "")
