"""One frozen dataclass a stage. All that is to be said of an option, its default as well, lives here and nowhere else.

`edgetune.cli.options` makes the flags of a command of these fields, and `edgetune.cli.config_file` the keys of a file.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from edgetune.errors import UsageError

Base = Literal["int4", "int8", "fp16", "fp32"]
Quantiser = Literal["least-squares", "nearest", "gptq"]
ModelFormat = Literal["genai", "safetensors"]
MergedPrecision = Literal["fp32", "int8", "int4"]
RuntimeName = Literal["auto", "openvino", "onnxruntime", "ort-training", "qnn", "openvino-ep", "fpga-hls", "torch"]
PlanName = Literal["auto", "whole", "keep", "recompute", "stream"]
TrainingPrecision = Literal["auto", "int8"]
NpuKind = Literal["none", "qdq", "blocks"]
DeviceType = Literal["auto", "CPU", "GPU", "NPU"]
Method = Literal["backpropagation", "forward-only"]
Schedule = Literal["constant", "linear", "cosine"]
Auto = Literal["auto"]
"""What stands for a number that the run chooses."""
Start = Literal["random", "gradient"]
Sharding = Literal["auto", "none", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3-offload"]
"""What `edgetune.runtimes.torch.engines` has one of each of; `auto` is `none` in one process, else `ddp`."""
HelpGroup = Literal["data", "method", "schedule", "memory", "device", "output", "other"]
"""Headings of options, in the order in which they are shown."""
OptimizerStates = Literal["auto", "32bit", "8bit"]
FormName = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text"]
RunsOrder = Literal["date", "name", "steps", "loss", "validation", "time"]
TrackingTool = Literal["tensorboard", "mlflow"]
PlatformName = Literal["android", "ios", "web", "linux-arm64"]
KaitoPreset = Literal[
    "phi-3-mini-4k-instruct", "phi-3-mini-128k-instruct", "phi-3-medium-4k-instruct", "phi-3-medium-128k-instruct",
    "phi-3.5-mini-instruct", "phi-4-mini-instruct", "phi-4",
]  # fmt: skip
"""Presets of Kaito 0.12 that it tunes and that are of Phi-3's architecture."""
KaitoMethod = Literal["lora", "qlora"]
MetricName = Literal[
    "accuracy", "macro-f1", "entity-f1", "json-match", "exact-match", "token-f1", "chrf", "bleu", "distinct-1",
    "distinct-2", "perplexity",
]  # fmt: skip
"""What `edgetune.evaluation.metrics` has one of each of."""

MODULES_OF_TARGETS: dict[str, tuple[str, ...]] = {
    "all-linear": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "attention": ("qkv_proj", "o_proj"),
}
"""The Phi-3 projections that `--targets` means by each of its words; it takes their names as well."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Option:
    """What a field says of itself beyond its name, type and default; choices are those of its `Literal` type."""

    help: str
    """One sentence for `--help`."""
    group: HelpGroup = "other"
    """Under which heading `--help` and `edgetune init` have it."""
    least: float | None = None
    """Smallest number that is taken; for more than zero, a number as small as makes sense."""
    most: float | None = None
    """Largest number that is taken."""
    is_size: bool = False
    """The text is a number of bytes, such as `3GB`."""
    off: str | None = None
    """Flag that switches off what is on by default, without its dashes; `no-` and the field's name without it."""
    excludes: tuple[str, ...] = ()
    """Fields that cannot be given together with this one."""
    needs: str | None = None
    """Field without which this one means nothing."""
    only: str | None = None
    """The one command that takes it, where several take fields of the dataclass."""
    former_names: tuple[str, ...] = ()
    """What the field was called. These names are still taken, with a notice, and are not shown."""
    former_values: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Choices that there were, each with the fields that say the same now. They are still taken, with a notice, and are
    not shown; the field itself then has its default."""


def option(default: Value, said: Option) -> Value:
    """A field of a config dataclass, which is an option of a command as well.

    Args:
        default: The field's default.
        said: What is to be said of it.
    """
    return field(default=default, metadata={"option": said})


def option_of(of: Field[Any]) -> Option:
    """What was said of a field that `option` made."""
    said: Option = of.metadata["option"]
    return said


def hints_of(kind: type) -> dict[str, Any]:
    """The type of each field by its name: bool, int, float, str, Path, a Literal, or a number or a Literal.

    `X | None` counts as `X`.
    """
    return {name: _present(hint) for name, hint in get_type_hints(kind).items()}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of which a value may have one, of a union; of another type, itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _present(hint: Any) -> Any:
    return reduce(or_, [member for member in alternatives(hint) if member is not type(None)])


def is_a(value: object, hint: type) -> bool:
    """Whether a value is of a field's type: a whole number is a number as well, and neither is True."""
    accepted = (int, float) if hint is float else (hint,)
    return isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))


