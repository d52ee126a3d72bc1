"""`edgetune prepare`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, refuse_known_folder, row_sources
from edgetune.cli.options import options_of
from edgetune.cli.output import notices, print_json
from edgetune.config import PrepareConfig, ProgressConfig
from edgetune.text.byte_size import bytes_text

EXAMPLES = """
edgetune prepare ./Phi-3.5-mini-instruct --output bundle
edgetune prepare ./Phi-4-mini-instruct --output bundle --rank 16 --alpha 32 --targets attention
edgetune prepare ./Phi-3.5-mini-instruct --output bundle --quantiser gptq --calibration train.jsonl
edgetune prepare ./Phi-3.5-mini-instruct --output bundle --npu qdq --calibration train.jsonl
edgetune prepare ./Phi-3.5-mini-instruct --output bundle --config prepare.toml
edgetune prepare microsoft/Phi-3-mini-4k-instruct --download --output bundle
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("checkpoint")
@click.option("--output", type=PATH, required=True, help="Folder of the bundle.")
@options_of(PrepareConfig, with_file=True)
@options_of(ProgressConfig, "printing")
def command(checkpoint: str, output: Path, config: PrepareConfig, printing: ProgressConfig) -> None:
    """Turn CHECKPOINT into a bundle that any device can train.

    CHECKPOINT is a local Hugging Face folder of the Phi-3 family, or a hub id. Needs the host installation
    (`pip install "edgetune[host]"`).
    """
    refuse_known_folder(Path(checkpoint))
    if config.calibration is not None:
        row_sources({"--calibration": config.calibration})
    from edgetune.preparation import prepare

    bundle = prepare(checkpoint, output, config, say=notices(quiet=printing.quiet))
    manifest = bundle.manifest
    size = sum(file.size for file in manifest.files)
    if printing.json:
        slots = len(manifest.lora.slots)
        print_json({"bundle": bundle.path, "bytes": size, "slots": slots, "base": manifest.base.sha256})
        return
    lora = manifest.lora
    click.echo(f"{bundle.path}: {bytes_text(size)}, {len(lora.slots)} LoRA slots of {lora.in_words()}")
