"""What becomes of a step's rows, and which factors longrope has for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgetune.data.batcher import Batcher
from edgetune.data.batches import Batch, make_batch
from edgetune.data.encode import Example
from edgetune.data.stored_examples import longest
from edgetune.formats.manifest import BundleManifest
from edgetune.model.rope import Rope
from support.tiny_bundle import make_bundle

LONGROPE = Rope(8, 1e4, 1.1, [1.0, 1.1, 1.2, 1.3], [2.0, 3.0, 4.0, 5.0], 20)


@pytest.fixture
def manifest(tmp_path: Path) -> BundleManifest:
    return replace(make_bundle(tmp_path / "bundle").manifest, max_length=64)


@pytest.fixture
def longrope(manifest: BundleManifest) -> BundleManifest:
    return replace(manifest, architecture=replace(manifest.architecture, rope=LONGROPE))


def rows(*lengths: int) -> list[Example]:
    return [Example(line, [5] * length, [5] * length) for line, length in enumerate(lengths, start=1)]


def cos_by_line(batches: Iterable[Batch]) -> dict[int, np.ndarray]:
    """The rotary table of each row."""
    return {
        example.line: batch.rope_cos[batch.rows == row]
        for batch in batches
        for row, example in enumerate(batch.examples)
    }


def expected(manifest: BundleManifest, groups: Sequence[Sequence[Example]]) -> dict[int, np.ndarray]:
    """The same by padding each group, as transformers does."""
    rope = manifest.architecture.rope
    return cos_by_line(make_batch(group, rope, 0) for group in groups)


def assert_same(found: dict[int, np.ndarray], wanted: dict[int, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for line, table in wanted.items():
        np.testing.assert_array_equal(found[line], table, f"row {line}")


@pytest.mark.parametrize("packing", [True, False])
def test_longrope_looks_at_the_rows_that_were_drawn_together(longrope: BundleManifest, packing: bool) -> None:
    drawn = [rows(21, 5, 8)]
    drawn.append([replace(row, line=row.line + 3) for row in rows(4, 20, 3)])
    everything = [row for group in drawn for row in group]
    # However few of them go through at a time.
    for pass_rows in (3, 1):
        found = cos_by_line(Batcher(longrope, longest(everything), pass_rows, packing=packing).step(drawn))
        assert_same(found, expected(longrope, drawn))
    alone = expected(longrope, [[row] for row in everything])
    assert (found[2] != alone[2]).any()  # short, but drawn with a long one


@pytest.mark.parametrize("packing", [True, False])
def test_in_measuring_each_row_has_its_own_factors(longrope: BundleManifest, packing: bool) -> None:
    everything = rows(3, 21, 20, 5, 30, 8)
    found = cos_by_line(Batcher(longrope, longest(everything), 4, packing=packing).measure(everything))
    assert_same(found, expected(longrope, [[row] for row in everything]))


def test_a_sequence_may_be_long_where_no_row_is(longrope: BundleManifest) -> None:
    everything = rows(20, 20, 4, 4, 4, 4, 4, 4)
    batches = Batcher(longrope, longest(everything), 8, packing=True).step([everything])
    assert max(batch.input_ids.shape[1] for batch in batches) > 20
    assert_same(cos_by_line(batches), expected(longrope, [[row] for row in everything]))


def test_the_rows_of_a_step_share_passes_whatever_the_accumulation(manifest: BundleManifest) -> None:
    everything = rows(60, 10, 12, 20, 14, 9, 31, 22)
    whole = Batcher(manifest, longest(everything), 4, packing=True)
    split = [everything[start : start + 4] for start in (0, 4)]
    assert [batch.input_ids.shape for batch in whole.step(split)] == [(3, 64)]
    padded = Batcher(manifest, longest(everything), 4, packing=False).step(split)
    assert [batch.input_ids.shape for batch in padded] == [(4, 64), (4, 16)]
    assert [[len(row.input_ids) for row in batch.examples] for batch in padded] == [[60, 31, 22, 20], [14, 12, 10, 9]]


def test_a_row_that_was_not_counted_on_is_an_error_of_the_program(manifest: BundleManifest) -> None:
    with pytest.raises(ValueError, match="a row has 30 tokens, but there is room for 24"):
        Batcher(manifest, longest(rows(20)), 2, packing=True).step([rows(30)])


@pytest.mark.parametrize(("processes", "batches"), [(1, 1), (2, 2), (3, 3), (8, 5)])
def test_processes_share_the_rows_of_a_step_about_evenly(
    manifest: BundleManifest, processes: int, batches: int
) -> None:
    everything = rows(20, 19, 12, 9, 10)
    batcher = Batcher(manifest, longest(everything), 8, packing=True, processes=processes)
    made = batcher.step([everything])
    assert len(made) == batches == len(batcher.shapes([everything]))
    assert sorted(row.line for batch in made for row in batch.examples) == sorted(row.line for row in everything)
    tokens = [batch.tokens for batch in made]
    assert max(tokens) - min(tokens) <= 12 or processes == 8