def check_config(config: Any) -> None:
    """Refuse values that cannot be meant; what the command line gives has been checked already, Python's has not.

    Args:
        config: Of one of the dataclasses below.

    Raises:
        UsageError: Naming each of them, what was found and what is expected.
    """
    problems = list(_problems(config))
    if problems:
        raise UsageError("\n".join(problems))


def _problems(config: Any) -> Iterator[str]:
    hints = hints_of(type(config))
    for each in fields(config):
        value, said = getattr(config, each.name), option_of(each)
        if value is None and each.default is None:
            continue
        if expected := _expected(value, hints[each.name], said):
            yield f"{each.name} is {value!r:.60}, expected {expected}"
        for other in said.excludes:
            if (given := getattr(config, other)) is not None:
                yield f"{each.name} ({value}) and {other} ({given}) exclude each other; give one of them"
        if said.needs is not None and getattr(config, said.needs) is None:
            yield f"{each.name} ({value}) means nothing without {said.needs}; give that as well, or leave it out"


def _expected(value: object, hint: Any, said: Option) -> str:
    """What a value should have been; empty where it is that."""
    if len(kinds := alternatives(hint)) > 1:
        expected = [_expected(value, kind, said) for kind in kinds]
        return "" if "" in expected else ", or ".join(expected)
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return ""
        now = said.former_values.get(str(value), {})
        written = "".join(f"; write {name}={meant!r}" for name, meant in now.items())
        among = "one of " if len(get_args(hint)) > 1 else ""
        return f"{among}{', '.join(get_args(hint))}{written}"
    if get_origin(hint) is dict:
        return _expected_entries(value, get_args(hint)[1], said)
    if get_origin(hint) is tuple:
        return _expected_items(value, get_args(hint)[0], said)
    if not is_a(value, hint):
        return _KINDS[hint]
    if isinstance(value, int | float) and hint is not bool:
        # NaN compares as false.
        least, most = -math.inf if said.least is None else said.least, math.inf if said.most is None else said.most
        if not (least <= value <= most and (isinstance(value, int) or math.isfinite(value))):
            return f"{said.least:,} at least" if said.most is None else f"{said.least:,} to {said.most:,}"
    return ""


