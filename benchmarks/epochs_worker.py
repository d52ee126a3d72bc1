"""Several epochs over a few steps, with some of the layers trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time

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
    """Time all steps, the first one included."""
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
        begin, computed = perf_counter(), process_time()
        losses = [session.step(batches, LEARNING_RATE).loss for batches in fitted.workload.steps()]
        seconds, processor = perf_counter() - begin, process_time() - computed
    return {"seconds": seconds, "processor_seconds": processor, "loss": losses[-1]}
