"""`edgetune import`: what another tool trained becomes an adapter of a bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, adapter_source, bundle_at
from edgetune.cli.options import options_of
from edgetune.cli.output import notices, print_json
from edgetune.config import ImportConfig, ProgressConfig
from edgetune.text.byte_size import bytes_text

EXAMPLES = """
edgetune import peft-adapter --bundle bundle --output adapter
edgetune import azure-job-output --bundle bundle --output adapter
edgetune import kaito-image.tar --bundle bundle --output adapter
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("source", type=PATH)
@click.option("--bundle", type=PATH, required=True, help="Bundle of the checkpoint that it was trained on.")
@click.option("--output", type=PATH, required=True, help="Folder of the adapter.")
@options_of(ImportConfig)
@options_of(ProgressConfig, "printing")
def command(source: Path, bundle: Path, output: Path, config: ImportConfig, printing: ProgressConfig) -> None:
    """Re-shape an adapter that another tool trained into the slots of a bundle.

    SOURCE is what PEFT, mlx-lm, Azure ML, AI Toolkit or Kaito left: a folder or one above it, a tar archive, or a
    container image as an OCI layout or as an archive. Lower ranks, another scaling, fewer projections and layers, and
    q, k, v or gate, up apart are taken. No pickle is opened.
    """
    adapter_source(source)
    opened = bundle_at(bundle)
    from edgetune.importing import import_adapter

    made = import_adapter(source, opened, output, config, say=notices(quiet=printing.quiet))
    if printing.json:
        facts = asdict(made)
        print_json({"adapter": facts.pop("path"), **facts})
        return
    filled = f"{len(made.filled)} of {made.slots} slots are {made.tool}'s"
    click.echo(f"{made.path}: {filled}, {bytes_text(made.bytes)}")