def _expected_entries(value: object, hint: Any, said: Option) -> str:
    """The same of a value that has one for each of some names."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return f"a dict of {_KINDS[hint]} for each name"
    wrong = {name: expected for name, each in value.items() if (expected := _expected(each, hint, said))}
    return "; ".join(f"for {name}: {expected}" for name, expected in wrong.items())


def _expected_items(value: object, hint: Any, said: Option) -> str:
    """The same of a tuple of values."""
    if not isinstance(value, tuple):
        return "a tuple"
    wrong = {expected: item for item in value if (expected := _expected(item, hint, said))}
    return "; ".join(f"for {item!r:.60}: {expected}" for expected, item in wrong.items())


_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a Path"}
"""How messages call what each type of field takes."""
_MANY = 10**9
_THREADS = Option("How many threads compute; without it, as many as this process may use.", least=1, group="device")
_TRUNCATE = Option("Cut rows that are too long; without it they are left out and counted.", group="data")
_RAW_PROMPTS = Option(
    "Take prompt and completion as they are; without it they go through the model's chat template.", group="data"
)
_CONTENT_AS_TEXT = Option(
    "Take control tokens that a message spells, such as <|end|>, as text; without it they steer the model.",
    group="data",
)
_ADAPTER_NAME = Option("Name of the adapter that answers, of those in the folder; base for none of them.")
_DEVICE_TYPE = Option("Which of the runtime's devices executes a whole step.", group="device")
_SOC_MODEL = Option(
    "Chip that --runtime qnn emulates where there is no NPU: 69 is 8 Elite; else the device's, or 60, X Elite.",
    least=1,
    group="device",
)


@dataclass(frozen=True)
class ResultConfig:
    """How a command prints its result."""

    json: bool = option(False, Option("Print JSON, for programs."))


@dataclass(frozen=True)
class ProgressConfig(ResultConfig):
    """How a command prints its result, and what it says on the way."""

    quiet: bool = option(False, Option("Say nothing but the result and errors."))


@dataclass(frozen=True)
class PrepareConfig:
    """What `edgetune prepare` makes of a checkpoint."""

    rank: int = option(8, Option("Rank of every LoRA slot.", least=1, group="method"))
    alpha: float = option(16.0, Option("The update is scaled by alpha / rank.", least=1e-9, group="method"))
    rslora: bool = option(
        False,
        Option("Scale the update by alpha / √rank, so that high ranks learn as fast as low ones.", group="method"),
    )
    """Rank-stabilised LoRA (Kalajdzievski 2023)."""
    rank_pattern: dict[str, int] | None = option(
        None,
        Option("Another rank for one projection, such as down_proj=32; can be given again.", least=1, group="method"),
    )
    """As PEFT's `rank_pattern`, whose keys match the end of a module's name: here it is one of the projections."""
    alpha_pattern: dict[str, float] | None = option(
        None,
        Option(
            "Another alpha for one projection, such as down_proj=64; can be given again.", least=1e-9, group="method"
        ),
    )
    """As PEFT's `alpha_pattern`."""
    targets: str = option(
        "all-linear",
        Option(
            "Which projections can be trained: all-linear, attention, or names such as qkv_proj,down_proj.",
            group="method",
        ),
    )
    dora: bool = option(
        False, Option("Train magnitudes as well, as DoRA does: one for each row of a projection.", group="method")
    )
    base: Base = option("int4", Option("How the frozen weights are stored.", group="memory"))
    """The model that is trained on is the one that answers."""
    quantiser: Quantiser = option("least-squares", Option("How weights are rounded for --base int4.", group="memory"))
    """The scale of a block is the one of least squared error, or puts its largest weight on the lowest point. By `gptq`
    inputs are rounded one after the other, and later ones make up for the errors of earlier ones on `calibration` rows.
    """
    npu: NpuKind = option(
        "none",
        Option("Add the step with int8 frozen weights, for `train --runtime qnn --precision int8`.", group="device"),
    )
    """The step for NPUs has 16-bit fixed-point activations (`qdq`), or blocks of weights (`blocks`). It takes two bytes
    a weight, `qdq` three."""
    calibration: Path | None = option(
        None,
        Option(
            "Rows for --quantiser gptq and the ranges of --npu qdq, and to see what float16 does not hold.",
            group="data",
        ),
    )
    """Without it `qdq` measures the ranges on random tokens, and nothing is said of float16."""
    max_length: int = option(512, Option("Longest row of training, in tokens.", least=2, group="data"))
    """It is never more than the model's positions."""
    download: bool = option(False, Option("Fetch a hub id that is not on this machine.", group="data"))
    """Without it nothing goes on the network."""
    force: bool = option(False, Option("Replace a bundle that is already there.", group="output"))


