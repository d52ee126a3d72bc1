"""Rounding a weight so that later inputs make up for the errors of earlier ones: GPTQ.

What counts is not the error of a weight W but that of its product, Σ over rows of ‖(Q − W)·x‖², which the sums of
products of the inputs x with each other decide, H = Σ x·xᵀ. Inputs are rounded one after the other; the error of each
is subtracted, as far as H says that it can be, from those that are still to come (Frantar et al. 2023, "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune.model.blocks import BLOCK_SIZE
from edgetune.model.rounding import Weights, clipped, inverse_of, least_squares_scales, rounded

_DAMPING = 0.01
"""Share of H's mean diagonal that is added to the diagonal: inputs that hardly occur do not take up every error."""
_PIECE = 1 << 22
"""Weights that are rounded at once, roughly; three arrays of this size are in memory."""


def feedback_factor(sums: NDArray[np.float32]) -> NDArray[np.float32]:
    """The upper triangular U with UᵀU = H⁻¹: its rows say how the error of an input is passed on.

    Args:
        sums: H (in, in): the sums of products of a linear layer's inputs, over all tokens.
    """
    damped = sums.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)
    diagonal += max(_DAMPING * float(diagonal.mean()), float(np.finfo(np.float32).tiny))
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def round_with_feedback(weights: Weights, factor: NDArray[np.float32]) -> tuple[Weights, Weights]:
    """Round an int4 weight; its rows do not depend on each other.

    The scales of a block are those of least squared error for what its weights are when its turn comes.

    Args:
        weights: Of shape (rows, in).
        factor: What `feedback_factor` gives, (in, in).

    Returns:
        Points (rows, in), whole numbers from −8 to 7, and scales (rows, in / 32).
    """
    rows, inputs = weights.shape
    points, scales = np.empty_like(weights), np.empty((rows, inputs // BLOCK_SIZE), np.float32)
    step = max(1, _PIECE // inputs)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        _round_rows(weights[piece], factor, points[piece], scales[piece])
    return points, scales


def _round_rows(weights: Weights, factor: NDArray[np.float32], points: Weights, scales: Weights) -> None:
    """Fill points and scales of some rows."""
    left = np.array(weights.T, order="C")  # (in, rows): what is still to be rounded, with the errors passed on
    for block in range(scales.shape[1]):
        first, last = block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE
        own, passed_on = left[first:last], factor[first:last]
        scale = least_squares_scales(np.ascontiguousarray(own.T))[:, 0]
        inverse = inverse_of(scale)
        errors = np.empty_like(own)
        for index in range(BLOCK_SIZE):
            point = clipped(rounded(own[index] * inverse))
            points[:, first + index] = point
            errors[index] = (own[index] - point * scale) / passed_on[index, first + index]
            own[index + 1 :] -= np.outer(passed_on[index, first + index + 1 : last], errors[index])
        left[last:] -= passed_on[:, last:].T @ errors
        scales[:, block] = scale
