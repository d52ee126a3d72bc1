"""One frozen dataclass a stage. Every default lives here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Targets = Literal["all-linear", "attention"]
Base = Literal["int4", "int8", "fp16", "fp32"]
Precision = Literal["int4", "fp32"]
RuntimeName = Literal["auto", "openvino", "onnxruntime", "ort-training", "qnn", "openvino-ep", "fpga-hls"]
PlanName = Literal["auto", "whole", "keep", "recompute", "stream", "int8", "split"]
NpuForm = Literal["none", "qdq", "blocks"]
DeviceType = Literal["auto", "CPU", "GPU", "NPU"]
Method = Literal["backpropagation", "forward-only"]
Schedule = Literal["constant", "linear", "cosine"]
TargetName = Literal["android", "ios", "web", "linux-arm64"]

MODULES_OF_TARGETS: dict[Targets, tuple[str, ...]] = {
    "all-linear": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "attention": ("qkv_proj", "o_proj"),
}
"""The Phi-3 projections that each `--targets` choice trains."""


@dataclass(frozen=True)
class PrepareConfig:
    """What `edgetune prepare` makes of a checkpoint."""

    rank: int = 8
    """Rank r of every LoRA slot."""
    alpha: float = 16.0
    """LoRA alpha; the update is scaled by alpha / rank."""
    targets: Targets = "all-linear"
    """Which projections get a LoRA slot."""
    base: Base = "int4"
    """How the frozen weights are stored: what is trained on is what answers."""
    npu: NpuForm = "none"
    """Which form of the step with int8 frozen weights to add, for NPUs: 16-bit fixed-point activations (`qdq`), or
    blocks of weights (`blocks`). It takes two bytes a weight; `qdq` three for queries, keys, values and the head."""
    calibration: Path | None = None
    """Rows on which the ranges of `qdq` are measured; random tokens without it."""
    max_length: int = 512
    """Longest row, in tokens, that training takes; never more than the model's positions."""
    download: bool = False
    """Fetch a hub id that is not in the local cache. Off: nothing goes on the network."""
    force: bool = False
    """Replace a bundle that is already there."""


@dataclass(frozen=True)
class SplitConfig:
    """What `edgetune split` makes of a bundle."""

    layers: int | None = None
    """Layers of the trunk, the lowest ones; half of them when it is not given."""
    length: int | None = None
    """Positions of the trunk's graph; the bundle's longest row when it is not given."""
    calibration_rows: int = 32
    """Rows that the int8 scales are chosen on, drawn evenly from the file."""
    threads: int | None = None
    """How many threads compute; without it as many as the process may use."""
    force: bool = False
    """Replace a bundle that is already there."""


@dataclass(frozen=True)
class TrainConfig:
    """How `edgetune train` runs."""

    runtime: RuntimeName = "auto"
    """What executes the training step."""
    device: str | None = None
    """Name of a device profile, or the path of one: its memory, runtimes and limits hold."""
    plan: PlanName = "auto"
    """What is kept in memory and what is computed again; `int8` also says in which precision, `split` where."""
    trunk_cache: str = "256MB"
    """How much of what the trunk of a split bundle computed is kept, so that it computes a row once."""
    vitisai_config: Path | None = None
    """`vaip_config.json` of the Vitis AI that runs the trunk, where it wants one."""
    method: Method = "backpropagation"
    """How the gradient is found: `forward-only` estimates it from losses, where a backward pass is out of reach."""
    queries: int = 160
    """Perturbations whose losses a forward-only step measures."""
    perturbation_size: float = 1e-2
    """By how much forward-only perturbs a parameter to measure the loss."""
    memory_budget: str | None = None
    """Most memory of the process, such as `3GB`; without it, what the machine has free."""
    threads: int | None = None
    """How many threads compute; without it as many as the process may use."""
    device_type: DeviceType = "auto"
    """Which of a runtime's devices executes the whole step: `qnn` has an NPU, `openvino` all three."""
    require_npu: bool = False
    """Refuse to train where a node of the step would fall back to the CPU."""
    soc_model: int | None = None
    """Qualcomm's number of the chip that `qnn` emulates where it finds no NPU; without it the device profile's, or that
    of Snapdragon X Elite."""
    buckets: str | None = None
    """The only shapes of batches on an accelerator, such as `4x128,1x512`; without them a few that suit the rows."""
    steps: int | None = None
    """Optimizer steps; excludes `epochs`."""
    epochs: float | None = None
    """Passes over the rows; 3 when neither steps nor epochs is given."""
    batch_size: int = 4
    """Rows of a batch; no pass through the model takes more memory than so many of the longest rows."""
    gradient_accumulation_steps: int = 1
    """Batches an optimizer step."""
    packing: bool = True
    """Put several rows into one sequence, where none sees another; otherwise each is padded."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global 2-norm; 0 switches clipping off."""
    seed: int = 0
    """Seeds the order of the rows and the first LoRA A matrices."""
    shuffle: bool = True
    """Draw the rows in a new seeded order every epoch."""
    truncate: bool = False
    """Cut rows that are longer than the bundle's maximum; without it they are left out and counted."""
    raw_prompts: bool = False
    """Take prompt and completion as they are; otherwise they go through the model's chat template."""
    content_as_text: bool = False
    """Take control tokens that a message spells as text; otherwise they steer the model."""
    init_adapter: Path | None = None
    """A PEFT folder to start from."""
    force: bool = False
    """Replace an adapter that is already there."""


DEFAULT_EPOCHS = 3.0
"""What `TrainConfig` means by neither steps nor epochs."""


@dataclass(frozen=True)
class ExportConfig:
    """What `edgetune export` writes."""

    merge: bool = True
    """Fold the adapter into the weights; otherwise keep it beside the base as an `.onnx_adapter`."""
    precision: Precision = "fp32"
    """Weights of a merged model. A merge into int4 can lose what was learnt: it is measured."""
    least_kept: float = 0.95
    """Share of what was learnt that a merged model must keep, by the answer losses; below it nothing is written. 0
    accepts any."""
    unmeasured: bool = False
    """Measure no answer loss, even where there are rows; a merge into int4 without rows has to be asked for so."""
    threads: int | None = None
    """How many threads compute; without it as many as the process may use."""
    force: bool = False
    """Replace a model that is already there."""


@dataclass(frozen=True)
class GenerateConfig:
    """How `edgetune generate` answers."""

    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    raw: bool = False
    """Go on with the prompt as it is, without the chat template."""
    content_as_text: bool = False
    """Take control tokens that the prompt spells as text; otherwise they steer the model."""
    threads: int | None = None
    """How many threads compute; without it as many as the process may use."""


@dataclass(frozen=True)
class TargetConfig:
    """What `edgetune ship` lays out."""

    adapter: Path | None = None
    """A PEFT folder that the app starts from; otherwise one that changes nothing yet."""
    force: bool = False
    """Replace a target that is already there."""


@dataclass(frozen=True)
class EvaluateConfig:
    """How `edgetune eval` measures."""

    truncate: bool = False
    """Cut rows that are longer than the bundle's maximum; without it they are left out and counted."""
    raw_prompts: bool = False
    """Take prompt and completion as they are; otherwise they go through the model's chat template."""
    content_as_text: bool = False
    """Take control tokens that a message spells as text; otherwise they steer the model."""
    threads: int | None = None
    """How many threads compute; without it as many as the process may use."""
