"""Scales of blocks and the points of their weights, against a search in float64 and ONNX Runtime's own quantiser."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from edgetune.model.rounding import largest_value_scales, least_squares_scales, nearest_points, packed_points

ROWS, INPUTS = 96, 256


def weights_of(seed: int = 0) -> NDArray[np.float32]:
    """Most blocks are bells of several widths; some have one large weight, some are zero."""
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((ROWS, INPUTS)) * 10.0 ** generator.uniform(-3, 0, (ROWS, 1))
    weights[5:20, 3::32] *= 8
    weights[1, :32] = 0
    return weights.astype(np.float32)


def error_of(block: NDArray[np.float64], scale: float) -> float:
    """Squared error of one block whose weights go to their nearest points."""
    points = np.clip(np.rint(block / scale), -8, 7) if scale else np.zeros_like(block)
    return float(np.square(block - points * scale).sum())


def test_no_other_of_the_eleven_scales_has_a_smaller_error() -> None:
    weights = weights_of()
    found = least_squares_scales(weights)
    assert found.shape == (ROWS, INPUTS // 32) and found.dtype == np.float32
    by_largest, chosen = largest_value_scales(weights), set()
    left = before = 0.0
    for row, column in np.ndindex(*found.shape):
        block = weights[row, 32 * column : 32 * column + 32].astype(np.float64)
        largest = block[np.abs(block).argmax()]
        choices = {steps: largest / -steps for steps in np.arange(6, 8.75, 0.25)}
        assert len(choices) == 11
        errors = {steps: error_of(block, scale) for steps, scale in choices.items()}
        own = error_of(block, float(found[row, column]))
        assert own <= min(errors.values()) * (1 + 1e-4)
        if largest:
            chosen.add(round(float(-largest / found[row, column]), 2))
            left += own / np.square(block).sum()
            before += error_of(block, float(by_largest[row, column])) / np.square(block).sum()
    assert chosen == set(np.arange(6, 8.75, 0.25)), "a choice that is never the best is none"
    assert left < 0.93 * before


def test_a_block_on_a_grid_keeps_the_grid() -> None:
    generator = np.random.default_rng(1)
    for lowest, highest in ((-8, 7), (-7, 7), (-6, 6)):
        points = generator.integers(lowest, highest + 1, (ROWS, INPUTS // 32, 32))
        points[..., 4] = lowest
        scales = generator.uniform(-1, 1, points.shape[:2]).astype(np.float32)
        weights = (points * scales[..., None]).astype(np.float32).reshape(ROWS, INPUTS)
        found = least_squares_scales(weights)
        if lowest == -8:
            assert found == pytest.approx(scales, rel=1e-6)
        again = nearest_points(weights, found).reshape(points.shape) * found[..., None]
        assert again.reshape(ROWS, INPUTS) == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize("least_squares", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-45, 3e-39, 1e-30, 1e30, 3e38])
def test_scales_are_finite_however_small_or_large_the_weights(size: float, *, least_squares: bool) -> None:
    weights = np.linspace(-1, 1, 64, dtype=np.float32)[None] * np.float32(size)
    with np.errstate(all="raise", under="ignore"):
        scales = least_squares_scales(weights) if least_squares else largest_value_scales(weights)
        points = nearest_points(weights, scales)
    assert np.isfinite(scales).all() and np.isfinite(points).all() and np.abs(points).max() <= 8
    if size >= 1e-30:
        values = points.reshape(2, 32).astype(np.float64) * scales[0, :, None]
        assert values.ravel() == pytest.approx(weights[0].astype(np.float64), abs=0.1 * size)


@pytest.mark.parametrize("bits", [4, 8])
def test_by_the_largest_value_all_is_as_onnx_runtimes_quantiser_makes_it(bits: int) -> None:
    weights = weights_of()
    blocks = INPUTS // 32
    packed = np.zeros((ROWS, blocks, 4 * bits), np.uint8)
    scales, zero_points = np.zeros((ROWS, blocks), np.float32), np.zeros((ROWS, blocks), np.uint8)
    quantise = {4: quantize_matmul_4bits, 8: quantize_matmul_8bits}[bits]
    quantise(packed, np.ascontiguousarray(weights.T), scales, zero_points, 32, ROWS, INPUTS, True)
    found = largest_value_scales(weights, bits)
    assert found.tobytes() == scales.tobytes()
    assert packed_points(nearest_points(weights, found, bits), bits).tobytes() == packed.tobytes()


def test_rows_are_rounded_alike_alone_and_together() -> None:
    """What is merged in pieces of any size is the same to the byte."""
    weights = np.vstack([weights_of(seed) for seed in range(4)])
    together = least_squares_scales(weights)
    assert np.vstack([least_squares_scales(row[None]) for row in weights]).tobytes() == together.tobytes()