@dataclass(frozen=True)
class SplitConfig:
    """What `edgetune split` makes of a bundle."""

    layers: int | None = option(None, Option("Layers of the trunk, the lowest ones; half without it.", least=1))
    length: int | None = option(None, Option("Tokens of a row; the bundle's longest row without it.", least=1))
    """Positions of the trunk's graph, whose shapes are static."""
    calibration_rows: int = option(32, Option("How many of the rows are looked at.", least=1))
    """The int8 scales are chosen on them; they are drawn evenly from the file."""
    largest_error: float = option(
        0.5, Option("How far the trunk's hidden states may be from float, relative to them.", least=0.001)
    )
    """More is refused: the layers above would not know the states. The real model of [fpga](docs/fpga.md) has 0.13."""
    threads: int | None = option(None, _THREADS)
    force: bool = option(False, Option("Replace a bundle that is already there."))


ENOUGH_STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 200, 1, 4
"""What `TrainConfig` means by neither steps nor epochs: as many epochs as so many steps take, within these bounds."""


@dataclass(frozen=True)
class TrainConfig:
    """How `edgetune train` runs."""

    runtime: RuntimeName = option("auto", Option("What executes the training step.", group="device"))
    device: str | None = option(
        None,
        Option("Hold to a device's limits: its name, or a profile's path; without it, this machine's.", group="device"),
    )
    """The profile's memory, runtimes and limits hold."""
    plan: PlanName = option(
        "auto",
        Option(
            "What is kept in memory and what is computed again.",
            former_values={"int8": {"precision": "int8"}, "split": {"trunk": True}},
            group="memory",
        ),
    )
    sharding: Sharding = option(
        "auto",
        Option(
            "With --runtime torch, under torchrun: what is divided between the processes, one for each GPU.",
            group="memory",
        ),
    )
    """Weights, gradients or moments."""
    precision: TrainingPrecision = option(
        "auto",
        Option(
            "In what frozen weights are multiplied; auto is as exact as the processor does at full speed.",
            group="memory",
        ),
    )
    layers: str | None = option(
        None,
        Option(
            "Train these decoder layers alone, counted from 0: 16-31, 16- for all from there on, 16, or 0-3,16-31.",
            group="method",
        ),
    )
    """Those below compute no gradients, keep no activations and have no optimizer state."""
    trunk: bool = option(
        False,
        Option("Let a split bundle's trunk compute the lowest layers, which are not trained then.", group="method"),
    )
    lower_layers_cache: str = option(
        "2GB",
        Option(
            "How much of what enters the lowest trained layer is kept on disk: later epochs need not compute it.",
            is_size=True,
            former_names=("trunk_cache",),
            group="memory",
        ),
    )
    """With `layers` or `trunk`, what is below that layer gives the same in every epoch."""
    vitisai_config: Path | None = option(
        None,
        Option(
            "vaip_config.json of the Vitis AI that runs the trunk, where it wants one.", only="train", group="device"
        ),
    )
    method: Method = option(
        "backpropagation",
        Option(
            "How the gradient is found; forward-only estimates it from losses and needs no backward pass.",
            group="method",
        ),
    )
    queries: int = option(
        160, Option("Perturbations that a forward-only step measures.", least=2, most=10**6, group="method")
    )
    perturbation_size: float = option(
        1e-2,
        Option(
            "By how much forward-only moves each parameter to measure the loss.",
            least=1e-9,
            most=1000,
            only="train",
            group="method",
        ),
    )
    memory_budget: str | None = option(
        None,
        Option(
            "Most memory of the process, such as 3GB; without it, what the machine has free.",
            is_size=True,
            group="memory",
        ),
    )
    threads: int | None = option(None, _THREADS)
    device_type: DeviceType = option("auto", _DEVICE_TYPE)
    """`qnn` has an NPU, `openvino` all three."""
    require_npu: bool = option(
        False,
        Option(
            "End with exit code 4 where a node of the step would run on the CPU instead.", only="train", group="device"
        ),
    )
    soc_model: int | None = option(None, _SOC_MODEL)
    """Qualcomm's number of the chip."""
    buckets: str | None = option(
        None,
        Option(
            "Shapes of batches on an accelerator, such as 4x128,1x512; without it a few that suit the rows.",
            group="device",
        ),
    )
    steps: int | None = option(
        None, Option("Optimizer steps.", least=1, most=_MANY, excludes=("epochs",), group="schedule")
    )
    epochs: float | None = option(
        None,
        Option(
            f"Epochs, each once through all rows; without it and --steps as many as make {ENOUGH_STEPS} steps, but "
            f"{FEWEST_EPOCHS} to {MOST_EPOCHS}.",
            least=1e-9,
            most=10**6,
            group="schedule",
        ),
    )
    batch_size: int = option(
        4,
        Option(
            "Rows of a batch; where memory is short, they go through the model in several passes.",
            least=1,
            most=10**6,
            group="schedule",
        ),
    )
    """No pass through the model takes more memory than so many of the longest rows."""
    gradient_accumulation_steps: int = option(
        1, Option("Batches of one optimizer step.", least=1, most=10**6, group="schedule")
    )
    packing: bool = option(
        True, Option("Put short rows behind each other instead of padding each; none sees another.", group="data")
    )
    share_prefixes: bool = option(
        True,
        Option("Compute once a sequence what packed rows begin with in common, such as a system prompt.", group="data"),
    )
    learning_rate: float | Auto = option(
        "auto",
        Option(
            "Peak learning rate; auto suits it to the model, its adapter and the number of steps.",
            least=1e-30,
            most=1000,
            only="train",
            group="schedule",
        ),
    )
    """What `auto` chose is said when the run begins, and recorded as a number (`edgetune.model.learning_rate`)."""
    lora_plus_ratio: float = option(
        1.0,
        Option(
            "Learning rate of B matrices, as a multiple of all others'.",
            least=1e-9,
            most=1e6,
            only="train",
            group="schedule",
        ),
    )
    """LoRA+ (Hayou et al. 2024), with 16 in the paper."""
    schedule: Schedule = option(
        "cosine", Option("How the learning rate falls after the warm-up.", only="train", group="schedule")
    )
    warmup_steps: int = option(
        0,
        Option(
            "Steps over which the learning rate rises from zero.", least=0, most=_MANY, only="train", group="schedule"
        ),
    )
    weight_decay: float = option(
        0.0, Option("AdamW's weight decay.", least=0, most=1000, only="train", group="schedule")
    )
    """It is decoupled from the gradient."""
    max_grad_norm: float = option(
        1.0,
        Option(
            "Clip gradients to this norm; 0 switches clipping off.", least=0, most=1e30, only="train", group="schedule"
        ),
    )
    """The 2-norm of all gradients together; they are scaled down."""
    optimizer_states: OptimizerStates = option(
        "auto",
        Option(
            "How AdamW keeps its two moments; auto takes 8bit only where no plan fits the memory otherwise.",
            group="memory",
        ),
    )
    """In 8 bits, and a float32 scale for each block of 256, they take 2 bytes a parameter instead of 8 (Dettmers et al.
    2022)."""
    seed: int = option(
        0,
        Option(
            "Decides the order of rows and the first adapter.", least=0, most=2**63 - 1, only="train", group="schedule"
        ),
    )
    shuffle: bool = option(True, Option("Draw a new order of rows every epoch.", only="train", group="data"))
    truncate: bool = option(False, _TRUNCATE)
    raw_prompts: bool = option(False, _RAW_PROMPTS)
    content_as_text: bool = option(False, _CONTENT_AS_TEXT)
    init: Start = option(
        "random",
        Option("What A begins with; gradient takes where the first batches' loss falls.", only="train", group="method"),
    )
    """B is zero in any case, so that the first model is the base."""
    init_adapter: Path | None = option(
        None, Option("Adapter to start from, PEFT's as well.", only="train", group="method")
    )
    resume: bool = option(
        False,
        Option("Go on with the run that was interrupted: the same command, and this.", only="train", group="output"),
    )
    """Where it never came to save a state, it starts over."""
    save_steps: int | None = option(
        None,
        Option(
            "Save the run's state after so many steps, 0 for never; without it, as often as takes 2% of the time.",
            least=0,
            most=_MANY,
            only="train",
            group="output",
        ),
    )
    eval_steps: int | None = option(
        None,
        Option(
            "Measure the validation rows after so many steps; without it, after every epoch.",
            least=1,
            most=_MANY,
            group="schedule",
        ),
    )
    patience: int | None = option(
        None,
        Option(
            "End when the validation loss has not fallen for so many measurements, and keep the best step.",
            least=1,
            most=_MANY,
            only="train",
            group="schedule",
        ),
    )
    keep_best: bool = option(
        False,
        Option(
            "Write the adapter of the step with the lowest validation loss, not of the last.",
            only="train",
            group="schedule",
        ),
    )
    keep_state: bool = option(
        False,
        Option(
            "Keep the last state, so that --resume with more --steps or --epochs goes on.", only="train", group="output"
        ),
    )
    time_budget: str | None = option(
        None, Option("Pause after so much time, such as 20m or 1.5h: exit code 75.", only="train", group="output")
    )
    pause_below_battery: float | None = option(
        None,
        Option(
            "Rest while the battery has fewer percent and is not plugged in.",
            least=0,
            most=100,
            only="train",
            group="device",
        ),
    )
    pause_above_temperature: float | None = option(
        None,
        Option(
            "Rest while the machine is hotter, in degrees Celsius.", least=0, most=200, only="train", group="device"
        ),
    )
    pause_file: Path | None = option(
        None, Option("Pause when this file is there: exit code 75.", only="train", group="output")
    )
    force: bool = option(
        False,
        Option("Replace an adapter that is already there, and forget an unfinished run.", only="train", group="output"),
    )


