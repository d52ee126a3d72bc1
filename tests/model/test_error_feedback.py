"""Rounding with feedback against its definition: after each input, the others are solved for anew, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import edgetune.model.error_feedback as module
from edgetune.model.error_feedback import feedback_factor, round_with_feedback
from edgetune.model.rounding import least_squares_scales, nearest_points

ROWS, INPUTS = 24, 96


def weights_of() -> NDArray[np.float32]:
    return (0.02 * np.random.default_rng(0).standard_normal((ROWS, INPUTS))).astype(np.float32)


def sums_of(rank: int = 20) -> NDArray[np.float32]:
    """Σ x·xᵀ of inputs that depend on each other, as those of a layer do."""
    generator = np.random.default_rng(1)
    tokens = generator.standard_normal((400, rank)) @ generator.standard_normal((rank, INPUTS))
    tokens += 0.3 * generator.standard_normal(tokens.shape)
    return (tokens.T @ tokens).astype(np.float32)


def lost(values: NDArray[np.floating], weights: NDArray[np.float32], sums: NDArray[np.float32]) -> float:
    """Squared error of the products."""
    error = values.astype(np.float64) - weights
    return float(np.einsum("ri,ij,rj->", error, sums.astype(np.float64), error))


def values_of(points: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    return (points.reshape(*scales.shape, 32) * scales[..., None]).reshape(points.shape)


def test_each_input_is_rounded_when_the_others_are_the_best_for_those_before() -> None:
    weights, sums = weights_of(), sums_of()
    points, scales = round_with_feedback(weights, feedback_factor(sums))
    damped = sums.astype(np.float64)
    damped += 0.01 * np.diag(damped).mean() * np.eye(INPUTS)
    fixed = weights.astype(np.float64)
    for index in range(INPUTS):
        rest = slice(index, None)
        error = (weights - fixed)[:, :index]
        left = weights[:, rest] + error @ np.linalg.solve(damped[rest, rest], damped[rest, :index]).T
        block = index // 32
        if index % 32 == 0:
            chosen = least_squares_scales(np.ascontiguousarray(left[:, :32], np.float32))[:, 0]
            assert np.mean(np.isclose(chosen, scales[:, block], rtol=1e-3)) > 0.9
        steps = left[:, 0] / scales[:, block]
        # What lies nearly between two points may go to either.
        sure = np.abs(np.abs(steps - np.floor(steps)) - 0.5) > 1e-3
        assert (np.clip(np.rint(steps), -8, 7) == points[:, index])[sure].all()
        fixed[:, index] = points[:, index] * scales[:, block]


def test_products_lose_less_than_half_of_what_they_lose_to_nearest() -> None:
    weights, sums = weights_of(), sums_of()
    plain = least_squares_scales(weights)
    before = lost(values_of(nearest_points(weights, plain), plain), weights, sums)
    after = lost(values_of(*round_with_feedback(weights, feedback_factor(sums))), weights, sums)
    assert after < 0.5 * before


def test_inputs_that_do_not_depend_on_each_other_take_up_nothing() -> None:
    weights = weights_of()
    points, scales = round_with_feedback(weights, feedback_factor(np.diag(np.arange(INPUTS)).astype(np.float32)))
    assert scales.tobytes() == least_squares_scales(weights).tobytes()
    assert (points == nearest_points(weights, scales)).all()


def test_inputs_that_never_occur_are_rounded_all_the_same() -> None:
    weights = weights_of()
    points, scales = round_with_feedback(weights, feedback_factor(np.zeros((INPUTS, INPUTS), np.float32)))
    assert (points == nearest_points(weights, scales)).all() and np.isfinite(scales).all()


def test_pieces_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, factor = weights_of(), feedback_factor(sums_of())
    whole = round_with_feedback(weights, factor)
    monkeypatch.setattr(module, "_PIECE", 5 * INPUTS)
    for expected, found in zip(whole, round_with_feedback(weights, factor), strict=True):
        assert np.mean(found == expected) > 0.99
