"""What executes a training step: one file a runtime, one table of them.

A runtime opens a bundle and gives a session with few methods; the training loop knows nothing else of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from edgetune.bundle import Bundle
from edgetune.config import RuntimeName
from edgetune.data.batches import Batch
from edgetune.errors import UsageError
from edgetune.execution import WHOLE_STEP, ExecutionPlan

Parameters = Mapping[str, NDArray[np.float32]]
"""LoRA parameters by name, as `Lora.shapes` lists them."""


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
    """Mean over the trained tokens of all micro-batches, before the update."""
    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    applied: bool
    """False when loss or gradient is not finite: then nothing was changed."""


class Session(Protocol):
    """A model in training."""

    def step(self, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over micro-batches whose gradients are averaged by trained token."""
        ...

    def evaluate(self, batch: Batch) -> float:
        """Mean loss over the trained tokens of a batch; changes nothing."""
        ...

    def adapter(self) -> Parameters:
        """A copy of the LoRA parameters."""
        ...


class Runtime(Protocol):
    """A module of this package."""

    def version(self) -> str:
        """Package and version that execute the steps, such as `onnxruntime 1.31.1`."""
        ...

    def open_session(
        self, bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig, plan: ExecutionPlan = WHOLE_STEP
    ) -> AbstractContextManager[Session]:
        """Load the bundle's graphs and start from `parameters` with a fresh optimizer."""
        ...


RUNTIMES: dict[str, str] = {
    "onnxruntime": "edgetune.runtimes.stock",
    "ort-training": "edgetune.runtimes.ort_training",
}
"""Every runtime and the module that implements `Runtime`; `auto` takes the first."""


def find_runtime(name: RuntimeName) -> tuple[str, Runtime]:
    """The runtime called `name` and the name that `auto` stands for.

    Raises:
        UsageError: There is no such runtime.
    """
    chosen = next(iter(RUNTIMES)) if name == "auto" else name
    if chosen not in RUNTIMES:
        raise UsageError(f"runtime {name!r} is unknown; choose auto, {', '.join(RUNTIMES)}")
    return chosen, cast(Runtime, import_module(RUNTIMES[chosen]))
