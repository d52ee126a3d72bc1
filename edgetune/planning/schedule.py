"""How far a run goes, and its learning rate on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from edgetune.config import ENOUGH_STEPS, FEWEST_EPOCHS, MOST_EPOCHS, Schedule
from edgetune.errors import UsageError
from edgetune.planning.run import RunRequest


def learning_rate(schedule: Schedule, peak: float, step: int, total_steps: int, warmup_steps: int) -> float:
    """Learning rate of one optimizer step, as transformers' `get_scheduler` gives it.

    Args:
        schedule: Shape after warm-up: stays at `peak`, falls to zero linearly, or along half a cosine.
        peak: Highest learning rate.
        step: Optimizer steps done before this one.
        total_steps: Steps of the whole run.
        warmup_steps: Steps over which the rate rises linearly; the first has rate zero when there are any.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class StepSchedule:
    """Which batches of rows go into which optimizer step. An epoch's last step takes what is left of the epoch."""

    batches_per_epoch: int
    gradient_accumulation_steps: int
    steps_per_epoch: int
    total_steps: int
    eval_steps: int | None = None
    """Steps between two validations; none where epochs are."""

    def batches(self, step: int) -> int:
        """Batches of the step after `step` finished ones."""
        done = step % self.steps_per_epoch * self.gradient_accumulation_steps
        return min(self.gradient_accumulation_steps, self.batches_per_epoch - done)

    def validates_after(self, step: int) -> bool:
        """Whether validation loss is due after `step` steps: at the end, each `eval_steps`, or each of two epochs."""
        return step == self.total_steps or (step % self._between == 0 and self._validates_between)

    def validations(self) -> int:
        """How often validation loss is due: before the first step, and after those of `validates_after`."""
        return 2 if not self._validates_between else 1 + math.ceil(self.total_steps / self._between)

    @property
    def _between(self) -> int:
        return self.eval_steps or self.steps_per_epoch

    @property
    def _validates_between(self) -> bool:
        return self.eval_steps is not None or self.total_steps >= 2 * self.steps_per_epoch


def schedule_steps(rows: int, request: RunRequest) -> StepSchedule:
    """Count the steps of a run over `rows` rows.

    Raises:
        UsageError: Warm-up takes the whole run, so that the learning rate never gets to its peak.
    """
    batching, length = request.batching, request.length
    batches = math.ceil(rows / batching.batch_size)
    steps_per_epoch = math.ceil(batches / batching.gradient_accumulation_steps)
    epochs = _enough_epochs(steps_per_epoch) if length.epochs is None else length.epochs
    total = _steps_of(epochs, steps_per_epoch) if length.steps is None else length.steps
    if length.warmup_steps >= total:
        raise UsageError(
            f"warmup_steps is {length.warmup_steps}, but the run has {total} steps in all; "
            f"use fewer than {total}, or more steps or epochs"
        )
    return StepSchedule(batches, batching.gradient_accumulation_steps, steps_per_epoch, total, length.eval_steps)


def _enough_epochs(steps_per_epoch: int) -> float:
    """How often to go through the rows where nobody says it: the fewer there are, the more often."""
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, math.ceil(ENOUGH_STEPS / steps_per_epoch)))


def _steps_of(epochs: float, steps_per_epoch: int) -> int:
    """Steps that are not fewer than `epochs`, taken as it was written: as a float, 0.07 · 100 is more than 7."""
    return math.ceil(Fraction(str(epochs)) * steps_per_epoch)
