"""`edgetune train`: rows become an adapter."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from edgetune.cli.command import NOT_NEGATIVE, POSITIVE, SIZE, Command, json_option, quiet_option
from edgetune.cli.inputs import PATH, adapter_at, bundle_folder, input_file, row_sources
from edgetune.cli.output import print_json
from edgetune.cli.progress import duration_text, shown
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
from edgetune.config import DeviceType, Method, PlanName, RuntimeName, Schedule, TrainConfig
from edgetune.errors import UsageError

DEFAULT = TrainConfig()
EXCLUSIVE = {"steps", "epochs"}
"""Two ways to say how long; a flag for one overrides a file that has the other."""

EXAMPLES = """
edgetune train bundle --data train.jsonl --output adapter
edgetune train bundle --data train.jsonl --valid valid.jsonl --output adapter --epochs 5 --learning-rate 5e-4
edgetune train bundle --data train.jsonl --output adapter --memory-budget 3GB
edgetune train bundle --data train.jsonl --output adapter --device raspberry-pi-5
edgetune train bundle --data train.jsonl --output adapter --runtime qnn --require-npu
edgetune train split --data train.jsonl --output adapter --plan split
edgetune train bundle --data train.jsonl --output adapter --method forward-only --steps 6000 --learning-rate 3e-3
edgetune train bundle --data train.jsonl --output adapter --config train.toml --steps 20

train.toml holds the same options, which flags override:
  learning-rate = 5e-4
  batch-size = 2
