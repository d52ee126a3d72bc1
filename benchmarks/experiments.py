"""What one fresh process measures, and of whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.models import Model
from benchmarks.ragged_rows import RowKind
from edgetune.config import Base, NpuKind, PlanName, TrainingPrecision

Dtype = Literal["fp32", "bf16", "int8"]
GemmLibrary = Literal["torch", "onnxruntime", "openvino"]


@dataclass(frozen=True)
class Edgetune:
    """edgetune with a runtime and a plan."""

    runtime: str
    plan: PlanName = "auto"
    precision: TrainingPrecision = "auto"
    trunk: bool = False
    """Whether the bundle's trunk computes the lowest layers."""
    memory_budget: str | None = None
    """What the planner may use, such as `2.5GB`."""
    base: Base = "int4"
    """How the bundle stores the frozen weights."""
    quantiser: str | None = None
    """How they are rounded; as `prepare` does it by itself without one."""
    npu: NpuKind = "none"
    """The step for NPUs that the bundle has beside the others."""
    dora: bool = False
    """Whether the bundle's slots have magnitudes."""

    def __str__(self) -> str:
        """As tables call it."""
        budget = f"within {self.memory_budget}" if self.memory_budget else None
        chosen = [choice for choice in (self.plan, self.precision) if choice != "auto"]
        words = [f"edgetune {self.runtime}", *chosen, "split" if self.trunk else None, budget, f"{self.base} base"]
        further = [self.quantiser, f"--npu {self.npu}" if self.npu != "none" else None, "DoRA" if self.dora else None]
        return ", ".join(filter(None, [*words, *further]))


@dataclass(frozen=True)
class PyTorch:
    """PyTorch + transformers + PEFT."""

    dtype: Literal["fp32", "bf16"]
    """Of the frozen weights and the computation."""
    checkpointing: bool
    """Gradient checkpointing: every layer is computed again in the backward pass."""
    bf16_adapter: bool = False
    """Train LoRA parameters in bf16, against PEFT's default of fp32: with its 8 bits small updates are lost."""

    def __str__(self) -> str:
        """As tables call it."""
        extras = (" + checkpointing" if self.checkpointing else "") + (", bf16 adapter" if self.bf16_adapter else "")
        return f"PyTorch {self.dtype}{extras}"


Contestant = Edgetune | PyTorch


@dataclass(frozen=True)
class Workload:
    """Random rows of one length, all tokens trained."""

    model: Model
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length

    def __str__(self) -> str:
        """As tables call it."""
        return f"{self.model.name}, {self.rows} × {self.length} tokens"


@dataclass(frozen=True)
class Training:
    """Training steps: their time, and the process's memory."""

    contestant: Contestant
    workload: Workload
    steps: int
    """Steps that are timed, after a first one that is not."""

    def __str__(self) -> str:
        """As tables call it."""
        return f"{self.contestant}: {self.workload}"


Layout = Literal["padded", "packed", "shared"]
"""Rows alone in their sequences, behind each other, or so with their common prefix once."""


@dataclass(frozen=True)
class RaggedTraining:
    """Optimizer steps over rows of very different lengths, or with a common prefix."""

    contestant: Edgetune
    model: Model
    layout: Layout
    rows: RowKind = "ragged"

    def __str__(self) -> str:
        """As tables call it."""
        return f"{self.contestant}: {self.model.name}, {self.rows} rows {self.layout}"


@dataclass(frozen=True)
class Epochs:
    """A few steps, again and again, with some of the layers trained."""

    contestant: Edgetune
    workload: Workload
    """Of a step."""
    layers: str | None
    """Those that are trained; all without them."""
    kept: bool = True
    """Whether what enters the lowest of them is kept for the next epoch."""

    def __str__(self) -> str:
        """As tables call it."""
        layers = "all layers" if self.layers is None else f"layers {self.layers}"
        kept = "" if self.layers is None else f", lower ones {'once' if self.kept else 'in every epoch'}"
        return f"{self.contestant}: {self.workload}, {layers}{kept}"


