"""Options that every command about a training run has, spelt and checked alike."""

from __future__ import annotations

from typing import get_args

import click

from edgetune.cli.command import COUNT, POSITIVE, SIZE
from edgetune.config import DEFAULT_EPOCHS, DeviceType, Method, PlanName, RuntimeName, TrainConfig

_DEFAULT = TrainConfig()

runtime_option = click.option(
    "--runtime",
    type=click.Choice(get_args(RuntimeName)),
    default=_DEFAULT.runtime,
    show_default=True,
    help="What executes the training step.",
)
plan_option = click.option(
    "--plan",
    type=click.Choice(get_args(PlanName)),
    default=_DEFAULT.plan,
    show_default=True,
    help="What is kept in memory and what is computed again; int8 also says in which precision, split where.",
)
method_option = click.option(
    "--method",
    type=click.Choice(get_args(Method)),
    default=_DEFAULT.method,
    show_default=True,
    help="How the gradient is found; forward-only estimates it from losses and needs no backward pass.",
)
queries_option = click.option(
    "--queries",
    type=click.IntRange(min=2),
    default=_DEFAULT.queries,
    show_default=True,
    help="Perturbations that a forward-only step measures.",
)
memory_budget_option = click.option(
    "--memory-budget",
    type=SIZE,
    default=_DEFAULT.memory_budget,
    help="Most memory of the process, such as 3GB; without it, what the machine has free.",
)
threads_option = click.option(
    "--threads",
    type=COUNT,
    default=_DEFAULT.threads,
    help="How many threads compute; without it, as many as this process may use.",
)
device_type_option = click.option(
    "--device-type",
    type=click.Choice(get_args(DeviceType)),
    default=_DEFAULT.device_type,
    show_default=True,
    help="Which of the runtime's devices executes a whole step.",
)
soc_model_option = click.option(
    "--soc-model",
    type=COUNT,
    default=_DEFAULT.soc_model,
    help="Chip that --runtime qnn emulates where there is no NPU: 69 is 8 Elite; else the device's, or 60, X Elite.",
)
buckets_option = click.option(
    "--buckets",
    default=_DEFAULT.buckets,
    help="Shapes of batches on an accelerator, such as 4x128,1x512; without it a few that suit the rows.",
)
steps_option = click.option("--steps", type=COUNT, default=_DEFAULT.steps, help="Optimizer steps.")
epochs_option = click.option(
    "--epochs",
    type=POSITIVE,
    default=_DEFAULT.epochs,
    help=f"Epochs, each once through all rows; {DEFAULT_EPOCHS:g} when neither --steps nor --epochs is given.",
)
batch_size_option = click.option(
    "--batch-size",
    type=COUNT,
    default=_DEFAULT.batch_size,
    show_default=True,
    help="Rows of a batch; where memory is short, they go through the model in several passes.",
)
gradient_accumulation_steps_option = click.option(
    "--gradient-accumulation-steps",
    type=COUNT,
    default=_DEFAULT.gradient_accumulation_steps,
    show_default=True,
    help="Batches of one optimizer step.",
)
packing_option = click.option(
    "--packing/--no-packing",
    default=_DEFAULT.packing,
    show_default=True,
    help="Put short rows behind each other instead of padding each; none sees another.",
)
raw_prompts_option = click.option(
    "--raw-prompts",
    is_flag=True,
    default=_DEFAULT.raw_prompts,
    help="Take prompt and completion as they are; without it they go through the model's chat template.",
)
content_as_text_option = click.option(
    "--content-as-text",
    is_flag=True,
    default=_DEFAULT.content_as_text,
    help="Take control tokens that a message spells, such as <|end|>, as text.",
)
truncate_option = click.option(
    "--truncate",
    is_flag=True,
    default=_DEFAULT.truncate,
    help="Cut rows that are too long; without it they are left out and counted.",
)
