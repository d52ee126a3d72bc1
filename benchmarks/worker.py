"""The fresh process in which one experiment is measured: `python -m benchmarks.worker EXPERIMENT CACHE RESULT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.cache import Cache
from benchmarks.experiments import (
    Edgetune,
    Epochs,
    Experiment,
    GemmLimit,
    GradientCosine,
    Job,
    Precision,
    PyTorch,
    RaggedTraining,
    Ranges,
    RowLosses,
    Training,
)
from benchmarks.record import read_experiment
from edgetune.errors import EdgetuneError
from edgetune.formats.bundle import load_bundle


def measure(experiment: Experiment, cache: Cache) -> dict[str, float]:
    """Quantities by name.

    Raises:
        TypeError: This experiment is a command of its own, and not measured in a worker.
    """
    match experiment:
        case GemmLimit():
            from benchmarks.gemm_worker import measure_gemm

            return measure_gemm(experiment)
        case Training(contestant=PyTorch() as contestant, workload=workload):
            from benchmarks.pytorch_worker import measure_pytorch

            return measure_pytorch(experiment, contestant, cache.checkpoint(workload.model))
        case Training(contestant=Edgetune() as contestant, workload=workload):
            from benchmarks.edgetune_worker import measure_edgetune

            return measure_edgetune(experiment, contestant, cache.bundle(workload.model, contestant.base))
        case Job(contestant=PyTorch() as contestant, model=model):
            from benchmarks.pytorch_worker import measure_pytorch_job

            bundle = load_bundle(cache.bundle_for(Edgetune("onnxruntime"), model))
            return measure_pytorch_job(experiment, contestant, cache.checkpoint(model), bundle)
        case RaggedTraining(contestant=contestant, model=model):
            from benchmarks.ragged_worker import measure_ragged

            return measure_ragged(experiment, cache.bundle(model, contestant.base))
        case Epochs(contestant=contestant, workload=workload):
            from benchmarks.epochs_worker import measure_epochs

            return measure_epochs(experiment, cache.bundle(workload.model, contestant.base))
        case RowLosses(contestant=contestant, model=model):
            from benchmarks.ragged_worker import measure_row_losses

            return measure_row_losses(experiment, cache.bundle(model, contestant.base))
        case GradientCosine(workload=workload):
            from benchmarks.edgetune_worker import measure_cosine

            both = experiment.contestant, experiment.exact
            return measure_cosine(experiment, {each: cache.bundle(workload.model, each.base) for each in both})
        case Precision():
            from benchmarks.precision_worker import measure_precision

            return measure_precision(experiment, cache)
        case Ranges(model):
            from benchmarks.precision_worker import measure_ranges

            bundle = load_bundle(cache.bundle_for(Edgetune("onnxruntime"), model))
            return measure_ranges(model, cache.checkpoint(model), bundle)
    raise TypeError(f"{experiment} is not measured in a worker")


def main(experiment: str, cache: str, result: str) -> None:
    """Measure, and write the quantities as JSON; what edgetune refuses ends the process with its message."""
    try:
        quantities = measure(read_experiment(json.loads(experiment)), Cache(Path(cache)))
    except EdgetuneError as error:
        sys.exit(str(error).replace("\n", "; "))
    Path(result).write_text(json.dumps(quantities), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