@dataclass(frozen=True)
class InitConfig:
    """How `edgetune init` writes a file of options."""

    output: Path | None = option(None, Option("File to write; without it, STAGE.toml."))
    force: bool = option(False, Option("Replace a file that is already there."))


@dataclass(frozen=True)
class PreviewConfig:
    """How `edgetune preview` encodes rows."""

    raw_prompts: bool = option(False, _RAW_PROMPTS)
    content_as_text: bool = option(False, _CONTENT_AS_TEXT)


@dataclass(frozen=True)
class ConvertConfig:
    """How `edgetune data convert` makes rows."""

    prompt_column: str | None = option(
        None, Option("Field or column of the prompt; without it, guessed from the names.")
    )
    completion_column: str | None = option(
        None, Option("Field or column of the completion; without it, guessed from the names.")
    )
    system_column: str | None = option(None, Option("Field or column of the system's text; without it, `system`."))
    skip_bad: bool = option(False, Option("Leave out records that cannot be trained on, and say which they are."))
    force: bool = option(False, Option("Replace an output that is already there."))


DEFAULT_METRICS: tuple[MetricName, ...] = ("exact-match", "token-f1")
"""What `AnswersConfig` means without any."""


@dataclass(frozen=True)
class SearchConfig:
    """How an answer is found, token by token."""

    max_new_tokens: int = option(128, Option("Longest answer, in tokens.", least=1))
    temperature: float | None = option(
        None,
        Option("Draw each token by its probability, evener the higher this is; without it the likeliest.",
               least=0.01, most=100),
    )  # fmt: skip
    """Scores are divided by it before they become probabilities."""
    top_p: float | None = option(
        None,
        Option("Draw from the likeliest tokens that have this probability together.",
               least=1e-6, most=1, needs="temperature"),
    )  # fmt: skip
    """Nucleus sampling (Holtzman et al. 2020)."""
    top_k: int | None = option(
        None, Option("Draw from so many of the likeliest tokens.", least=1, most=10**6, needs="temperature")
    )
    seed: int | None = option(
        None,
        Option("Draw the same tokens each time; without it, others each time.", least=0, most=2**31 - 1,
               needs="temperature"),
    )  # fmt: skip


