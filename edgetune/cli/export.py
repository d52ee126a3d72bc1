"""`edgetune export`: bundle and adapter become a model folder for ONNX Runtime GenAI."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from edgetune.cli.command import Command, Finite, json_option, quiet_option
from edgetune.cli.inputs import PATH, adapter_at, bundle_at, row_sources
from edgetune.cli.output import notices, print_json
from edgetune.cli.run_options import threads_option
from edgetune.config import ExportConfig, Precision
from edgetune.text.byte_size import bytes_text

DEFAULT = ExportConfig()

EXAMPLES = """
edgetune export bundle --adapter adapter --output model
edgetune export bundle --adapter adapter --output model --merge --precision int4 --valid valid.jsonl
edgetune export bundle --adapter adapter --output model --keep-adapter
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("bundle", type=PATH)
@click.option("--adapter", type=PATH, required=True, help="Adapter that was trained on this bundle, or by PEFT.")
@click.option("--output", type=PATH, required=True, help="Folder of the model.")
@click.option(
    "--merge/--keep-adapter",
    default=DEFAULT.merge,
    show_default=True,
    help="Fold the adapter into the weights, or put it beside the base as an .onnx_adapter.",
)
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default=DEFAULT.precision,
    show_default=True,
    help="Weights of a merged model.",
)
@click.option("--valid", type=PATH, help="Rows to measure the answer loss on; default: those of the adapter's run.")
@click.option(
    "--least-kept",
    type=Finite(0, 1),
    default=DEFAULT.least_kept,
    show_default=True,
    help="Share of what was learnt that a merged model must keep on these rows; 0 accepts any.",
)
@click.option(
    "--unmeasured",
    is_flag=True,
    default=DEFAULT.unmeasured,
    help="Measure nothing; a merge into int4 without rows has to be asked for so.",
)
@threads_option
@click.option("--force", is_flag=True, default=DEFAULT.force, help="Replace a model that is already there.")
@quiet_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    adapter: Path,
    output: Path,
    merge: bool,
    precision: Precision,
    valid: Path | None,
    least_kept: float,
    unmeasured: bool,
    threads: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write a model folder that ONNX Runtime GenAI runs.

    Where the bundle's run had validation rows, the answer loss of base, base + adapter and merged model is printed.
    """
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    if "precision" in given and not merge:
        raise click.UsageError("--precision is for --merge; with --keep-adapter the base stays as it is in the bundle")
    if "least_kept" in given and (unmeasured or not merge):
        raise click.UsageError("--least-kept is for a merge that is measured; leave it out")
    if unmeasured and valid is not None:
        raise click.UsageError("--unmeasured and --valid exclude each other; leave one of them out")
    row_sources({"--valid": valid})
    adapter_at(adapter)
    opened = bundle_at(bundle)
    from edgetune.exporting import export

    config = ExportConfig(
        merge=merge,
        precision=precision,
        least_kept=least_kept,
        unmeasured=unmeasured,
        threads=threads,
        force=force,
    )
    exported = export(opened, adapter, output, config, valid=valid, say=notices(quiet=quiet))
    if as_json:
        losses, kept = exported.losses, exported.kept
        print_json({"model": exported.path, "bytes": exported.bytes, "losses": losses, "kept": kept})
        return
    click.echo(f"{exported.path}: {bytes_text(exported.bytes)}")
    for name, loss in exported.losses.items():
        click.echo(f"  answer loss, {name}: {loss:.4f}")
    if exported.kept is not None:
        click.echo(f"  kept of what was learnt: {exported.kept:.1%}")
    elif "merged" in exported.losses:
        click.echo("  kept of what was learnt: nothing to keep, the adapter is no better than the base on these rows")
