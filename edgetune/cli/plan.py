"""`edgetune plan`: what a training run will need."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.command import Command
from edgetune.cli.inputs import PATH, bundle_folder, row_sources
from edgetune.cli.options import options_of
from edgetune.cli.output import cell, console, print_json
from edgetune.cli.progress import duration_text, passes_text
from edgetune.config import ResultConfig, TrainConfig
from edgetune.data.folder import training_files
from edgetune.text.byte_size import bytes_text

if TYPE_CHECKING:
    from edgetune.planning.preflight import Preflight

EXAMPLES = """
edgetune plan bundle --data train.jsonl
edgetune plan bundle --data train.jsonl --device raspberry-pi-5
edgetune plan bundle --device ./my-board.toml --length 256 --batch-size 2 --steps 100 --json
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("bundle", type=PATH)
@click.option("--data", type=PATH, help="JSONL rows that would be trained on, or a folder with train.jsonl.")
@click.option("--valid", type=PATH, help="JSONL rows that the loss would be measured on.")
@click.option(
    "--length",
    type=click.IntRange(min=1),
    help="Without --data: tokens of each row; by default as many as may be.",
)
@options_of(TrainConfig, command="plan")
@options_of(ResultConfig, "printing")
def command(
    bundle: Path,
    data: Path | None,
    valid: Path | None,
    length: int | None,
    config: TrainConfig,
    printing: ResultConfig,
) -> None:
    """Predict peak memory, flash and time of a training run, on this machine or on another device.

    On this machine a few steps are timed, for at most 10 seconds; nothing is trained. For another device times are
    estimates from its profile, where it has the figures. What does not fit ends with exit code 6 and says what would.
    """
    if data is not None and length is not None:
        raise click.UsageError("--data and --length exclude each other; give one of them")
    if data is not None:
        data, valid = training_files(data, valid)
    row_sources({"--data": data, "--valid": valid})
    bundle_folder(bundle)
    from edgetune.devices.place import find_place
    from edgetune.planning.preflight import preflight

    found = preflight(bundle, data, valid, config, find_place(config.device), length=length)
    if printing.json:
        print_json(asdict(found))
    else:
        _show(found)


def _show(found: Preflight) -> None:
    from rich.table import Table

    facts = Table.grid(padding=(0, 2))
    rows = {
        "device": ", ".join(filter(None, (found.device, "this machine" if found.here else "not this machine"))),
        "runtime": f"{found.runtime}, {_where(found)}",
        "plan": found.plan,
        "batch": _batch(found),
        **({"buckets": ", ".join(found.buckets)} if found.buckets else {}),
        "shapes": ", ".join(f"{each.sequences} × {each.length} ({each.batches}×)" for each in found.shapes[:6]),
        "peak memory": _memory(found),
        "flash": f"{bytes_text(found.flash_bytes)}: bundle {bytes_text(found.flash.bundle)}, adapter "
        f"{bytes_text(found.flash.adapter)}, cache at most {bytes_text(found.flash.cache)}{_states(found)}",
        **({"kept": found.kept} if found.kept else {}),
        "time of a step": _step(found),
        "time of the run": f"{_duration(found.run_seconds)}, {found.steps:,} steps",
        "times are": found.time_from,
    }
    for name, value in rows.items():
        facts.add_row(cell(name, "bold"), cell(value))
    for note in found.notes:
        facts.add_row(cell("note", "bold"), cell(note))
    console().print(facts)


def _where(found: Preflight) -> str:
    if found.emulated:
        return "in an emulation of the hardware"
    return "on the accelerator" if found.on_accelerator else "on the CPU"


def _batch(found: Preflight) -> str:
    several = found.gradient_accumulation_steps
    step = f", {several} batches a step" if several > 1 else ""
    passes = passes_text(found.pass_rows, found.batch_size)
    rows = f"{found.batch_size} rows of at most {found.longest_row:,} tokens{step}"
    return ", ".join(filter(None, (rows, passes)))


def _memory(found: Preflight) -> str:
    of = "" if found.memory_bytes is None else f" of {bytes_text(found.memory_bytes)}"
    if found.peak_memory_bytes is not None:
        return f"{bytes_text(found.peak_memory_bytes)}{of}"
    more = "" if found.least_memory_bytes is None else f", more than {bytes_text(found.least_memory_bytes)}"
    return f"not known{more}{of}"


def _states(found: Preflight) -> str:
    return f", what enters the lowest trained layer {bytes_text(found.flash.states)}" if found.flash.states else ""


def _step(found: Preflight) -> str:
    later = "" if found.later_step_seconds is None else f", {_seconds(found.later_step_seconds)} after the first epoch"
    return f"{_seconds(found.step_seconds)}{later}"


def _seconds(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds:.3g} s"


def _duration(seconds: float | None) -> str:
    return "not known" if seconds is None else duration_text(seconds)