"""


@click.command(cls=Command, epilog=EXAMPLES)
@click.argument("bundle", type=PATH)
@click.option("--data", type=PATH, required=True, help="JSONL rows to train on.")
@click.option("--valid", type=PATH, help="JSONL rows to measure the loss on, at the start and the end at least.")
@click.option("--output", type=PATH, required=True, help="Folder of the adapter.")
@click.option("--config", type=PATH, help="TOML file with any of the options below; flags override it.")
@runtime_option
@click.option("--device", default=DEFAULT.device, help="Hold to a device's limits: its name, or a profile's path.")
@plan_option
@click.option(
    "--trunk-cache",
    type=SIZE,
    default=DEFAULT.trunk_cache,
    show_default=True,
    help="How much of what a split bundle's trunk computed is kept for the next epoch.",
)
@click.option(
    "--vitisai-config",
    type=PATH,
    default=DEFAULT.vitisai_config,
    help="vaip_config.json of the Vitis AI that runs the trunk, where it wants one.",
)
@method_option
@queries_option
@click.option(
    "--perturbation-size",
    type=POSITIVE,
    default=DEFAULT.perturbation_size,
    show_default=True,
    help="By how much forward-only moves each parameter to measure the loss.",
)
@memory_budget_option
@threads_option
@device_type_option
@click.option(
    "--require-npu",
    is_flag=True,
    default=DEFAULT.require_npu,
    help="End with exit code 4 where a node of the step would run on the CPU instead.",
)
@soc_model_option
@buckets_option
@steps_option
@epochs_option
@batch_size_option
@gradient_accumulation_steps_option
@packing_option
@click.option(
    "--learning-rate", type=POSITIVE, default=DEFAULT.learning_rate, show_default=True, help="Peak learning rate."
)
@click.option(
    "--schedule",
    type=click.Choice(get_args(Schedule)),
    default=DEFAULT.schedule,
    show_default=True,
    help="How the learning rate falls after the warm-up.",
)
@click.option(
    "--warmup-steps",
    type=click.IntRange(min=0),
    default=DEFAULT.warmup_steps,
    show_default=True,
    help="Steps over which the learning rate rises from zero.",
)
@click.option(
    "--weight-decay", type=NOT_NEGATIVE, default=DEFAULT.weight_decay, show_default=True, help="AdamW's weight decay."
)
@click.option(
    "--max-grad-norm",
    type=NOT_NEGATIVE,
    default=DEFAULT.max_grad_norm,
    show_default=True,
    help="Clip gradients to this norm; 0 switches clipping off.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=DEFAULT.seed,
    show_default=True,
    help="Decides the order of rows and the first adapter.",
)
@click.option(
    "--shuffle/--no-shuffle", default=DEFAULT.shuffle, show_default=True, help="Draw a new order of rows every epoch."
)
@truncate_option
@raw_prompts_option
@content_as_text_option
@click.option("--init-adapter", type=PATH, default=DEFAULT.init_adapter, help="Adapter to start from, PEFT's as well.")
@click.option("--force", is_flag=True, default=DEFAULT.force, help="Replace an adapter that is already there.")
@quiet_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    data: Path,
    valid: Path | None,
    output: Path,
    config: Path | None,
    runtime: RuntimeName,
    device: str | None,
    plan: PlanName,
    trunk_cache: str,
    vitisai_config: Path | None,
    method: Method,
    queries: int,
    perturbation_size: float,
    memory_budget: str | None,
    threads: int | None,
    device_type: DeviceType,
    require_npu: bool,
    soc_model: int | None,
    buckets: str | None,
    steps: int | None,
    epochs: float | None,
    batch_size: int,
    gradient_accumulation_steps: int,
    packing: bool,
    learning_rate: float,
    schedule: Schedule,
    warmup_steps: int,
    weight_decay: float,
    max_grad_norm: float,
    seed: int,
    shuffle: bool,
    truncate: bool,
    raw_prompts: bool,
    content_as_text: bool,
    init_adapter: Path | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a LoRA adapter on the rows of a JSONL file.

    A row is {"messages": [...]} (trained on the assistant's answers), {"prompt": ..., "completion": ...} (a
    conversation of two turns, trained on the completion) or {"text": ...} (trained on all of it). The adapter folder is
    in PEFT's format.
    """
    flags = TrainConfig(
        runtime=runtime,
        device=device,
        plan=plan,
        trunk_cache=trunk_cache,
        vitisai_config=vitisai_config,
        method=method,
        queries=queries,
        perturbation_size=perturbation_size,
        memory_budget=memory_budget,
        threads=threads,
        device_type=device_type,
        require_npu=require_npu,
        soc_model=soc_model,
        buckets=buckets,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        packing=packing,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
        shuffle=shuffle,
        truncate=truncate,
        raw_prompts=raw_prompts,
        content_as_text=content_as_text,
        init_adapter=init_adapter,
        force=force,
    )
    merged = _merged(ctx, flags, config)
    row_sources({"--data": data, "--valid": valid})
    if merged.vitisai_config is not None:
        input_file(merged.vitisai_config, "--vitisai-config", "the vaip_config.json of an installed Vitis AI")
    if merged.init_adapter is not None:
        adapter_at(merged.init_adapter)
    bundle_folder(bundle)
    from edgetune.training import train

    with shown(quiet=quiet) as observer:
        result = train(bundle, data, output, merged, valid=valid, observer=observer)
    if as_json:
        print_json(asdict(result))
        return
    click.echo(f"{result.path}: {result.steps} steps in {duration_text(result.seconds)}, loss {result.final_loss:.4f}")
    if result.first_validation_loss is not None and result.last_validation_loss is not None:
        click.echo(f"validation loss {result.first_validation_loss:.4f} -> {result.last_validation_loss:.4f}")


def _merged(ctx: click.Context, flags: TrainConfig, path: Path | None) -> TrainConfig:
    """Flags that were given, then the file, then the defaults, which `flags` holds where no flag was given."""
    if flags.steps is not None and flags.epochs is not None:
        raise click.UsageError("--steps and --epochs exclude each other; give one of them", ctx)
    if path is None:
        return flags
    names = [field.name for field in fields(TrainConfig)]
    given = {name for name in names if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if given & EXCLUSIVE:
        given |= EXCLUSIVE
    return replace(flags, **{name: value for name, value in _from_file(ctx, path).items() if name not in given})


def _from_file(ctx: click.Context, path: Path) -> dict[str, Any]:
    """What the file sets, within the ranges of the flags of the same names."""
    from edgetune.cli.config_file import read_config

    settings = read_config(path, TrainConfig)
    if settings.keys() >= EXCLUSIVE:
        raise UsageError(f"{settings['epochs'].place}: steps and epochs exclude each other; keep one of them")
    params = {param.name: param for param in ctx.command.params}
    values: dict[str, Any] = {}
    for name, setting in settings.items():
        try:
            values[name] = params[name].type.convert(setting.value, params[name], ctx)
        except click.BadParameter as error:
            raise UsageError(f"{setting.place}: {name}: {error.message}") from error
    return values
