"""What a runtime is: the protocols and records that the loop and the planner know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batches import Batch
from edgetune.formats.bundle import Bundle
from edgetune.model.lora import Parameters
from edgetune.runtimes.execution import WHOLE_STEP, ExecutionPlan
from edgetune.runtimes.footprint import Footprint
from edgetune.runtimes.placement import Placement


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) as torch.optim.AdamW computes it; betas 0.9 and 0.999, epsilon 1e-8."""

    weight_decay: float
    max_grad_norm: float
    """Clip gradients to this global 2-norm, as torch.nn.utils.clip_grad_norm_ does; 0 switches clipping off."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    """Mean over the trained tokens of all passes, before the update."""
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    applied: bool
    """False when loss or gradient is not finite: then nothing was changed."""


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
    forward: bool = False
    """Whether it is a `ForwardRuntime`."""
    emulation: bool = False
    """Whether it simulates hardware for each product: nobody waits for the time that it takes."""


class Runtime(Protocol):
    """A module of this package."""

    def abilities(self) -> Abilities:
        """What it can execute.

        Raises:
            MissingDependencyError: Its package is not installed.
        """
        ...

    def version(self) -> str:
        """Package and version that execute the steps, such as `onnxruntime 1.31.1`."""
        ...

    def open_session(
        self, bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan = WHOLE_STEP
    ) -> AbstractContextManager[Session]:
        """Load the bundle's graphs and start from `parameters` with a fresh optimizer."""
        ...


class ForwardRuntime(Runtime, Protocol):
    """A runtime whose abilities say `forward`."""

    def open_forward(
        self, bundle: Bundle, parameters: Parameters, plan: ExecutionPlan
    ) -> AbstractContextManager[Forward]:
        """Load the bundle's forward graphs alone, with these parameters."""
        ...


class PlacingRuntime(Runtime, Protocol):
    """A runtime with an accelerator."""

    def place(self, bundle: Bundle, plan: ExecutionPlan, batch: int, length: int) -> list[Placement]:
        """Compile the graphs of a step for B sequences of T positions, and say where their nodes run.

        Raises:
            IncompatibleError: The accelerator does not take them, or not all of a graph where that was asked for.
            MissingDependencyError: The runtime's package is not installed.
        """
        ...


class ChoosingRuntime(PlacingRuntime, Protocol):
    """A runtime with devices of several kinds."""

    def has_device(self, kind: str) -> bool:
        """Whether there is one of a kind here, such as `NPU`.

        Raises:
            MissingDependencyError: The runtime's package is not installed.
        """
        ...


@runtime_checkable
class InstallingRuntime(Runtime, Protocol):
    """A runtime that installs something of its own on first use."""

    def install(self, notice: Callable[[str], None]) -> None:
        """See that it is there.

        Args:
            notice: Hears what is installed, and where.

        Raises:
            MissingDependencyError: It cannot be installed.
        """
        ...
