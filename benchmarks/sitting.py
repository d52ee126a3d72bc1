"""One sitting: every experiment in processes of its own, contestants in turn, so that a slow hour hits them all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from benchmarks.cache import Cache
from benchmarks.cases import LIMITS, Case, Series
from benchmarks.commands import measure_demo_loss, measure_job, measure_preparing, measure_real_loss, measure_start_up
from benchmarks.experiments import (
    DemoLoss,
    Edgetune,
    Epochs,
    Experiment,
    GradientCosine,
    Job,
    Precision,
    Preparing,
    PyTorch,
    RaggedTraining,
    Ranges,
    RealLoss,
    RowLosses,
    StartUp,
    Training,
)
from benchmarks.process import ProcessError, run_watched
from benchmarks.record import Outcome, write_experiment

ONCE = (RowLosses, GradientCosine, Precision, Ranges, RealLoss, Job, Preparing)
"""Experiments that give the same figures again, or take too long for more than one run."""


class Progress(Protocol):
    """Hears what a sitting does."""

    def begin(self, experiment: Experiment, run: int) -> None:
        """A process is about to start."""
        ...

    def end(self) -> None:
        """It has ended, or is not needed any more."""
        ...

    def say(self, text: str) -> None:
        """Something takes a while."""
        ...


def experiments_of(cases: Iterable[Case], series: Iterable[Series]) -> list[Experiment]:
    """All that has to be measured, each once, the machine's limits first."""
    named = [experiment for case in cases for experiment in (*case.ours, *case.against, *case.beside)]
    drawn = [experiment for each in series for line in each.lines for _, experiment in line.points]
    return list(dict.fromkeys([*LIMITS, *named, *drawn]))


def rounds(experiments: Sequence[Experiment], runs: int) -> list[tuple[int, Experiment]]:
    """Run number and experiment in the order of measuring: what shares a workload takes turns, A B A B."""
    groups: dict[object, list[Experiment]] = {}
    for experiment in experiments:
        alike = experiment.workload if isinstance(experiment, Training) else type(experiment)
        groups.setdefault(alike, []).append(experiment)
    return [
        (run, experiment)
        for group in groups.values()
        for run in range(runs)
        for experiment in group
        if run == 0 or not isinstance(experiment, ONCE)
    ]


def hold_sitting(
    order: Sequence[tuple[int, Experiment]], cache: Cache, progress: Progress, keep: Callable[[list[Outcome]], object]
) -> list[Outcome]:
    """Measure. An experiment that fails is not tried again; the others go on.

    Args:
        order: What `rounds` gives.
        cache: Where checkpoints and bundles are, or will be.
        progress: Hears what happens.
        keep: Is given all that there is after each measurement: a sitting takes hours, and may be ended early.
    """
    outcomes: dict[Experiment, Outcome] = {experiment: Outcome(experiment) for _, experiment in order}
    for run, experiment in order:
        outcome = outcomes[experiment]
        if not outcome.failure:
            progress.begin(experiment, run)
            try:
                _provide(experiment, cache, progress.say)
                outcome.samples.append(_measure(experiment, cache, run))
            except (ProcessError, RuntimeError) as error:
                outcome.failure = str(error)
                progress.say(f"{experiment} not run: {error}")
            keep(list(outcomes.values()))
        progress.end()
    return list(outcomes.values())


def _provide(experiment: Experiment, cache: Cache, say: Callable[[str], None]) -> None:
    """Make what an experiment reads, unless it is there."""
    match experiment:
        case Training(contestant=PyTorch(), workload=workload):
            cache.make_checkpoint(workload.model, say)
        case Preparing():
            cache.make_checkpoint(experiment.model, say)
        case (
            Training(contestant=Edgetune() as contestant, workload=workload)
            | StartUp(contestant, workload)
            | Epochs(contestant, workload)
        ):
            cache.make_bundle(workload.model, contestant.base, say)
        case RaggedTraining(contestant, model) | RowLosses(contestant, model):
            cache.make_bundle(model, contestant.base, say)
        case GradientCosine(contestant, exact, workload):
            for each in (contestant, exact):
                cache.make_bundle(workload.model, each.base, say)
        case Precision(contestant, exact, model):
            for each in (contestant, exact):
                cache.make_bundle_for(each, model, say)
            if model.trained:
                cache.make_adapter(model, say)
        case Ranges(model):
            cache.make_bundle_for(Edgetune("onnxruntime"), model, say)
        case RealLoss(contestant, model):
            cache.make_bundle_for(contestant, model, say)
        case Job(contestant=contestant, model=model):
            # PyTorch's rows are those of edgetune's tokenizer and template.
            bundled = contestant if isinstance(contestant, Edgetune) else Edgetune("onnxruntime")
            cache.make_bundle_for(bundled, model, say)
            cache.make_checkpoint(model, say)
        case DemoLoss(contestant=contestant):
            cache.make_demo_bundle(contestant, say)


def _measure(experiment: Experiment, cache: Cache, run: int) -> dict[str, float]:
    match experiment:
        case Preparing():
            return measure_preparing(experiment, cache)
        case StartUp():
            return measure_start_up(experiment, cache)
        case RealLoss():
            return measure_real_loss(experiment, cache)
        case Job(contestant=Edgetune() as contestant):
            return measure_job(experiment, contestant, cache)
        case DemoLoss():
            # Seeds differ by more than plans do: every run has its own.
            return measure_demo_loss(experiment, cache, seed=run)
    with TemporaryDirectory() as scratch:
        result = Path(scratch) / "quantities.json"
        plain = json.dumps(write_experiment(experiment))
        finished = run_watched([sys.executable, "-m", "benchmarks.worker", plain, cache.root.absolute(), result])
        return {**json.loads(result.read_text(encoding="utf-8")), **finished.memory_quantities()}
