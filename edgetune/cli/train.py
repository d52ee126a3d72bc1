"""`edgetune train`: rows become an adapter."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from edgetune.cli.command import Command
from edgetune.cli.following import followed
from edgetune.cli.inputs import PATH, adapter_source, bundle_folder, input_file, row_sources
from edgetune.cli.options import options_of
from edgetune.cli.output import print_json
from edgetune.cli.progress import duration_text, shown
from edgetune.config import FollowConfig, ProgressConfig, TrainConfig
from edgetune.data.folder import training_files

EXAMPLES = """
edgetune train bundle --data train.jsonl --output adapter
edgetune train bundle --data train.jsonl --valid valid.jsonl --output adapter --epochs 5 --learning-rate 5e-4
edgetune train bundle --data train.jsonl --output adapter --memory-budget 3GB
edgetune train bundle --data train.jsonl --output adapter --device raspberry-pi-5
edgetune train bundle --data train.jsonl --output adapter --runtime qnn --require-npu
edgetune train split --data train.jsonl --output adapter --trunk
edgetune train bundle --data train.jsonl --output adapter --method forward-only --steps 6000 --learning-rate 3e-3
edgetune train bundle --data train.jsonl --output adapter --report report.html --log-to tensorboard
edgetune train bundle --data train.jsonl --output adapter --config train.toml --steps 20

train.toml holds the same options, which flags override:
  learning-rate = 5e-4
  batch-size = 2
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("bundle", type=PATH)
@click.option("--data", type=PATH, required=True, help="JSONL rows to train on, or a folder with train.jsonl.")
@click.option("--valid", type=PATH, help="JSONL rows to measure the loss on, at the start and the end at least.")
@click.option("--output", type=PATH, required=True, help="Folder of the adapter.")
@options_of(TrainConfig, command="train", with_file=True)
@options_of(FollowConfig, "follow")
@options_of(ProgressConfig, "printing")
def command(
    bundle: Path,
    data: Path,
    valid: Path | None,
    output: Path,
    config: TrainConfig,
    follow: FollowConfig,
    printing: ProgressConfig,
) -> None:
    """Train a LoRA adapter on the rows of a JSONL file.

    A row is {"messages": [...]} (trained on the assistant's answers), {"prompt": ..., "completion": ...} (a
    conversation of two turns, trained on the completion) or {"text": ...} (trained on all of it). The adapter folder is
    in PEFT's format.
    """
    train_rows, valid_rows = training_files(data, valid)
    row_sources({"--data": train_rows, "--valid": valid_rows})
    if config.vitisai_config is not None:
        input_file(config.vitisai_config, "--vitisai-config", "the vaip_config.json of an installed Vitis AI")
    if config.init_adapter is not None:
        adapter_source(config.init_adapter)
    bundle_folder(bundle)
    if config.runtime == "torch":
        from edgetune.runtimes.torch import runtime

        if runtime.is_led():
            runtime.follow()
            return
    from edgetune.training import train
    from edgetune.training.provenance import told_options

    with shown(quiet=printing.quiet) as screen, followed(screen, follow, output, told_options(config)) as observer:
        result = train(bundle, data, output, config, valid=valid, observer=observer)
    if printing.json:
        print_json(asdict(result))
        return
    click.echo(f"{result.path}: {result.steps} steps in {duration_text(result.seconds)}, loss {result.final_loss:.4f}")
    if result.first_validation_loss is not None and result.last_validation_loss is not None:
        click.echo(f"validation loss {result.first_validation_loss:.4f} -> {result.last_validation_loss:.4f}")
