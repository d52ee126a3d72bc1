"""Roundings of a weight and its update onto an int4 grid, against their definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.exporting.quantise import generator_of, on_grid
from edgetune.model.rounding import least_squares_scales

ROWS, INPUTS = 64, 1024
STEP = 0.02


def grid_weights(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights on a grid, and its scales; each block has a weight on the lowest point."""
    generator = np.random.default_rng(seed)
    points = generator.integers(-7, 8, (ROWS, INPUTS // 32, 32))
    points[..., 5] = -8
    scales = (STEP * generator.uniform(0.5, 1, points.shape[:2])).astype(np.float32)
    return (points * scales[..., None]).reshape(ROWS, INPUTS).astype(np.float32), scales


def update_of(steps: float) -> NDArray[np.float32]:
    """A rank of one, as small as that many steps."""
    generator = np.random.default_rng(1)
    rows, columns = generator.standard_normal((ROWS, 1)), generator.standard_normal((1, INPUTS))
    return (steps * STEP * rows * columns).astype(np.float32)


def draws() -> NDArray[np.float32]:
    return generator_of("a weight").random((ROWS, INPUTS), dtype=np.float32)


def value_of(packed: NDArray[np.uint8], scales: NDArray[np.float32]) -> NDArray[np.float64]:
    points = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*scales.shape, 32).astype(np.float64) - 8
    return (points * scales[..., None]).reshape(packed.shape[0], -1)


def share_of(update: NDArray[np.float32], change: NDArray[np.float64]) -> float:
    """How much of the update there is in what changed: least squares."""
    return float(np.vdot(update, change) / np.vdot(update, update))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_small_update_of_weights_on_the_grid_is_there_on_average(dtype: type[np.floating]) -> None:
    weights, scales = grid_weights()
    # fp16 and fp32 checkpoints of quantised models lie on a grid too.
    weights = weights.astype(dtype).astype(np.float32)
    given = scales if dtype is np.float32 else least_squares_scales(weights)
    update = update_of(0.05)
    rounded = value_of(*on_grid(weights, given, update, draws()))
    assert share_of(update, rounded - weights) == pytest.approx(1, abs=0.05)
    blocks, step = (weights + update).reshape(ROWS, -1, 32), given[..., None]
    nearest = (np.clip(np.rint(blocks / step), -8, 7) * step).reshape(ROWS, INPUTS)
    assert abs(share_of(update, nearest - weights)) < 0.1


def test_weights_between_the_points_are_rounded_to_nearest() -> None:
    weights = (STEP * np.random.default_rng(2).standard_normal((ROWS, INPUTS))).astype(np.float32)
    update = update_of(0.05)
    packed, scales = on_grid(weights, least_squares_scales(weights), update, draws())
    total = (weights + update).astype(np.float64).reshape(ROWS, -1, 32)
    assert scales.tobytes() == least_squares_scales(weights + update).tobytes()
    steps = total / scales[..., None]
    errors = np.abs(value_of(packed, scales).reshape(total.shape) - total) / np.abs(scales)[..., None]
    # What lies beyond the last points is clipped.
    assert (errors[(steps > -8.49) & (steps < 7.49)] <= 0.5001).all() and errors.max() <= 1.5001
    assert share_of(update, value_of(packed, scales) - weights) == pytest.approx(1, abs=0.15)


def test_nothing_is_changed_without_an_update() -> None:
    weights, scales = grid_weights()
    packed, kept = on_grid(weights, scales, np.zeros_like(weights), draws())
    assert kept.tobytes() == scales.tobytes()
    assert value_of(packed, kept) == pytest.approx(weights.astype(np.float64), rel=1e-6)


def test_a_block_keeps_its_scale_unless_the_sum_leaves_the_grid_by_much() -> None:
    weights, scales = grid_weights()
    update = np.zeros_like(weights)
    by_row = {1: -1.0, 2: -1.7, 3: -20.0}
    for row, steps in by_row.items():
        update[row, 5] = steps * scales[row, 0]
    packed, found = on_grid(weights, scales, update, draws())
    assert [row for row in range(ROWS) if found[row].tobytes() != scales[row].tobytes()] == [2, 3]
    for row, steps in by_row.items():
        lost = value_of(packed, found)[row, 5] - (weights + update)[row, 5]
        if steps == -1:
            assert abs(lost) == pytest.approx(scales[row, 0], rel=1e-5)
        else:
            assert abs(lost) < 0.5 * abs(steps * scales[row, 0])


def test_a_block_of_zeros_takes_an_update() -> None:
    weights, scales = grid_weights()
    weights[3, :32], scales[3, 0] = 0, 0
    update = update_of(0.05)
    update[:3] = 0
    packed, found = on_grid(weights, scales, update, draws())
    step = np.abs(found[3, 0])
    assert step == pytest.approx(np.abs(update[3, :32]).max() / 8)
    assert np.abs(value_of(packed, found)[3, :32] - update[3, :32]).max() <= 1.0001 * step


def test_draws_are_a_weights_own_and_the_same_each_time() -> None:
    first, again, other = (generator_of(name).random(100) for name in ("one", "one", "another"))
    assert (first == again).all() and not (first == other).any()
