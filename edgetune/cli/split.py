"""`edgetune split`: the lower layers of a bundle become a quantised graph for an accelerator."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, bundle_folder, row_sources
from edgetune.cli.options import options_of
from edgetune.cli.output import notices, print_json
from edgetune.config import ProgressConfig, SplitConfig
from edgetune.text.byte_size import bytes_text

EXAMPLES = """
edgetune split bundle --data train.jsonl --output split
edgetune split bundle --data train.jsonl --output split --layers 8 --length 256
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("bundle", type=PATH)
@click.option("--data", type=PATH, required=True, help="JSONL rows that the int8 scales are chosen on.")
@click.option("--output", type=PATH, required=True, help="Folder of the split bundle.")
@options_of(SplitConfig)
@options_of(ProgressConfig, "printing")
def command(bundle: Path, data: Path, output: Path, config: SplitConfig, printing: ProgressConfig) -> None:
    """Split BUNDLE: its lower layers become an int8 graph for an accelerator that cannot train.

    The graph is static, symmetric int8 with power-of-two scales, as Vitis AI wants it. `edgetune train --trunk`
    then trains adapters in the layers above. Needs the host installation (`pip install "edgetune[host]"`).
    """
    row_sources({"--data": data})
    bundle_folder(bundle)
    from edgetune.formats.trunk import GRAPH, read_trunk_info
    from edgetune.split import split

    made = split(bundle, data, output, config, say=notices(quiet=printing.quiet))
    info = read_trunk_info(made)
    size = made.file(GRAPH).stat().st_size
    total = made.manifest.architecture.num_hidden_layers
    if printing.json:
        print_json({"bundle": made.path, "layers": info.layers, "length": info.length, "bytes": size})
        return
    click.echo(
        f"{made.path}: {info.layers} of {total} layers in the trunk, {bytes_text(size)}, {info.length} positions"
    )
