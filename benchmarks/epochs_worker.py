"""Several epochs over a few steps, with some of the layers trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time

import numpy as np

from benchmarks.edgetune_worker import examples_of, fit, open_session
from benchmarks.experiments import Epochs
from benchmarks.training_steps import LEARNING_RATE, MAX_GRAD_NORM
from edgetune.formats.bundle import load_bundle
from edgetune.model.lora import initial_parameters
from edgetune.runtimes.contract import OptimizerConfig
from edgetune.runtimes.execution import LayeredPlan

STEPS, EPOCHS = 2, 5
"""Steps of an epoch, and how often the rows come."""


def measure_epochs(experiment: Epochs, folder: Path) -> dict[str, float]:
    """Time all steps, without what the first one takes more than the second: graphs are compiled, weights unpacked."""
    bundle, workload = load_bundle(folder), experiment.workload
    rows = examples_of(replace(workload, rows=STEPS * workload.rows))
    fitted = fit(
        experiment.contestant,
        bundle,
        rows,
        workload.rows,
        packing=False,
        layers=experiment.layers,
        epochs=EPOCHS,
    )
    choice = fitted.choice
    if isinstance(choice.plan, LayeredPlan) and not experiment.kept:
        choice = replace(choice, plan=replace(choice.plan, states=None))
    parameters = initial_parameters(choice.plan.trained_slots(bundle.manifest.lora), seed=0)
    with open_session(choice, bundle, parameters, OptimizerConfig(0.0, MAX_GRAD_NORM)) as session:
        times, losses = [(perf_counter(), process_time())], []
        for batches in fitted.workload.steps():
            losses.append(session.step(batches, LEARNING_RATE).loss)
            times.append((perf_counter(), process_time()))
    seconds, processor = np.diff(np.array(times), axis=0)[[1, *range(1, len(losses))]].sum(axis=0).tolist()
    return {"seconds": seconds, "processor_seconds": processor, "loss": losses[-1]}
