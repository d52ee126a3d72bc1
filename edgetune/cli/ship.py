"""`edgetune ship`: what an app ships."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, adapter_at, bundle_at
from edgetune.cli.options import options_of
from edgetune.cli.output import console, notices, print_json
from edgetune.config import PlatformName, ProgressConfig, ShipConfig
from edgetune.text.byte_size import bytes_text

if TYPE_CHECKING:
    from edgetune.formats.bundle import Bundle
    from edgetune.ship.manifest import ShippedManifest

FPGA = "fpga"
"""No app: an HLS project of a split bundle's trunk."""

EXAMPLES = """
edgetune ship bundle --target web --output site/model
edgetune ship bundle --target android --output app/model --adapter adapter
edgetune ship bundle --target ios --output Model --force --json
edgetune ship split --target fpga --output hls
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("bundle", type=PATH)
@click.option(
    "--target",
    "platform",
    type=click.Choice([*get_args(PlatformName), FPGA]),
    required=True,
    help="Platform that the app goes to.",
)
@click.option("--output", type=PATH, required=True, help="Folder to write.")
@options_of(ShipConfig)
@options_of(ProgressConfig, "printing")
def command(bundle: Path, platform: str, output: Path, config: ShipConfig, printing: ProgressConfig) -> None:
    """Lay out what an app ships: graphs, weights in files that stores take, adapter, tokenizer, and target.json.

    The graphs compute what the bundle's compute, bit for bit. What is too large for the platform is refused. For `fpga`
    the trunk of a split bundle becomes an HLS project, which Vitis synthesises.
    """
    if config.adapter is not None:
        adapter_at(config.adapter)
    opened = bundle_at(bundle)
    if platform == FPGA:
        if config.adapter is not None:
            raise click.UsageError("--adapter is for an app; an FPGA's trunk has none")
        _write_hls(opened, output, config, printing)
        return
    from edgetune.ship import lay_out

    made = lay_out(opened, cast(PlatformName, platform), output, config, say=notices(quiet=printing.quiet))
    if printing.json:
        facts = made.manifest
        files = [{"path": file.path, "size": file.size, "pack": file.pack} for file in facts.files]
        budgets = [vars(budget) for budget in facts.budgets]
        print_json({"target": made.path, "sizes": facts.sizes, "budgets": budgets, "files": files})
        return
    _show(made.path, made.manifest)


def _write_hls(bundle: Bundle, output: Path, config: ShipConfig, printing: ProgressConfig) -> None:
    from dataclasses import asdict

    from edgetune.runtimes.fpga_hls.project import write_hls_project

    made = write_hls_project(bundle, output, notices(quiet=printing.quiet), force=config.force)
    if printing.json:
        print_json({"target": made.path, "layers": made.layers, "estimate": asdict(made.total)})
        return
    total, fpga = made.total, made.fpga
    click.echo(
        f"{made.path}: {len(made.cores)} cores of {made.layers} layers for the {fpga.name}, not synthesised; estimate: "
        f"{total.of(fpga)}"
    )


def _show(path: Path, manifest: ShippedManifest) -> None:
    from rich.table import Table

    click.echo(f"{path}: {manifest.target}, {bytes_text(sum(manifest.sizes.values()))} in {len(manifest.files)} files")
    contents = Table("content", "size")
    for content, size in manifest.sizes.items():
        contents.add_row(content, bytes_text(size))
    console().print(contents)
    if manifest.budgets:
        limits = Table("what the platform takes", "limit", "used", "left")
        for budget in manifest.budgets:
            left = budget.limit - budget.used
            limits.add_row(budget.what, bytes_text(budget.limit), bytes_text(budget.used), bytes_text(left))
        console().print(limits)
