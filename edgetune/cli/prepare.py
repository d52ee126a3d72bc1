"""`edgetune prepare`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from edgetune.cli.command import COUNT, POSITIVE, Command, json_option, quiet_option
from edgetune.cli.inputs import PATH, refuse_known_folder, row_sources
from edgetune.cli.output import notices, print_json
from edgetune.config import Base, NpuForm, PrepareConfig, Targets
from edgetune.errors import UsageError
from edgetune.text.byte_size import bytes_text

DEFAULT = PrepareConfig()

EXAMPLES = """
edgetune prepare ./Phi-3.5-mini-instruct --output bundle
edgetune prepare ./Phi-4-mini-instruct --output bundle --rank 16 --alpha 32 --targets attention
edgetune prepare ./Phi-3.5-mini-instruct --output bundle --npu qdq --calibration train.jsonl
edgetune prepare microsoft/Phi-3-mini-4k-instruct --download --output bundle
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("checkpoint")
@click.option("--output", type=PATH, required=True, help="Folder of the bundle.")
@click.option("--rank", type=COUNT, default=DEFAULT.rank, show_default=True, help="Rank of every LoRA slot.")
@click.option(
    "--alpha", type=POSITIVE, default=DEFAULT.alpha, show_default=True, help="The update is scaled by alpha / rank."
)
@click.option(
    "--targets",
    type=click.Choice(get_args(Targets)),
    default=DEFAULT.targets,
    show_default=True,
    help="Which projections can be trained.",
)
@click.option(
    "--base",
    type=click.Choice(get_args(Base)),
    default=DEFAULT.base,
    show_default=True,
    help="How the frozen weights are stored.",
)
@click.option(
    "--npu",
    type=click.Choice(get_args(NpuForm)),
    default=DEFAULT.npu,
    show_default=True,
    help="Add the step with int8 frozen weights, for `train --runtime qnn --plan int8`.",
)
@click.option(
    "--calibration", type=PATH, default=DEFAULT.calibration, help="Rows that --npu qdq takes its ranges from."
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=DEFAULT.max_length,
    show_default=True,
    help="Longest row of training, in tokens.",
)
@click.option("--download", is_flag=True, default=DEFAULT.download, help="Fetch a hub id that is not on this machine.")
@click.option("--force", is_flag=True, default=DEFAULT.force, help="Replace a bundle that is already there.")
@quiet_option
@json_option
def command(
    checkpoint: str,
    output: Path,
    rank: int,
    alpha: float,
    targets: Targets,
    base: Base,
    npu: NpuForm,
    calibration: Path | None,
    max_length: int,
    download: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Turn CHECKPOINT into a bundle that any device can train.

    CHECKPOINT is a local Hugging Face folder of the Phi-3 family, or a hub id. Needs the host installation
    (`pip install "edgetune[host]"`).
    """
    refuse_known_folder(Path(checkpoint))
    if calibration is not None:
        row_sources({"--calibration": calibration})
        if npu != "qdq":
            raise UsageError(f"--calibration belongs to --npu qdq; --npu is {npu}")
    from edgetune.preparation import prepare

    config = PrepareConfig(
        rank=rank,
        alpha=alpha,
        targets=targets,
        base=base,
        npu=npu,
        calibration=calibration,
        max_length=max_length,
        download=download,
        force=force,
    )
    bundle = prepare(checkpoint, output, config, say=notices(quiet=quiet))
    manifest = bundle.manifest
    size = sum(file.size for file in manifest.files)
    if as_json:
        slots = len(manifest.lora.slots)
        print_json({"bundle": bundle.path, "bytes": size, "slots": slots, "base": manifest.base.sha256})
        return
    click.echo(f"{bundle.path}: {bytes_text(size)}, {len(manifest.lora.slots)} LoRA slots of rank {manifest.lora.rank}")
