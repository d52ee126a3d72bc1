"""`edgetune export`: bundle and adapter become a model folder for ONNX Runtime GenAI."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, adapter_at, bundle_at, row_sources
from edgetune.cli.options import options_of
from edgetune.cli.output import notices, print_json
from edgetune.config import ExportConfig, ProgressConfig
from edgetune.text.byte_size import bytes_text

EXAMPLES = """
edgetune export bundle --adapter adapter --output model
edgetune export bundle --adapter adapter --output model --merge --precision int4 --valid valid.jsonl
edgetune export bundle --adapter adapter --output model --keep-adapter
edgetune export bundle --adapter kitchen --adapter garden=runs/a7 --output model --keep-adapter
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("bundle", type=PATH)
@click.option(
    "--adapter",
    multiple=True,
    required=True,
    help="Adapter that was trained on this bundle, or by PEFT; with --keep-adapter several, as PATH or NAME=PATH.",
)
@click.option("--output", type=PATH, required=True, help="Folder of the model.")
@click.option("--valid", type=PATH, help="Rows to measure the answer loss on; default: those of the adapter's run.")
@options_of(ExportConfig)
@options_of(ProgressConfig, "printing")
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    adapter: tuple[str, ...],
    output: Path,
    valid: Path | None,
    config: ExportConfig,
    printing: ProgressConfig,
) -> None:
    """Write a model folder that ONNX Runtime GenAI runs.

    Where the bundle's run had validation rows, the answer loss of base, base + adapter and merged model is printed.
    """
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    if "precision" in given and not config.merge:
        raise click.UsageError("--precision is for --merge; with --keep-adapter the base stays as it is in the bundle")
    if "least_kept" in given and (config.unmeasured or not config.merge):
        raise click.UsageError("--least-kept is for a merge that is measured; leave it out")
    if config.unmeasured and valid is not None:
        raise click.UsageError("--unmeasured and --valid exclude each other; leave one of them out")
    row_sources({"--valid": valid})
    adapters = _named(adapter)
    opened = bundle_at(bundle)
    from edgetune.exporting import export

    exported = export(opened, adapters, output, config, valid=valid, say=notices(quiet=printing.quiet))
    if printing.json:
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


def _named(written: tuple[str, ...]) -> dict[str, Path]:
    """The adapters by name, of `PATH` or `NAME=PATH`; a path may have a `=` of its own.

    Raises:
        UsageError: A path is no adapter's, or two adapters have one name.
    """
    from edgetune.exporting.adapters import name_of

    named: dict[str, Path] = {}
    for text in written:
        name, equals, path = text.partition("=")
        whole = not equals or Path(text).exists()
        folder = adapter_at(Path(text if whole else path))
        name = name_of(folder) if whole else name
        if name in named:
            raise click.UsageError(f"two adapters are called {name}: {named[name]} and {folder}; write NAME=PATH")
        named[name] = folder
    return named
