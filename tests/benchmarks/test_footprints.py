"""The fit of `python -m benchmarks.footprints` finds constants that were put in."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.footprints import CONSTANTS, GRID, OTHERS, Sample, fit
from edgetune.planning.memory import Sizes, Work, peak_memory
from support.fake_runtime import FOOTPRINT
from support.prepared_bundles import Prepared


@pytest.mark.parametrize("together", [False, True])
def test_the_fit_predicts_what_it_was_made_from(prepared: Prepared, together: bool) -> None:
    truth = replace(
        FOOTPRINT, together=together, graph_weight_bytes=2.0, shapes_held=4 if together else 1, shape_bytes=20_000_000
    )
    samples = []
    for variant in ("multi-head", "grouped-query"):
        manifest = prepared(variant, "int4").manifest
        for workload, plan in GRID:
            for others in ((), OTHERS):
                sizes = tuple((rows * length, rows * length**2) for rows, length in others)
                work = Work(workload.tokens, workload.tokens * workload.length, sizes)
                streamed = replace(plan, kept_layers=0)
                samples.append(Sample(manifest, work, streamed, peak_memory(Sizes(manifest), truth, work, streamed)))
    found = fit(samples, replace(truth, **dict.fromkeys(CONSTANTS, 1.0)))
    for sample in samples:
        assert sample.predict(found) == pytest.approx(sample.peak, rel=0.03)
    assert all(getattr(found, name) >= 0 for name in CONSTANTS)
