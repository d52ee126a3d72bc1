"""`edgetune export`: bundle and adapter become a model folder for ONNX Runtime GenAI, or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, adapter_at, bundle_at, row_sources
from edgetune.cli.options import options_of
from edgetune.cli.output import notices, print_json
from edgetune.config import ExportConfig, ProgressConfig
from edgetune.text.byte_size import bytes_text

if TYPE_CHECKING:
    from edgetune.exporting import ExportReport

EXAMPLES = """
edgetune export bundle --adapter adapter --output model
edgetune export bundle --adapter adapter --output model --merge --precision int4 --valid valid.jsonl
edgetune export bundle --adapter adapter --output model --keep-adapter
edgetune export bundle --adapter adapter --output merged --format safetensors --checkpoint ./Phi-3.5-mini-instruct
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
    """Write a model folder that ONNX Runtime GenAI runs, or a merged Hugging Face folder.

    Where there are held-out rows, the answer losses of base, base + adapter and the merged model in each precision are
    printed, and a merge that keeps too little of what was learnt is refused.
    """
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    if "precision" in given and not config.merge:
        raise click.UsageError("--precision is for --merge; with --keep-adapter the base stays as it is in the bundle")
    if "precision" in given and config.format == "safetensors":
        raise click.UsageError("--precision is for --format genai; a Hugging Face folder has the checkpoint's type")
    if "least_kept" in given and (config.unmeasured or not config.merge):
        raise click.UsageError("--least-kept is for a merge that is measured; leave it out")
    if "trials" in given and (config.unmeasured or not config.merge or config.format == "safetensors"):
        raise click.UsageError("--trials and --no-trials are for a GenAI merge that is measured; leave them out")
    if config.unmeasured and valid is not None:
        raise click.UsageError("--unmeasured and --valid exclude each other; leave one of them out")
    row_sources({"--valid": valid})
    adapters = _named(adapter)
    opened = bundle_at(bundle)
    from edgetune.exporting import export

    exported = export(opened, adapters, output, config, valid=valid, say=notices(quiet=printing.quiet))
    if printing.json:
        losses, shares = exported.losses, exported.shares
        print_json(
            {"model": exported.path, "bytes": exported.bytes, "losses": losses, "shares": shares, "kept": exported.kept}
        )
        return
    click.echo(f"{exported.path}: {bytes_text(exported.bytes)}")
    for line in _told(exported):
        click.echo(f"  {line}")


def _told(exported: ExportReport) -> list[str]:
    """What was measured, as lines of a table, and what it says."""
    if not exported.losses:
        unmeasured = "not measured on held-out rows: what the merge keeps of what was learnt; --valid ROWS measures it"
        return [unmeasured] if exported.kind == "merged" else []
    width = max(map(len, exported.losses))
    lines = []
    for name, loss in exported.losses.items():
        share = exported.shares.get(name)
        kept = "" if share is None else f"  keeps {share:.1%}"
        lines.append(f"answer loss, {name + ':':{width + 1}} {loss:.4f}{kept}")
    if exported.kept is not None:
        lines.append(f"kept of what was learnt: {exported.kept:.1%}")
    elif exported.kind == "merged":
        lines.append("kept of what was learnt: nothing to keep, the adapter is no better than the base on these rows")
    return lines


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
