"""edgetune through the calls that its own training loop makes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from time import perf_counter
from typing import cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiments import Edgetune, GradientCosine, Training, Workload
from benchmarks.rows import random_rows
from benchmarks.training_steps import LEARNING_RATE, MAX_GRAD_NORM, time_steps
from edgetune.adapter import initial_parameters
from edgetune.bundle import Bundle, open_bundle
from edgetune.config import RuntimeName
from edgetune.data.batcher import Batcher
from edgetune.data.batches import Batch
from edgetune.data.encode import Example
from edgetune.errors import MissingDependencyError
from edgetune.execution import ExecutionPlan
from edgetune.runtimes import OptimizerConfig, Parameters, Session, find_runtime

Gradients = dict[str, NDArray[np.float64]]
PLANS: dict[str | None, ExecutionPlan] = {
    None: ExecutionPlan("whole"),
    "recompute": ExecutionPlan("layered"),
    "streaming": ExecutionPlan("layered", resident=False),
    "int8": ExecutionPlan("layered", products="int8"),
}
"""Plans by the names that contestants give."""


def open_session(
    contestant: Edgetune, bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig
) -> AbstractContextManager[Session]:
    """A session with the contestant's runtime and plan: the one place that asks edgetune for one.

    Raises:
        MissingDependencyError: This edgetune has no such runtime or plan.
    """
    if contestant.plan not in PLANS or contestant.memory_budget is not None:
        known = ", ".join(filter(None, PLANS))
        raise MissingDependencyError(f"this edgetune has no planner, and of plans only {known}")
    _, runtime = find_runtime(cast(RuntimeName, contestant.runtime))
    return runtime.open_session(bundle, parameters, optimizer, PLANS[contestant.plan])


def measure_edgetune(experiment: Training, contestant: Edgetune, folder: Path) -> dict[str, float]:
    """Time training steps of a bundle. Opening it includes the verification of every byte."""
    begin = perf_counter()
    bundle = open_bundle(folder)
    batch = _batch(bundle, experiment.workload)
    parameters = initial_parameters(bundle.manifest.lora, seed=0)
    with open_session(contestant, bundle, parameters, OptimizerConfig(0.0, MAX_GRAD_NORM)) as session:
        return time_steps(experiment, lambda: session.step([batch], LEARNING_RATE).loss, opened=perf_counter() - begin)


def measure_cosine(experiment: GradientCosine, folders: Mapping[Edgetune, Path]) -> dict[str, float]:
    """Compare the gradients of two contestants, one after the other, where A and B are both random.

    Args:
        experiment: The contestants.
        folders: Their bundles.
    """
    found, exact = (
        gradients(contestant, open_bundle(folders[contestant]), experiment.workload)
        for contestant in (experiment.contestant, experiment.exact)
    )
    cosines = [_cosine(found[name], exact[name]) for name in exact]
    everything = _cosine(*(np.concatenate([each[name].ravel() for name in exact]) for each in (found, exact)))
    return {"worst_cosine": min(cosines), "mean_cosine": float(np.mean(cosines)), "whole_cosine": everything}


def gradients(contestant: Edgetune, bundle: Bundle, workload: Workload) -> Gradients:
    """LoRA gradients by name, up to one common factor, of any runtime: read off what a step does to the parameters.

    AdamW's first step without weight decay is −rate · g / (|g| + 1e-8). Clipped to a norm far below 1e-8, every |g| is
    nothing beside it, and the step is proportional to the gradient.
    """
    generator = np.random.default_rng(1)
    before = {
        name: array if ".lora_A." in name else (_B_SPREAD * generator.standard_normal(array.shape)).astype(np.float32)
        for name, array in initial_parameters(bundle.manifest.lora, seed=0).items()
    }
    with open_session(contestant, bundle, before, OptimizerConfig(0.0, max_grad_norm=_LINEAR_NORM)) as session:
        session.step([_batch(bundle, workload)], _LINEAR_RATE)
        after = session.adapter()
    return {name: before[name].astype(np.float64) - after[name] for name in before}


_B_SPREAD = 0.02
"""Standard deviation of B. Where B is zero, as training starts, A has no gradient."""
_LINEAR_NORM = 1e-12
_LINEAR_RATE = 1e7
"""Moves the parameters by a norm of 1e3: they themselves are lost beside it, and so is the rounding of the sum."""


def _batch(bundle: Bundle, workload: Workload) -> Batch:
    rows = [Example(line, ids, ids) for line, ids in enumerate(random_rows(workload).tolist(), 1)]
    (batch,) = Batcher(bundle.manifest, rows, workload.rows, packing=False).step([rows])
    return batch


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
