"""`edgetune split`: the lower layers of a bundle become a quantised graph for an accelerator."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune.cli.command import COUNT, Command, json_option, quiet_option
from edgetune.cli.inputs import PATH, bundle_folder, row_sources
from edgetune.cli.output import notices, print_json
from edgetune.cli.run_options import threads_option
from edgetune.config import SplitConfig
from edgetune.text.byte_size import bytes_text

DEFAULT = SplitConfig()

EXAMPLES = """
edgetune split bundle --data train.jsonl --output split
edgetune split bundle --data train.jsonl --output split --layers 8 --length 256
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("bundle", type=PATH)
@click.option("--data", type=PATH, required=True, help="JSONL rows that the int8 scales are chosen on.")
@click.option("--output", type=PATH, required=True, help="Folder of the split bundle.")
@click.option(
    "--layers", type=COUNT, default=DEFAULT.layers, help="Layers of the trunk, the lowest ones; half without it."
)
@click.option(
    "--length", type=COUNT, default=DEFAULT.length, help="Tokens of a row; the bundle's longest row without it."
)
@click.option(
    "--calibration-rows",
    type=COUNT,
    default=DEFAULT.calibration_rows,
    show_default=True,
    help="How many of the rows are looked at.",
)
@threads_option
@click.option("--force", is_flag=True, default=DEFAULT.force, help="Replace a bundle that is already there.")
@quiet_option
@json_option
def command(
    bundle: Path,
    data: Path,
    output: Path,
    layers: int | None,
    length: int | None,
    calibration_rows: int,
    threads: int | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Split BUNDLE: its lower layers become an int8 graph for an accelerator that cannot train.

    The graph is static, symmetric int8 with power-of-two scales, as Vitis AI wants it. `edgetune train --plan split`
    then trains adapters in the layers above. Needs the host installation (`pip install "edgetune[host]"`).
    """
    row_sources({"--data": data})
    bundle_folder(bundle)
    from edgetune.formats.trunk import GRAPH, read_trunk_info
    from edgetune.split import split

    config = SplitConfig(layers=layers, length=length, calibration_rows=calibration_rows, threads=threads, force=force)
    made = split(bundle, data, output, config, say=notices(quiet=quiet))
    info = read_trunk_info(made)
    size = made.file(GRAPH).stat().st_size
    total = made.manifest.architecture.num_hidden_layers
    if as_json:
        print_json({"bundle": made.path, "layers": info.layers, "length": info.length, "bytes": size})
        return
    click.echo(
        f"{made.path}: {info.layers} of {total} layers in the trunk, {bytes_text(size)}, {info.length} positions"
    )
