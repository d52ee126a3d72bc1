"""What a runtime is: the record of its functions, and the sessions that these open."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batches import Batch
from edgetune.formats.bundle import Bundle
from edgetune.model.lora import Parameters
from edgetune.runtimes.execution import ExecutionPlan, WholePlan
from edgetune.runtimes.footprint import Footprint
from edgetune.runtimes.placement import Placement


@dataclass(frozen=True)
class OptimizerConfig:
    """What a step is told beside its learning rate; AdamW's other constants are in `edgetune.model.adamw`."""

    weight_decay: float
    max_grad_norm: float
    """Clip gradients to this global 2-norm, as torch.nn.utils.clip_grad_norm_ does; 0 switches clipping off."""
    lora_plus_ratio: float = 1.0
    """The learning rate of B matrices, divided by that of all else (LoRA+, Hayou et al. 2024)."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    """Mean over the trained tokens of all passes, before the update."""
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    applied: bool
    """False when loss or gradient is not finite: then nothing was changed."""


SessionState = Mapping[str, NDArray[Any]]
"""All that the next step depends on beside its batches: parameters, moments and counters, under the session's own
names. A number is an array of no dimensions."""


class Session(Protocol):
    """A model in training."""

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over the batches of its passes, whose gradients are averaged by trained token."""
        ...

    def evaluate(self, batch: Batch) -> float:
        """Mean loss over the trained tokens of a batch; changes nothing."""
        ...

    def adapter(self) -> Parameters:
        """The LoRA parameters; arrays that the next step may change."""
        ...

    def state(self) -> SessionState:
        """Between two steps, what `restore` takes; arrays that the next step may change."""
        ...

    def restore(self, state: SessionState) -> None:
        """Go on where a session of the same plan and parameters was when it gave this state; arrays are copied."""
        ...


class Forward(Protocol):
    """A model that runs forward and no other way: all that training with estimated gradients takes."""

    def set_parameter(self, name: str, values: NDArray[np.float32]) -> None:
        """Give a LoRA parameter other values; they are copied, and hold until they are set again."""
        ...

    def evaluate(self, batch: Batch) -> float:
        """Mean loss over the trained tokens of a batch."""
        ...


@runtime_checkable
class Placed(Protocol):
    """A session or forward pass whose graphs are divided between an accelerator and the CPU."""

    def placements(self) -> list[Placement]:
        """Where the graphs run that were compiled so far."""
        ...


@runtime_checkable
class Recalling(Protocol):
    """A session or forward pass that keeps what enters its lowest trained layer, where its plan says so."""

    def recall(self, batch: Batch) -> None:
        """Keep what enters that layer, as if the batch came; of rows of which it is kept nothing is done."""
        ...

    def notices(self) -> list[str]:
        """What is to be said of it since this was asked last."""
        ...


@dataclass(frozen=True)
class Abilities:
    """What a runtime can execute on this machine."""

    whole: bool
    """The whole step as one graph, whatever the shape of a batch."""
    exact: Footprint | None
    """The layered form with products that are as exact as the processor multiplies at full speed."""
    int8: Footprint | None
    """The layered form with int8 products."""
    preferred: bool
    """Whether `auto` may take it here."""
    emulation: bool = False
    """Whether it simulates hardware for each product: nobody waits for the time that it takes."""


@dataclass(frozen=True)
class Runtime:
    """What executes training steps: the functions of a module of this package. Those that it lacks are none."""

    abilities: Callable[[], Abilities]
    """What it can execute. Raises MissingDependencyError where its package is not installed."""
    version: Callable[[], str]
    """Package and version that execute the steps, such as `onnxruntime 1.31.1`."""
    open_session: Callable[[Bundle, Parameters, OptimizerConfig, ExecutionPlan], AbstractContextManager[Session]]
    """Loads the bundle's graphs and starts from these parameters with a fresh optimizer."""
    open_forward: Callable[[Bundle, Parameters, ExecutionPlan], AbstractContextManager[Forward]] | None = None
    """Loads the bundle's forward graphs alone, with these parameters."""
    place: Callable[[Bundle, WholePlan, int, int], list[Placement]] | None = None
    """Compiles the graphs of a step for so many sequences of so many positions, and says where their nodes run. Raises
    IncompatibleError where the accelerator does not take them, or not all of a graph where that was asked for."""
    has_device: Callable[[str], bool] | None = None
    """Of a runtime with devices of several kinds: whether there is one of a kind here, such as `NPU`. Raises
    MissingDependencyError where its package is not installed."""
    install: Callable[[Callable[[str], None]], None] | None = None
    """Sees that what it installs on first use is there; the function that it is given is called with a line of text
    that says what is installed, and where. Raises MissingDependencyError where it cannot be installed."""