@dataclass(frozen=True)
class AskingConfig:
    """How rows are encoded, and with how many threads what they ask is computed."""

    raw_prompts: bool = option(False, _RAW_PROMPTS)
    content_as_text: bool = option(False, _CONTENT_AS_TEXT)
    threads: int | None = option(None, _THREADS)


@dataclass(frozen=True)
class EvaluateConfig(AskingConfig):
    """How `edgetune eval` measures."""

    truncate: bool = option(False, _TRUNCATE)


@dataclass(frozen=True)
class AnswersConfig(SearchConfig, AskingConfig):
    """How `edgetune eval --generate` lets a model answer, and what it measures of the answers."""

    metric: tuple[MetricName, ...] | None = option(
        None,
        Option(f"What is measured of the answers; can be given again. Without it {' and '.join(DEFAULT_METRICS)}."),
    )
    rows_output: Path | None = option(
        None, Option("File for each row's prompt, reference, answer and scores, as JSONL.")
    )
    compare: Path | None = option(
        None, Option("Another model's answers to the same rows: what --rows-output wrote, or a model to ask.")
    )


@dataclass(frozen=True)
class EvalCommandConfig(AnswersConfig, EvaluateConfig):
    """All that `edgetune eval` takes, whichever it does."""

    generate: bool = option(False, Option("Let MODEL answer the prompts, and measure the answers."))


