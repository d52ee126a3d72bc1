"""Find the constants of a runtime's `Footprint`: `python -m benchmarks.footprints RUNTIME CACHE [--precision int8]`.

Steps of several shapes and plans run in fresh processes; the constants are those with which `edgetune.planning.memory`
comes closest to their high-water marks, relative to each. Printed beside them: every measurement, predicted and found.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.cache import Cache
from benchmarks.edgetune_worker import steps_once
from benchmarks.experiments import Edgetune, Training, Workload
from benchmarks.models import FULL, GROUPED, SMALL, with_layers
from benchmarks.process import run_watched
from benchmarks.record import read_experiment, write_experiment
from edgetune.formats.bundle import load_bundle
from edgetune.formats.manifest import BundleManifest
from edgetune.planning.memory import Sizes, Work, peak_memory
from edgetune.runtimes import find_runtime
from edgetune.runtimes.execution import LayeredPlan
from edgetune.runtimes.footprint import Footprint

CONSTANTS = (
    *(
        "base_bytes",
        "attention_state_bytes",
        "attention_score_bytes",
        "kept_score_bytes",
        "mlp_state_bytes",
        "hidden_state_bytes",
    ),
    *("graph_weight_bytes", "logit_bytes", "shape_bytes"),
)
"""What is fitted here, to large models; what they tell nothing of was fitted to smaller ones, or is known."""
_LARGE = ("base_bytes", "shape_bytes")
"""Those that are whole megabytes."""
WIDE = with_layers(FULL, 4)
_STREAM = LayeredPlan(resident=False, head_rows=1024)
_PIECES = replace(_STREAM, head_rows=256, head_tokens=3072)
_LEAN = replace(_STREAM, lean=True)
_RESIDENT = replace(_STREAM, resident=True)
GRID: tuple[tuple[Workload, LayeredPlan], ...] = (
    (Workload(SMALL, 1, 128), _STREAM),
    (Workload(SMALL, 1, 512), _STREAM),
    (Workload(SMALL, 1, 1024), _STREAM),
    (Workload(SMALL, 4, 256), _STREAM),
    (Workload(SMALL, 8, 256), _STREAM),
    (Workload(SMALL, 4, 256), replace(_STREAM, head_tokens=1024)),
    (Workload(SMALL, 4, 256), replace(_RESIDENT, kept_layers=6)),
    (Workload(SMALL, 4, 256), replace(_RESIDENT, kept_layers=12)),
    (Workload(SMALL, 2, 512), replace(_RESIDENT, kept_layers=12)),
    (Workload(SMALL, 1, 1024), _RESIDENT),
    (Workload(SMALL, 1, 1024), replace(_RESIDENT, kept_layers=6)),
    (Workload(SMALL, 1, 1024), replace(_RESIDENT, kept_layers=12)),
    (Workload(SMALL, 1, 1024), _LEAN),
    (Workload(GROUPED, 1, 256), replace(_STREAM, head_rows=256)),
    (Workload(GROUPED, 1, 1024), replace(_STREAM, head_rows=256)),
    (Workload(GROUPED, 1, 512), replace(_RESIDENT, head_rows=256)),
    (Workload(GROUPED, 1, 1024), replace(_RESIDENT, kept_layers=4, head_rows=256)),
    (Workload(GROUPED, 4, 128), replace(_RESIDENT, kept_layers=4, head_rows=256)),
    (Workload(GROUPED, 1, 1024), replace(_LEAN, head_rows=256, head_tokens=2816)),
    (Workload(GROUPED, 2, 512), replace(_LEAN, head_rows=256, head_tokens=704)),
    (Workload(WIDE, 1, 128), _PIECES),
    (Workload(WIDE, 1, 512), _PIECES),
    (Workload(WIDE, 4, 128), _PIECES),
    (Workload(WIDE, 1, 512), replace(_LEAN, head_rows=256, head_tokens=3072)),
    (Workload(WIDE, 1, 1024), replace(_LEAN, head_rows=256, head_tokens=768)),
    (Workload(WIDE, 1, 256), replace(_STREAM, head_rows=256)),
)
OTHERS: tuple[tuple[int, int], ...] = ((1, 32), (2, 32), (3, 32))
"""Rows and lengths of more batches before the largest, whose graphs are still held when it comes: every workload is
measured without and with them."""
_ROUNDS = 30


@dataclass(frozen=True)
class Sample:
    """One measured step."""

    manifest: BundleManifest
    work: Work
    plan: LayeredPlan
    peak: int

    @cached_property
    def sizes(self) -> Sizes:
        """Of the bundle."""
        return Sizes(self.manifest, self.plan)

    def predict(self, footprint: Footprint) -> int:
        """What `edgetune.planning.memory` says, in bytes."""
        return peak_memory(self.sizes, footprint, self.work, self.plan)


def measure(
    runtime: str, cache: Cache, workload: Workload, plan: LayeredPlan, others: Sequence[tuple[int, int]]
) -> Sample:
    """Run a step of each other shape and then the workload's, in a process of its own."""
    cache.make_bundle(workload.model, "int4", print)
    folder = cache.bundle(workload.model, "int4")
    training = write_experiment(Training(Edgetune(runtime), workload, steps=0))
    task = json.dumps([training, str(folder), asdict(plan), others])
    finished = run_watched([sys.executable, "-m", "benchmarks.footprints", "--task", task])
    sizes = tuple((rows * length, rows * length**2) for rows, length in others)
    work = Work(workload.tokens, workload.tokens * workload.length, sizes)
    return Sample(load_bundle(folder).manifest, work, plan, finished.memory.resident)


