"""`edgetune plan`: what a training run will need."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgetune.cli.command import COUNT, Command, json_option
from edgetune.cli.inputs import PATH, bundle_folder, row_sources
from edgetune.cli.output import cell, console, print_json
from edgetune.cli.progress import duration_text, passes_text
from edgetune.cli.run_options import (
    batch_size_option,
    buckets_option,
    content_as_text_option,
    device_type_option,
    epochs_option,
    gradient_accumulation_steps_option,
    memory_budget_option,
    method_option,
    packing_option,
    plan_option,
    queries_option,
    raw_prompts_option,
    runtime_option,
    soc_model_option,
    steps_option,
    threads_option,
    truncate_option,
)
from edgetune.config import DeviceType, Method, PlanName, RuntimeName, TrainConfig
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
@click.option("--device", help="A device's name, or a profile's path; without it, this machine.")
@click.option("--data", type=PATH, help="JSONL rows that would be trained on.")
@click.option("--valid", type=PATH, help="JSONL rows that the loss would be measured on.")
@click.option("--length", type=COUNT, help="Without --data: tokens of each row; by default as many as may be.")
@runtime_option
@plan_option
@method_option
@queries_option
@memory_budget_option
@threads_option
@device_type_option
@soc_model_option
@buckets_option
@steps_option
@epochs_option
@batch_size_option
@gradient_accumulation_steps_option
@packing_option
@truncate_option
@raw_prompts_option
@content_as_text_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    device: str | None,
    data: Path | None,
    valid: Path | None,
    length: int | None,
    runtime: RuntimeName,
    plan: PlanName,
    method: Method,
    queries: int,
    memory_budget: str | None,
    threads: int | None,
    device_type: DeviceType,
    soc_model: int | None,
    buckets: str | None,
    steps: int | None,
    epochs: float | None,
    batch_size: int,
    gradient_accumulation_steps: int,
    packing: bool,
    truncate: bool,
    raw_prompts: bool,
    content_as_text: bool,
    as_json: bool,
) -> None:
    """Predict peak memory, flash and time of a training run, on this machine or on another device.

    On this machine a few steps are timed, for at most 10 seconds; nothing is trained. For another device times are
    estimates from its profile, where it has the figures. What does not fit ends with exit code 6 and says what would.
    """
    if steps is not None and epochs is not None:
        raise click.UsageError("--steps and --epochs exclude each other; give one of them", ctx)
    if data is not None and length is not None:
        raise click.UsageError("--data and --length exclude each other; give one of them", ctx)
    row_sources({"--data": data, "--valid": valid})
    bundle_folder(bundle)
    from edgetune.devices.place import find_place
    from edgetune.planning.preflight import preflight

    place = find_place(device)
    config = TrainConfig(
        runtime=runtime,
        device=device,
        plan=plan,
        method=method,
        queries=queries,
        memory_budget=memory_budget,
        threads=threads,
        device_type=device_type,
        soc_model=soc_model,
        buckets=buckets,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        packing=packing,
        truncate=truncate,
        raw_prompts=raw_prompts,
        content_as_text=content_as_text,
    )
    found = preflight(bundle, data, valid, config, place, length=length)
    if as_json:
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
        f"{bytes_text(found.flash.adapter)}, cache at most {bytes_text(found.flash.cache)}",
        "time of a step": _seconds(found.step_seconds),
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


def _seconds(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds:.3g} s"


def _duration(seconds: float | None) -> str:
    return "not known" if seconds is None else duration_text(seconds)