@dataclass(frozen=True)
class ImportConfig:
    """How `edgetune import` writes an adapter."""

    force: bool = option(False, Option("Replace an adapter that is already there."))


@dataclass(frozen=True)
class ExportConfig:
    """What `edgetune export` writes."""

    merge: bool = option(
        True,
        Option("Fold the adapter into the weights, or put it beside the base as an .onnx_adapter.", off="keep-adapter"),
    )
    format: ModelFormat = option(
        "genai", Option("A folder for ONNX Runtime GenAI, or a merged Hugging Face folder, made of --checkpoint.")
    )
    checkpoint: str | None = option(
        None, Option("What the bundle was made from, a folder or a cached hub id: safetensors adds the adapter to it.")
    )
    """Its files have to be those that `prepare` read."""
    precision: MergedPrecision = option("fp32", Option("Weights of a merged model."))
    """A merge into int4 can lose what was learnt: it is measured."""
    trials: bool = option(
        True, Option("Measure the merge in the other precisions as well, each written beside the output and removed.")
    )
    """They say what would keep more, and what would do with less."""
    least_kept: float = option(
        0.8,
        Option("Share of what was learnt that a merged model must keep on these rows; 0 accepts any.", least=0, most=1),
    )
    """The answer losses say it; a model that keeps less is not written."""
    unmeasured: bool = option(False, Option("Measure nothing; a merge into int4 without rows has to be asked for so."))
    """No answer loss is measured, even where there are rows."""
    threads: int | None = option(None, _THREADS)
    force: bool = option(False, Option("Replace a model that is already there."))


@dataclass(frozen=True)
class GenerateConfig(SearchConfig):
    """How `edgetune generate` answers."""

    adapter: str | None = option(None, _ADAPTER_NAME)
    raw: bool = option(False, Option("Go on with the prompt as it is, without the chat template."))
    content_as_text: bool = option(False, _CONTENT_AS_TEXT)
    threads: int | None = option(None, _THREADS)


@dataclass(frozen=True)
class ChatConfig(SearchConfig):
    """How `edgetune chat` answers."""

    adapter: str | None = option(None, _ADAPTER_NAME)
    content_as_text: bool = option(False, _CONTENT_AS_TEXT)
    threads: int | None = option(None, _THREADS)


@dataclass(frozen=True)
class ShipConfig:
    """What `edgetune ship` lays out."""

    adapter: Path | None = option(
        None, Option("Adapter that the app starts from; without it, one that changes nothing yet.")
    )
    force: bool = option(False, Option("Replace a shipped folder that is already there."))


@dataclass(frozen=True)
class JobConfig:
    """What every hosted job has."""

    name: str = option("edgetune", Option("Name of the job.", group="output"))
    epochs: float = option(3.0, Option("Epochs.", least=1e-9, most=10**6, group="schedule"))
    batch_size: int = option(4, Option("Rows of a batch.", least=1, most=10**6, group="schedule"))
    learning_rate: float = option(2e-4, Option("Peak learning rate.", least=1e-9, most=1, group="schedule"))
    force: bool = option(False, Option("Replace a job's folder that is already there.", group="output"))


