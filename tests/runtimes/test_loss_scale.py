"""Loss scaling: half precision neither loses small gradients nor hides large ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.formats.bundle import Bundle
from edgetune.runtimes import onnxruntime as stock
from edgetune.runtimes.execution import WholePlan
from edgetune.runtimes.onnx_session import open_graph
from edgetune.runtimes.placement import Placement
from edgetune.runtimes.whole.compiled import AcceleratorGraphs, AcceleratorSession, Arrays
from edgetune.runtimes.whole.loss_scale import LossScale
from support.prepared_bundles import Prepared
from support.random_rows import rows_of
from support.tiny_step import LEARNING_RATE, OPTIMIZER, adapter_of, batch_of


class HalfPrecision:
    """The CPU with gradients multiplied and rounded to float16: what overflows is infinite, or saturates."""

    def __init__(self, bundle: Bundle, factor: float, *, saturate: bool) -> None:
        self._bundle, self._factor, self._saturate = bundle, factor, saturate
        self.scales: list[float] = []

    def compile(self, role: str, batch: int, length: int) -> HalfPrecision:
        self._session = open_graph(self._bundle.file(role))
        self.placement = Placement(role, batch, length, "", "", [], cached=False)
        return self

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[NDArray[Any]]:
        self.scales.append(float(inputs["loss_scale"][0]))
        results = self._session.run(list(outputs), dict(inputs))
        with np.errstate(over="ignore"):
            halves = [(result * self._factor).astype(np.float16).astype(np.float32) for result in results[1:]]
        if self._saturate:
            halves = [np.clip(half, -65504, 65504) for half in halves]
        return [results[0], *halves]


class NotFinite:
    """Neither the loss nor the gradient is."""

    def __init__(self) -> None:
        self.scales: list[float] = []

    def compile(self, role: str, batch: int, length: int) -> NotFinite:
        self.placement = Placement(role, batch, length, "", "", [], cached=False)
        return self

    def run(self, inputs: Arrays, outputs: Sequence[str]) -> list[NDArray[Any]]:
        self.scales.append(float(inputs["loss_scale"][0]))
        return [np.full(1, np.nan, np.float32) for _ in outputs]


def test_it_is_a_power_of_two_that_follows_the_batch() -> None:
    scale = LossScale()
    for tokens in (0, 1, 2, 100, 511, 512, 1 << 20):
        assert math.log2(scale.of(tokens)).is_integer()
        assert scale.of(tokens) <= 2**15
    assert scale.of(512) == 8 * 512
    assert 4 * 511 < scale.of(511) <= 8 * 511


def test_it_halves_on_overflow_and_comes_back() -> None:
    scale = LossScale()
    assert scale.overflowed()
    assert scale.of(512) == 4 * 512
    for _ in range(200):
        scale.fitted()
    assert scale.of(512) == 8 * 512
    for _ in range(1000):
        scale.fitted()
    assert scale.of(512) == 8 * 512
    assert [scale.overflowed() for _ in range(8)] == [True] * 6 + [False] * 2


@pytest.mark.own
@pytest.mark.parametrize("saturate", [False, True], ids=["overflows", "saturates"])
def test_an_overflow_is_computed_again_with_a_smaller_scale(prepared: Prepared, saturate: bool) -> None:
    bundle = prepared("multi-head", "fp32")
    batch = batch_of(bundle, rows_of(0, [9, 12]))
    parameters = adapter_of(bundle)
    with stock.open_session(bundle, parameters, OPTIMIZER, WholePlan()) as exact:
        expected = exact.step([batch], LEARNING_RATE)
        gradients = exact.gradients()  # type: ignore[attr-defined]
    largest = max(float(np.abs(gradient).max()) for gradient in gradients.values())
    # At the first scale the largest gradient is twice what float16 holds.
    factor = 2 * 65504 / (largest * LossScale().of(batch.trained_tokens))
    half = HalfPrecision(bundle, factor, saturate=saturate)
    session = AcceleratorSession(bundle, parameters, OPTIMIZER, AcceleratorGraphs(half))
    found = session.step([batch], LEARNING_RATE)
    assert len(half.scales) >= 2
    assert half.scales[1] == half.scales[0] / 2
    assert found.applied
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(factor * expected.grad_norm, rel=1e-3)


@pytest.mark.parametrize("saturate", [False, True], ids=["overflows", "saturates"])
def test_a_gradient_that_no_scale_helps_is_not_applied(prepared: Prepared, saturate: bool) -> None:
    bundle = prepared("multi-head", "fp32")
    batch = batch_of(bundle, rows_of(0, [9, 12]))
    parameters = adapter_of(bundle)
    half = HalfPrecision(bundle, 1e12, saturate=saturate)
    session = AcceleratorSession(bundle, parameters, OPTIMIZER, AcceleratorGraphs(half))
    assert not session.step([batch], LEARNING_RATE).applied
    np.testing.assert_equal(session.adapter(), dict(parameters))


def test_what_is_not_finite_does_not_make_the_scale_grow(prepared: Prepared) -> None:
    batch = batch_of(prepared("multi-head", "fp32"), rows_of(0, [9, 12]))
    broken = NotFinite()
    graphs = AcceleratorGraphs(broken)
    graphs.scale.overflowed()
    for _ in range(201):
        assert math.isnan(graphs.gradients(batch, 1.0, {}, {"a.grad": np.zeros(1, np.float32)}))
    assert broken.scales == [LossScale().of(batch.trained_tokens) / 2] * 201
