"""Timing of training steps, the same for every contestant, and the optimizer that all of them use."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

from benchmarks.experiments import Training
from benchmarks.flops import step_flops

LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0
"""AdamW without weight decay, gradients clipped to this norm, whoever trains."""


def time_steps(experiment: Training, step: Callable[[], float], opened: float) -> dict[str, float]:
    """Run the steps of an experiment.

    Args:
        experiment: How many, of what.
        step: Does one step and returns its loss, before the update.
        opened: Seconds that it took to get here.

    Returns:
        Quantities by name. Times are medians over the steps after the first.

    Raises:
        ValueError: The loss did not fall, so that this was no training.
    """
    losses, seconds = [], []
    for _ in range(1 + experiment.steps):
        begin = perf_counter()
        losses.append(step())
        seconds.append(perf_counter() - begin)
    # Every step sees the same rows.
    if not losses[-1] < losses[0]:
        raise ValueError(f"the loss of the same rows does not fall: {losses}")
    workload = experiment.workload
    usual = median(seconds[1:])
    return {
        "tokens_per_second": workload.tokens / usual,
        "step_seconds": usual,
        "first_step_seconds": seconds[0],
        "open_seconds": opened,
        "flops_per_second": step_flops(workload.model, workload.rows, workload.length) / usual,
        "first_loss": losses[0],
    }
