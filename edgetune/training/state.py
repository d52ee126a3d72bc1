"""A run from its plan to what it has learnt: what is fixed before the first step, and what the steps change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune.config import TrainConfig
from edgetune.errors import IncompatibleError
from edgetune.formats.bundle import Bundle
from edgetune.formats.row_norms import read_row_norms
from edgetune.model.learning_rate import FORWARD_ONLY_RATE, suitable_rate
from edgetune.model.lora import Lora, Parameters, initial_parameters
from edgetune.planning.fit import Fit
from edgetune.planning.rows import RunRows
from edgetune.planning.run import RunRequest
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.placement import Placement
from edgetune.training.observer import Execution
from edgetune.training.record import peak_memory_bytes
from edgetune.training.saved_run import Progress


@dataclass(frozen=True)
class PlannedRun:
    """What is fixed before the model is loaded."""

    bundle: Bundle
    config: TrainConfig
    """Its options as they hold on this machine, for the loop."""
    request: RunRequest
    """The same, parsed."""
    rows: RunRows
    fit: Fit

    @property
    def lora(self) -> Lora:
        """The slots that are trained."""
        return self.fit.choice.plan.trained_slots(self.bundle.manifest.lora)

    @cached_property
    def learning_rate(self) -> float:
        """The peak: what was asked for, or what suits the run."""
        config, steps = self.config, self.fit.workload.schedule.total_steps
        if config.learning_rate != "auto":
            return config.learning_rate
        if self.request.forward_only:
            return FORWARD_ONLY_RATE
        hidden = self.bundle.manifest.architecture.hidden_size
        return suitable_rate(hidden, self.lora, steps, config.lora_plus_ratio)

    @property
    def recorded(self) -> TrainConfig:
        """The options with what was chosen for them, for the record and for a run that goes on."""
        return replace(self.config, learning_rate=self.learning_rate)

    @property
    def execution(self) -> Execution:
        """How it is executed."""
        choice = self.fit.choice
        return Execution(choice.name, str(choice.plan), self.fit.workload.pass_rows, choice.predicted_peak_bytes)

    def keeping(self, folder: Path, spare_bytes: int) -> PlannedRun:
        """The same with what enters the lowest trained layer in a folder, if any of it is kept.

        Args:
            folder: Of the run, and of no other.
            spare_bytes: Room on its disk that the run needs for other things.
        """
        plan = self.fit.choice.plan
        if not isinstance(plan, LayeredPlan) or plan.states is None:
            return self
        plan = replace(plan, states=replace(plan.states, folder=folder, spare_bytes=spare_bytes))
        return replace(self, fit=replace(self.fit, choice=replace(self.fit.choice, plan=plan)))

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
    best_step: int | None = None
    """After which the validation loss was lowest; none before it was measured after a step."""
    best_loss: float = math.inf
    best: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """The parameters after that step, where the run keeps them."""
    worse: int = 0
    """Validations since then."""
    learnt: Parameters | None = None
    """The last values, or the best ones where these are asked for, once there are any to write."""

    def look_at_memory(self) -> int | None:
        """Take note of the peak while the worker of a session lives, whose memory counts as well; returns the peak."""
        found = [peak for peak in (self.peak_memory_bytes, peak_memory_bytes()) if peak is not None]
        self.peak_memory_bytes = max(found, default=None)
        return self.peak_memory_bytes


    @property
    def progress(self) -> Progress:
        """How far it came, without its arrays."""
        measured = self.best_step is not None
        return Progress(
            self.steps,
            self.final_loss,
            self.validation_losses,
            self.seconds,
            self.stopped,
            self.best_step,
            self.best_loss if measured else None,
            self.worse,
        )

    def take_up(self, progress: Progress, best: Mapping[str, NDArray[np.float32]]) -> None:
        """Be where an earlier run was, whose steps are not finished."""
        self.steps, self.final_loss, self.seconds = progress.steps, progress.final_loss, progress.seconds
        self.validation_losses = list(progress.validation_losses)
        self.best_step, self.worse, self.best = progress.best_step, progress.worse, dict(best)
        self.best_loss = math.inf if progress.best_loss is None else progress.best_loss


def first_state(run: PlannedRun, say: Callable[[str], None]) -> RunState:
    """The state before the first step: a new adapter, or the one that the run starts from.

    Args:
        run: The plan.
        say: Called with one line of text for each thing that is to be said of that adapter.

    Raises:
        UsageError: That adapter is not there.
        IncompatibleError: It does not fit the bundle, or changes layers that are not trained.
        VerificationError: A file of it was changed.
    """
    manifest, start = run.bundle.manifest, run.config.init_adapter
    if start is None:
        parameters = initial_parameters(manifest.lora, run.config.seed, read_row_norms(run.bundle))
    else:
        # Here, because most runs begin without one.
        from edgetune.importing import read_foreign

        foreign = read_foreign(start, run.bundle)
        for line in foreign.notices:
            say(line)
        parameters = foreign.parameters
    trained = run.lora.shapes()
    lost = [slot for slot in manifest.lora.slots if slot.b not in trained and parameters[slot.b].any()]
    if lost and run.config.layers is not None:
        raise IncompatibleError(
            f"{start} changes {len(lost)} projections of layers that this run does not train, such as {lost[0].name}; "
            f"start from an adapter of layers {run.config.layers}, or leave --layers out"
        )
    if lost:
        raise IncompatibleError(
            f"{start} changes {len(lost)} projections of the trunk, such as {lost[0].name}, and a trunk has no "
            "adapters; start from an adapter of the layers above, or train without --trunk"
        )
    return RunState({name: parameters[name] for name in trained})