@dataclass(frozen=True)
class AzureMlConfig(JobConfig):
    """A job for Azure Machine Learning."""

    compute: str = option("gpu-cluster", Option("Cluster of the workspace.", group="device"))
    gpus: int = option(1, Option("GPUs of each node, with a process for each.", least=1, most=64, group="device"))
    nodes: int = option(1, Option("Nodes.", least=1, most=1024, group="device"))
    sharding: Sharding = option("auto", Option("What is divided between the processes.", group="memory"))
    pipeline: bool = option(
        False,
        Option("Run Azure's own chat_completion_pipeline instead of edgetune, and import its adapter.", group="method"),
    )
    model: str = option(
        "Phi-3-mini-4k-instruct", Option("With --pipeline: the registry's name of the bundle's checkpoint.")
    )


@dataclass(frozen=True)
class FoundryConfig(JobConfig):
    """A fine-tuning job for Azure AI Foundry."""

    epochs: int = option(3, Option("Epochs.", least=1, most=1000, group="schedule"))
    model: str = option("Phi-4-mini-instruct", Option("Which of the models that it fine-tunes.", group="method"))
    model_version: int = option(1, Option("Its version in the registry.", least=1, most=10**6, group="method"))
    compute: str | None = option(None, Option("Cluster of one's own; without it, Foundry's.", group="device"))
    instance_type: str | None = option(
        None, Option("Machine of one's own, such as Standard_NC96ads_A100_v4.", group="device")
    )


@dataclass(frozen=True)
class KaitoConfig(JobConfig):
    """A tuning workspace for Kaito."""

    epochs: int = option(3, Option("Epochs.", least=1, most=1000, group="schedule"))
    preset: KaitoPreset = option("phi-3-mini-4k-instruct", Option("Kaito's name of the model.", group="method"))
    method: KaitoMethod = option("qlora", Option("Whether frozen weights are quantised to 4 bits.", group="method"))
    rank: int = option(16, Option("Rank of the adapter; the bundle's is at least that.", least=1, group="method"))
    alpha: int = option(32, Option("Scale of the adapter, times rank.", least=1, group="method"))
    instance_type: str = option("Standard_NC24ads_A100_v4", Option("Node to run on.", group="device"))
    input_claim: str | None = option(None, Option("Volume claim that has the rows.", group="data"))
    input_url: str | None = option(None, Option("Public address of the rows.", group="data"))
    input_image: str | None = option(None, Option("Image that has the rows under /data.", group="data"))
    output_image: str | None = option(None, Option("Image that the adapter is pushed as.", group="output"))
    push_secret: str | None = option(None, Option("Secret with which it is pushed.", group="output"))
    output_claim: str | None = option(None, Option("Volume claim that the adapter is written to.", group="output"))


@dataclass(frozen=True)
class RunsConfig:
    """How `edgetune runs` lists adapters."""

    sort: RunsOrder = option("date", Option("What decides the order: the newest, or the least, comes first."))


@dataclass(frozen=True)
class FollowConfig:
    """What `edgetune train` leaves for those who look at runs, beside the adapter."""

    report: Path | None = option(
        None,
        Option(
            "Write the run's report there at the end, as `edgetune report` does, also when it is interrupted.",
            group="output",
        ),
    )
    log_to: TrackingTool | None = option(
        None, Option("Write what each step measures into this tool's files while the run goes on.", group="output")
    )
    log_folder: Path | None = option(
        None,
        Option(
            "Folder of the files of --log-to, which many runs share; without it, `runs` beside the adapter.",
            group="output",
        ),
    )


@dataclass(frozen=True)
class PlacementConfig:
    """What `edgetune inspect --placement` compiles the training step for."""

    buckets: str | None = option(
        None, Option("With --placement: the shapes, such as 4x128; one row of the longest by default.")
    )
    device_type: DeviceType = option(TrainConfig.device_type, _DEVICE_TYPE)
    soc_model: int | None = option(TrainConfig.soc_model, _SOC_MODEL)
    require_npu: bool = option(False, Option("With --placement: exit code 4 where a node falls back to the CPU."))
