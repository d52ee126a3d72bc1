"""Rows of very different lengths or with a common prefix, packed or padded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from benchmarks.edgetune_worker import fit, open_session
from benchmarks.experiments import Layout, RaggedTraining, RowLosses
from benchmarks.ragged_rows import rows_of
from benchmarks.training_steps import LEARNING_RATE, MAX_GRAD_NORM
from edgetune.data.batcher import Batcher
from edgetune.data.batches import Batch
from edgetune.data.stored_examples import longest
from edgetune.formats.bundle import load_bundle
from edgetune.model.lora import initial_parameters
from edgetune.runtimes.contract import OptimizerConfig, Session

BATCH_SIZE = 16
"""Rows of an optimizer step."""
STEPS = 4
COMPARED = 8
"""Rows whose losses are compared."""


def measure_ragged(experiment: RaggedTraining, folder: Path) -> dict[str, float]:
    """Time optimizer steps, laying out the rows included, after one step that is not timed."""
    bundle = load_bundle(folder)
    rows = rows_of(experiment.rows, BATCH_SIZE * (1 + STEPS), experiment.model.size.vocabulary)
    packing, share = _how(experiment.layout)
    fitted = fit(experiment.contestant, bundle, rows, BATCH_SIZE, packing=packing, share_prefixes=share)
    steps = fitted.workload.steps()
    parameters = initial_parameters(bundle.manifest.lora, seed=0)
    with open_session(fitted.choice, bundle, parameters, OptimizerConfig(0.0, MAX_GRAD_NORM)) as session:
        session.step(next(steps), LEARNING_RATE)
        begin = perf_counter()
        for batches in steps:
            session.step(batches, LEARNING_RATE)
        seconds = perf_counter() - begin
    timed = rows[BATCH_SIZE:]
    return {
        "trained_tokens_per_second": sum(row.trained_tokens for row in timed) / seconds,
        "tokens_per_second": sum(len(row.input_ids) for row in timed) / seconds,
        "seconds": seconds,
    }


def measure_row_losses(experiment: RowLosses, folder: Path) -> dict[str, float]:
    """The largest difference between the losses that a row has in a layout and beside padding."""
    bundle = load_bundle(folder)
    rows = rows_of(experiment.rows, COMPARED, experiment.model.size.vocabulary)
    parameters = initial_parameters(bundle.manifest.lora, seed=0)
    packing, share = _how(experiment.layout)
    fitted = fit(experiment.contestant, bundle, rows, len(rows), packing=packing, share_prefixes=share)
    pass_rows = fitted.workload.capacity().rows
    batchers = [
        Batcher(bundle.manifest, longest(rows), pass_rows, packing=packing, share_prefixes=share),
        Batcher(bundle.manifest, longest(rows), pass_rows, packing=False),
    ]
    with open_session(fitted.choice, bundle, parameters, OptimizerConfig(0.0, MAX_GRAD_NORM)) as session:
        other, padded = (_losses(session, batcher.step([rows])) for batcher in batchers)
    return {"row_loss_difference": max(abs(other[line] - padded[line]) for line in padded)}


def _how(layout: Layout) -> tuple[bool, bool]:
    """Whether rows are packed, and whether they share prefixes."""
    return layout != "padded", layout == "shared"


def _losses(session: Session, batches: Sequence[Batch]) -> dict[int, float]:
    """Mean loss of each row, by its line."""
    return {
        example.line: session.evaluate(batch.only(row))
        for batch in batches
        for row, example in enumerate(batch.examples)
    }