def fit(samples: Sequence[Sample], start: Footprint) -> Footprint:
    """The constants, none negative, with the least squares of relative errors.

    The prediction is linear in them but for the choice of the largest graph, so that it is solved again and again.
    """
    found = start
    peaks = np.array([sample.peak for sample in samples], dtype=float)
    for _ in range(_ROUNDS):
        base = np.array([sample.predict(found) for sample in samples], dtype=float)
        steps = {name: 1e6 if name in _LARGE else 1.0 for name in CONSTANTS}
        columns = []
        for name, step in steps.items():
            moved = _with(found, {name: getattr(found, name) + step})
            columns.append((np.array([sample.predict(moved) for sample in samples]) - base) / step)
        values = np.array([getattr(found, name) for name in CONSTANTS], dtype=float)
        slopes = np.stack(columns, axis=1)
        target = peaks - base + slopes @ values
        solved = _not_negative(slopes / peaks[:, None], target / peaks)
        # Half of the way: which graph is the largest may change.
        found = _with(found, dict(zip(CONSTANTS, ((values + solved) / 2).tolist(), strict=True)))
    return found


def _with(footprint: Footprint, values: Mapping[str, Any]) -> Footprint:
    return replace(footprint, **values)


def _not_negative(matrix: NDArray[Any], target: NDArray[Any]) -> NDArray[Any]:
    """Least squares; what would be negative is left out."""
    norms = np.linalg.norm(matrix, axis=0)
    # What nothing depends on is not known.
    kept = np.flatnonzero(norms).tolist()
    scale = np.where(norms > 0, norms, 1.0)
    while True:
        solution = np.zeros(matrix.shape[1])
        solution[kept] = np.linalg.lstsq(matrix[:, kept] / scale[kept], target, rcond=None)[0]
        worst = min(kept, key=lambda index: solution[index])
        if solution[worst] >= 0:
            return np.asarray(solution / scale)
        kept.remove(worst)


def main() -> None:
    """Measure, fit and print; or, with `--task`, be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", nargs="?", default="onnxruntime")
    parser.add_argument("cache_bytes", nargs="?", type=Path, default=Path("benchmarks/.cache"))
    parser.add_argument("--precision", choices=("exact", "int8"), default="exact")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.task:
        training, folder, plan, others = json.loads(asked.task)
        experiment = cast(Training, read_experiment(training))
        largest = experiment.workload
        workloads = [*(replace(largest, rows=rows, length=length) for rows, length in others), largest]
        steps_once(cast(Edgetune, experiment.contestant), workloads, Path(folder), LayeredPlan(**plan))
        return
    abilities = find_runtime(asked.runtime).abilities()
    start = abilities.int8 if asked.precision == "int8" else abilities.exact
    if start is None:
        sys.exit(f"{asked.runtime} does not execute the layered form in precision {asked.precision}")
    cache = Cache(asked.cache)
    samples = [
        measure(asked.runtime, cache, workload, replace(plan, precision=start.precision), others)
        for workload, plan in GRID
        for others in ((), OTHERS)
    ]
    found = fit(samples, start)
    print(*(f"{name}={getattr(found, name):,.1f}" for name in CONSTANTS), sep="\n")
    for sample in samples:
        now, new = (sample.predict(footprint) / sample.peak - 1 for footprint in (start, found))
        print(f"{sample.work} {sample.plan}: {sample.peak / 1e6:.0f} MB, as it is {now:+.1%}, fitted {new:+.1%}")


if __name__ == "__main__":
    main()