@dataclass(frozen=True)
class RowLosses:
    """Losses of the same rows, in a layout against padded, row by row."""

    contestant: Edgetune
    model: Model
    layout: Layout = "packed"
    rows: RowKind = "ragged"

    def __str__(self) -> str:
        """As tables call it."""
        return f"losses a row, {self.rows} rows {self.layout} against padded, {self.contestant}: {self.model.name}"


@dataclass(frozen=True)
class GradientCosine:
    """Cosine between the LoRA gradients of two edgetune contestants, tensor by tensor."""

    contestant: Edgetune
    exact: Edgetune
    workload: Workload

    def __str__(self) -> str:
        """As tables call it."""
        return f"gradients of {self.contestant} against {self.exact}: {self.workload}"


@dataclass(frozen=True)
class DemoLoss:
    """Validation loss after training on the demo's rows."""

    contestant: Edgetune
    learning_rate: float | None = None
    """Another than the demo's."""

    def __str__(self) -> str:
        """As tables call it."""
        rate = "" if self.learning_rate is None else f", learning rate {self.learning_rate:g}"
        return f"{self.contestant}: the demo{rate}"


@dataclass(frozen=True)
class Precision:
    """Loss and LoRA gradients of one step, held to those of another contestant.

    On the real model: four rows, by an adapter that was trained for a few steps. On a random one: random rows and
    adapters.
    """

    contestant: Edgetune
    exact: Edgetune
    model: Model

    def __str__(self) -> str:
        """As tables call it."""
        return f"a step of {self.contestant} against {self.exact}: {self.model.name}"


@dataclass(frozen=True)
class Ranges:
    """The largest numbers of a model's own forward pass in float32."""

    model: Model

    def __str__(self) -> str:
        """As tables call it."""
        return f"ranges: {self.model.name}"


@dataclass(frozen=True)
class RealLoss:
    """Validation loss of the real model, before and after training."""

    contestant: Edgetune
    model: Model
    steps: int = 105
    """Of training; with none the base alone is measured."""

    def __str__(self) -> str:
        """As tables call it."""
        return f"{self.contestant}: {self.model.name}, {self.steps} steps"


@dataclass(frozen=True)
class Job:
    """What a person does: the real model learns a task from a few rows; edgetune with nothing but a runtime said."""

    contestant: Contestant
    model: Model
    learning_rate: float | None = None
    """The highest; edgetune chooses its own without it."""

    def __str__(self) -> str:
        """As tables call it."""
        rate = "" if self.learning_rate is None else f", learning rate {self.learning_rate:g}"
        return f"the job, {self.contestant}{rate}: {self.model.name}"


@dataclass(frozen=True)
class Preparing:
    """`edgetune prepare` of a model."""

    model: Model
    base: Base = "int4"

    def __str__(self) -> str:
        """As tables call it."""
        return f"edgetune prepare: {self.model.name}, {self.base} base"


@dataclass(frozen=True)
class StartUp:
    """A second `edgetune train`: from the start of the process to the end of its first step."""

    contestant: Edgetune
    workload: Workload

    def __str__(self) -> str:
        """As tables call it."""
        return f"second edgetune train, {self.contestant}: {self.workload}"


@dataclass(frozen=True)
class GemmLimit:
    """The speed of one library's matrix product: (m, k) times (k, n)."""

    library: GemmLibrary
    dtype: Dtype
    m: int
    k: int
    n: int

    def __str__(self) -> str:
        """As tables call it."""
        return f"{self.library} {self.dtype}, {self.m} × {self.k} × {self.n}"


Experiment = (
    Training
    | RaggedTraining
    | Epochs
    | RowLosses
    | GradientCosine
    | DemoLoss
    | Precision
    | Ranges
    | RealLoss
    | Job
    | Preparing
    | StartUp
    | GemmLimit
)
