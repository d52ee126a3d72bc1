"""Rows packed into one sequence have the losses and gradients that they have padded, and on their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from edgetune.data.batcher import Batcher
from edgetune.data.batches import Batch
from edgetune.data.encode import Example
from edgetune.data.stored_examples import longest
from edgetune.formats.bundle import Bundle
from edgetune.runtimes import find_runtime
from edgetune.runtimes.contract import OptimizerConfig, Session
from edgetune.runtimes.execution import WholePlan
from support.prepared_bundles import Prepared
from support.random_rows import prompted_rows, rows_with_prefixes
from support.tiny_phi3 import VARIANTS, parameters

pytestmark = pytest.mark.own
LENGTHS = [40, 9, 21, 33, 12, 5, 17, 25, 60, 8]
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def batches(bundle: Bundle, rows: list[Example], batch_size: int, *, packing: bool) -> list[Batch]:
    """One optimizer step over all rows."""
    drawn = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return Batcher(bundle.manifest, longest(rows), batch_size, packing=packing).step(drawn)


def losses(session: Session, of: Sequence[Batch]) -> dict[int, float]:
    """The mean loss of each row, by its line."""
    return {
        example.line: session.evaluate(batch.only(row)) for batch in of for row, example in enumerate(batch.examples)
    }


def gradients(bundle: Bundle, variant: str, of: Sequence[Batch]) -> dict[str, NDArray[np.float32]]:
    """The gradient of a step, as a runtime adds it up."""
    step = ort.InferenceSession(bundle.file("step"), providers=["CPUExecutionProvider"])
    names = [output.name for output in step.get_outputs()]
    trained = sum(batch.trained_tokens for batch in of)
    total: dict[str, NDArray[np.float32]] = {}
    for batch in of:
        scale = np.array([batch.trained_tokens / trained], np.float32)
        values = step.run(names, {**batch.tensors(), **parameters(variant), "loss_scale": scale})
        for name, value in zip(names, values, strict=True):
            total[name] = total.get(name, np.float32(0)) + (value * scale if name == "loss" else value)
    return total


@each_variant
@pytest.mark.parametrize(("longest", "batch_size"), [(60, 10), (60, 4), (100, 5)])
def test_every_row_has_its_own_loss(prepared: Prepared, variant: str, longest: int, batch_size: int) -> None:
    bundle = prepared(variant, "int4")
    # The long row is beyond what the longrope variant serves with its short factors.
    rows = prompted_rows([longest if length == 60 else length for length in LENGTHS])
    packed = batches(bundle, rows, batch_size, packing=True)
    padded = batches(bundle, rows, batch_size, packing=False)
    assert any(len(batch.examples) > len(batch.input_ids) for batch in packed)
    assert all(len(batch.examples) == len(batch.input_ids) for batch in padded)
    runtime = find_runtime("onnxruntime")
    with runtime.open_session(bundle, parameters(variant), OptimizerConfig(0.0, 1.0), WholePlan()) as session:
        in_packs, in_padding = losses(session, packed), losses(session, padded)
        assert sorted(in_packs) == sorted(in_padding) == [row.line for row in rows]
        for line, loss in in_padding.items():
            assert in_packs[line] == pytest.approx(loss, abs=1e-5)
        if variant != "longrope" or longest == 60:  # otherwise a row has other factors alone than beside a long one
            for row in rows:
                (alone,) = Batcher(bundle.manifest, len(row.input_ids), 1, packing=False).step([[row]])
                assert in_packs[row.line] == pytest.approx(session.evaluate(alone), abs=1e-5)


@each_variant
def test_the_step_is_the_same(prepared: Prepared, variant: str) -> None:
    bundle = prepared(variant, "int4")
    rows = prompted_rows(LENGTHS)
    packed = gradients(bundle, variant, batches(bundle, rows, 4, packing=True))
    padded = gradients(bundle, variant, batches(bundle, rows, 4, packing=False))
    assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-6)
    for name, value in padded.items():
        assert np.abs(value).max() > 0, name
        np.testing.assert_allclose(packed[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)
    runtime = find_runtime("onnxruntime")
    results = []
    for packing in (True, False):
        with runtime.open_session(bundle, parameters(variant), OptimizerConfig(0.0, 1.0), WholePlan()) as session:
            results.append(session.step(batches(bundle, rows, 4, packing=packing), 1e-3))
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)


@each_variant
def test_a_common_prefix_changes_no_loss_and_no_gradient(prepared: Prepared, variant: str) -> None:
    bundle = prepared(variant, "int4")
    # Of the longrope variant, all rows are short.
    rows = rows_with_prefixes([[5, 12, 3, 20], [4, 9, 7]], 30)
    shared, padded = batches(bundle, rows, 8, packing=True), batches(bundle, rows, 8, packing=False)
    assert sum(batch.input_ids.size for batch in shared) <= 144  # two prefixes and 60 own tokens, with padding
    assert sum(batch.input_ids.size for batch in padded) >= 270
    assert any(borrowed.tokens for batch in shared for borrowed in batch.borrowed)
    runtime = find_runtime("onnxruntime")
    with runtime.open_session(bundle, parameters(variant), OptimizerConfig(0.0, 1.0), WholePlan()) as session:
        assert losses(session, shared) == pytest.approx(losses(session, padded), abs=1e-5)
    together, apart = (gradients(bundle, variant, of) for of in (shared, padded))
    assert together["loss"] == pytest.approx(apart["loss"], rel=1e-6)
    for name, value in apart.items():
        assert np.abs(value).max() > 0, name
        np.testing.assert_allclose(together[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


@each_variant
def test_rows_know_nothing_of_each_other(prepared: Prepared, variant: str) -> None:
    bundle = prepared(variant, "int4")
    rows = prompted_rows([20, 60, 14, 26])
    (batch,) = batches(bundle, rows, 4, packing=True)
    assert len(batch.input_ids) < len(rows)
    runtime = find_runtime("onnxruntime")
    with runtime.open_session(bundle, parameters(variant), OptimizerConfig(0.0, 1.0), WholePlan()) as session:
        before = losses(session, [batch])
        for row, example in enumerate(batch.examples):
            ids = np.where(batch.rows == row, (batch.input_ids + 97) % 440 + 3, batch.input_ids)
            np.copyto(batch.input_ids, ids)
            after = losses(session, [batch])
            assert [line for line in before if after[line] != before[line]] == [example.line]
            before = after
