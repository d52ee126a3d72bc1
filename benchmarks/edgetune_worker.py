"""edgetune through the calls that its own training loop makes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from time import perf_counter
from typing import cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiments import Edgetune, GradientCosine, Training, Workload
from benchmarks.rows import random_rows
from benchmarks.training_steps import LEARNING_RATE, MAX_GRAD_NORM, time_steps
from edgetune.config import Method, RuntimeName, TrainConfig
from edgetune.data.batcher import Batcher
from edgetune.data.batches import Batch
from edgetune.data.encode import Example
from edgetune.devices.place import Place
from edgetune.formats.bundle import Bundle, load_bundle
from edgetune.formats.row_norms import read_row_norms
from edgetune.model.lora import Parameters, initial_parameters
from edgetune.planning.choice import Choice
from edgetune.planning.fit import Fit, Fitting
from edgetune.planning.options import resolve
from edgetune.runtimes import find_runtime
from edgetune.runtimes.contract import OptimizerConfig, Session, StepResult
from edgetune.runtimes.execution import ExecutionPlan

Gradients = dict[str, NDArray[np.float64]]


def fit(
    contestant: Edgetune,
    bundle: Bundle,
    rows: Sequence[Example],
    batch_size: int,
    *,
    packing: bool,
    share_prefixes: bool = True,
    method: Method = "backpropagation",
    layers: str | None = None,
    epochs: int = 1,
) -> Fit:
    """How `edgetune train` would run with the contestant's options: by which plan, in which passes.

    Args:
        contestant: Says runtime, plan and memory budget.
        bundle: What is trained.
        rows: On which, in their order.
        batch_size: Of them in a step.
        packing: Put several rows into one sequence.
        share_prefixes: There, compute once what rows begin with in common.
        method: How the gradient is found.
        layers: Those that are trained; all without them.
        epochs: How often the rows come.
    """
    config = TrainConfig(
        runtime=cast(RuntimeName, contestant.runtime),
        plan=contestant.plan,
        precision=contestant.precision,
        trunk=contestant.trunk,
        method=method,
        memory_budget=contestant.memory_budget,
        batch_size=batch_size,
        packing=packing,
        share_prefixes=share_prefixes,
        shuffle=False,
        layers=layers,
        epochs=epochs,
    )
    found = Fitting(bundle, rows, [], resolve(config, Place()).request).fit()
    for note in found.notes:
        print(note, file=sys.stderr)
    return found


def open_session(
    choice: Choice, bundle: Bundle, parameters: Parameters, optimizer: OptimizerConfig
) -> AbstractContextManager[Session]:
    """A session with what was chosen."""
    return choice.runtime.open_session(bundle, parameters, optimizer, choice.plan)


def measure_edgetune(experiment: Training, contestant: Edgetune, folder: Path) -> dict[str, float]:
    """Time training steps of a bundle. Opening it includes the verification of every byte."""
    begin = perf_counter()
    bundle = load_bundle(folder)
    fitted, batches = _fit(contestant, bundle, experiment.workload)
    parameters = initial_parameters(bundle.manifest.lora, 0, read_row_norms(bundle))
    with open_session(fitted.choice, bundle, parameters, OptimizerConfig(0.0, MAX_GRAD_NORM)) as session:
        opened = perf_counter() - begin
        # As `train` does: the session has its own.
        parameters.clear()
        found = time_steps(experiment, lambda: session.step(batches, LEARNING_RATE).loss, opened)
    predicted = fitted.choice.predicted_peak_bytes
    return found if predicted is None else {**found, "predicted_peak": float(predicted)}


def steps_once(contestant: Edgetune, workloads: Sequence[Workload], folder: Path, plan: ExecutionPlan) -> None:
    """Run one step of each workload by this very plan."""
    bundle = load_bundle(folder)
    parameters = initial_parameters(bundle.manifest.lora, 0, read_row_norms(bundle))
    runtime = find_runtime(contestant.runtime)
    with runtime.open_session(bundle, parameters, OptimizerConfig(0.0, MAX_GRAD_NORM), plan) as session:
        for workload in workloads:
            session.step([batch_of(bundle, workload)], LEARNING_RATE)


def measure_cosine(experiment: GradientCosine, folders: Mapping[Edgetune, Path]) -> dict[str, float]:
    """Compare the gradients of two contestants, one after the other, where A and B are both random.

    Args:
        experiment: The contestants.
        folders: Their bundles.
    """
    found, exact = (
        gradients(contestant, load_bundle(folders[contestant]), experiment.workload)
        for contestant in (experiment.contestant, experiment.exact)
    )
    cosines = [cosine(found[name], exact[name]) for name in exact]
    everything = cosine(*(np.concatenate([each[name].ravel() for name in exact]) for each in (found, exact)))
    return {"worst_cosine": min(cosines), "mean_cosine": float(np.mean(cosines)), "whole_cosine": everything}


def gradients(contestant: Edgetune, bundle: Bundle, workload: Workload) -> Gradients:
    """LoRA gradients of a workload where A and B are both random; see `gradients_at`."""
    found, batches = _fit(contestant, bundle, workload)
    return gradients_at(random_adapter(bundle), found.choice, bundle, batches)


def random_adapter(bundle: Bundle) -> Parameters:
    """A and B, both random."""
    generator = np.random.default_rng(1)
    return {
        name: array if ".lora_A." in name else (_B_SPREAD * generator.standard_normal(array.shape)).astype(np.float32)
        for name, array in initial_parameters(bundle.manifest.lora, 0, read_row_norms(bundle)).items()
    }


def gradients_at(before: Parameters, choice: Choice, bundle: Bundle, batches: Sequence[Batch]) -> Gradients:
    """LoRA gradients by name, up to one common factor, of any runtime: read off what a step does to the parameters.

    AdamW's first step without weight decay is −rate · g / (|g| + 1e-8). Clipped to a norm far below 1e-8, every |g| is
    nothing beside it, and the step is proportional to the gradient.

    Args:
        before: The parameters at which the gradients are taken; they are left alone.
        choice: Runtime and plan of the step.
        bundle: What is trained.
        batches: What goes through in each pass of the step.
    """
    return step_at(before, choice, bundle, batches)[1]


def step_at(
    before: Parameters, choice: Choice, bundle: Bundle, batches: Sequence[Batch]
) -> tuple[StepResult, Gradients]:
    """What a step says of itself, and its gradients; see `gradients_at`."""
    with open_session(choice, bundle, before, OptimizerConfig(0.0, _LINEAR_NORM)) as session:
        result = session.step(batches, _LINEAR_RATE)
        after = session.adapter()
    return result, {name: before[name].astype(np.float64) - after[name] for name in before}


_B_SPREAD = 0.02
"""Standard deviation of B. Where B is zero, as training starts, A has no gradient."""
_LINEAR_NORM = 1e-12
_LINEAR_RATE = 1e7
"""Moves the parameters by a norm of 1e3: they themselves are lost beside it, and so is the rounding of the sum."""


def _fit(contestant: Edgetune, bundle: Bundle, workload: Workload) -> tuple[Fit, list[Batch]]:
    """How the contestant fits, and the batches of its step."""
    found = fit(contestant, bundle, examples_of(workload), workload.rows, packing=False)
    return found, next(found.workload.steps())


def batch_of(bundle: Bundle, workload: Workload) -> Batch:
    """The rows of a step in one batch."""
    rows = examples_of(workload)
    (batch,) = Batcher(bundle.manifest, workload.length, workload.rows, packing=False).step([rows])
    return batch


def examples_of(workload: Workload) -> list[Example]:
    """Its random rows."""
    return [Example(line, ids, ids) for line, ids in enumerate(random_rows(workload).tolist(), 1)]


def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Of the angle between two arrays of one shape, each taken as one vector."""
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
