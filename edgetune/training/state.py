"""A run from its plan to what it has learnt: what is fixed before the first step, and what the steps change."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgetune.config import TrainConfig
from edgetune.errors import IncompatibleError
from edgetune.formats.adapter import read_adapter
from edgetune.formats.bundle import Bundle
from edgetune.formats.row_norms import read_row_norms
from edgetune.model.lora import Lora, Parameters, initial_parameters
from edgetune.planning.fit import Fit
from edgetune.planning.rows import RunRows
from edgetune.planning.run import RunRequest
from edgetune.runtimes.placement import Placement
from edgetune.training.observer import Execution
from edgetune.training.record import peak_memory_bytes


@dataclass(frozen=True)
class PlannedRun:
    """What is fixed before the model is loaded."""

    bundle: Bundle
    config: TrainConfig
    """Its options as they hold on this machine, for the loop and the record."""
    request: RunRequest
    """The same, parsed."""
    rows: RunRows
    fit: Fit

    @property
    def lora(self) -> Lora:
        """The slots that are trained: those above the trunk."""
        return self.bundle.manifest.lora.from_layer(self.fit.choice.plan.trunk_layers)

    @property
    def execution(self) -> Execution:
        """How it is executed."""
        choice = self.fit.choice
        return Execution(choice.name, str(choice.plan), self.fit.workload.pass_rows, choice.predicted_peak_bytes)

    def trained_names(self) -> list[str]:
        """The parameters that steps change."""
        return [slot.b for slot in self.lora.slots] if self.request.forward_only else list(self.lora.shapes())


@dataclass
class RunState:
    """What a run has come to so far."""

    first: dict[str, NDArray[np.float32]]
    """Values of the parameters before the first step; empty once a session has its own."""
    steps: int = 0
    """Steps that were applied."""
    final_loss: float = math.nan
    """Of the last of them."""
    validation_losses: list[float] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    """Of the graphs that an accelerator has compiled so far."""
    seconds: float = 0.0
    """Wall time of the steps and validations."""
    peak_memory_bytes: int | None = None
    """Highest resident memory; none where the system does not tell."""
    stopped: str = ""
    """Why the run ended early; empty when it did not."""
    learnt: Parameters | None = None
    """The last values, once there are any to write."""

    def look_at_memory(self) -> int | None:
        """Take note of the peak while the worker of a session lives, whose memory counts as well; returns the peak."""
        found = [peak for peak in (self.peak_memory_bytes, peak_memory_bytes()) if peak is not None]
        self.peak_memory_bytes = max(found, default=None)
        return self.peak_memory_bytes


def first_state(run: PlannedRun) -> RunState:
    """The state before the first step: a new adapter, or the one that the run starts from.

    Raises:
        UsageError: That adapter is not there.
        IncompatibleError: It does not fit the bundle, or changes layers that the trunk computes.
        VerificationError: A file of it was changed.
    """
    manifest, start = run.bundle.manifest, run.config.init_adapter
    norms = read_row_norms(run.bundle)
    if start is None:
        parameters = initial_parameters(manifest.lora, run.config.seed, norms)
    else:
        parameters = read_adapter(start, manifest.lora, manifest.base, manifest.tokenizer, norms)
    trained = run.lora.shapes()
    lost = [slot for slot in manifest.lora.slots if slot.b not in trained and parameters[slot.b].any()]
    if lost:
        raise IncompatibleError(
            f"{start} changes {len(lost)} projections of the trunk, such as {lost[0].name}, and a trunk has no "
            "adapters; start from an adapter of the layers above, or train without --trunk"
        )
    return RunState({name: parameters[name] for name in trained})
