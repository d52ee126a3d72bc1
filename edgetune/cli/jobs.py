"""`edgetune jobs`: folders with which a hosted platform trains."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.command import Command, Group
from edgetune.cli.inputs import PATH, bundle_at, row_sources
from edgetune.cli.options import options_of
from edgetune.cli.output import print_json
from edgetune.config import AzureMlConfig, FoundryConfig, JobConfig, KaitoConfig, ResultConfig
from edgetune.data.folder import training_files

if TYPE_CHECKING:
    from edgetune.jobs.folder import Job

AZURE_ML_EXAMPLES = """
edgetune jobs azure-ml bundle --data train.jsonl --output job --gpus 4 --sharding fsdp2 --batch-size 16
edgetune jobs azure-ml bundle --data train.jsonl --output job --pipeline --model Phi-3-mini-4k-instruct
"""
FOUNDRY_EXAMPLES = """
edgetune jobs azure-foundry --data train.jsonl --valid valid.jsonl --output job --model Phi-4-mini-instruct
"""
KAITO_EXAMPLES = """
edgetune jobs kaito --data train.jsonl --output job --input-claim rows --output-claim adapters
edgetune jobs kaito --data train.jsonl --output job --input-claim rows --output-image lamp:1 --push-secret registry
"""

_data = click.option("--data", type=PATH, required=True, help="JSONL rows to train on, or a folder with train.jsonl.")
_valid = click.option("--valid", type=PATH, help="JSONL rows to measure on.")
_output = click.option("--output", type=PATH, required=True, help="Folder to write.")


@click.group(cls=Group, epilog=AZURE_ML_EXAMPLES + FOUNDRY_EXAMPLES.lstrip() + KAITO_EXAMPLES.lstrip())
def command() -> None:
    """Write what a hosted platform is given to train: rows in its form, job files, and the commands."""


@command.command("azure-ml", cls=Command, epilog=AZURE_ML_EXAMPLES)
@click.argument("bundle", type=PATH)
@_data
@_valid
@_output
@options_of(AzureMlConfig)
@options_of(ResultConfig, "printing")
def azure_ml(
    bundle: Path, data: Path, valid: Path | None, output: Path, config: AzureMlConfig, printing: ResultConfig
) -> None:
    """Train BUNDLE on a GPU cluster of Azure Machine Learning, with edgetune or with Azure's own pipeline."""
    opened = bundle_at(bundle)
    from edgetune.jobs.azure_ml import azure_ml_job

    train, measured = _rows(data, valid)
    _write(azure_ml_job(opened, config, with_valid=measured is not None), train, measured, output, config, printing)


@command.command("azure-foundry", cls=Command, epilog=FOUNDRY_EXAMPLES)
@_data
@_valid
@_output
@options_of(FoundryConfig)
@options_of(ResultConfig, "printing")
def azure_foundry(data: Path, valid: Path | None, output: Path, config: FoundryConfig, printing: ResultConfig) -> None:
    """Fine-tune a model that Azure AI Foundry serves. Phi-3 and Phi-3.5 are retired there."""
    from edgetune.jobs.azure_foundry import foundry_job

    train, measured = _rows(data, valid)
    _write(foundry_job(config, with_valid=measured is not None), train, measured, output, config, printing)


@command.command("kaito", cls=Command, epilog=KAITO_EXAMPLES)
@_data
@_output
@options_of(KaitoConfig)
@options_of(ResultConfig, "printing")
def kaito(data: Path, output: Path, config: KaitoConfig, printing: ResultConfig) -> None:
    """Tune a preset of Kaito's on Kubernetes."""
    from edgetune.jobs.kaito import kaito_job

    train, _ = _rows(data, None)
    _write(kaito_job(config), train, None, output, config, printing)


def _rows(data: Path, valid: Path | None) -> tuple[Path, Path | None]:
    train, measured = training_files(data, valid)
    row_sources({"--data": train, "--valid": measured})
    return train, measured


def _write(job: Job, data: Path, valid: Path | None, output: Path, config: JobConfig, printing: ResultConfig) -> None:
    from edgetune.jobs.folder import README, write_job

    made = write_job(job, data, valid, output, config)
    if printing.json:
        print_json(asdict(made))
        return
    measured = f", {made.valid_rows:,} to measure on" if made.valid_rows else ""
    click.echo(f"{made.path}: {made.rows:,} rows{measured}; {README} has the commands")
