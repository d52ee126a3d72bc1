"""Rounding a weight to blocks of integers: which scale each block gets, and which points its weights go to.

A block's points are whole steps of its scale, of int4 from −8 to 7. The usual scale puts the block's largest weight on
the lowest point, so that nothing is cut off. A smaller scale has finer steps and cuts off the largest weight, a larger
one leaves points unused; which is better depends on the block. `least_squares_scales` tries several and keeps the one
with the smallest sum of squared errors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetune.model.blocks import BITS, BLOCK_SIZE

Weights = NDArray[np.float32]

_INT4 = BITS["int4"]
_LARGEST_AT = (8.5, 8.25, 8.0, 7.75, 7.5, 7.25, 7.0, 6.75, 6.5, 6.25, 6.0)
"""Steps below zero at which the largest weight of an int4 block is tried; beyond 8 it is cut off."""
_TOGETHER = 2048
"""Blocks that are tried at a time: what is computed of them stays in a processor's cache."""


def lowest_point(bits: int) -> int:
    """The least of the points that so many bits number; the highest is −1 − it."""
    return -(1 << (bits - 1))


def largest_value_scales(weights: Weights, bits: int = _INT4) -> Weights:
    """Scales with which the largest weight of each block lies on the lowest point, as GenAI's builder chooses them.

    Args:
        weights: Of shape (rows, in).
        bits: Of a point.

    Returns:
        Of shape (rows, in / 32); zero for a block of zeros.
    """
    blocks = in_blocks(weights)
    return _representable(_largest(blocks) / np.float32(lowest_point(bits)))


def least_squares_scales(weights: Weights) -> Weights:
    """Scales with which the int4 points of each block have the smallest squared error among eleven choices.

    A block on a grid, some weight of which lies on −8, ±7 or ±6, gets the grid's scale.

    Args:
        weights: Of shape (rows, in).

    Returns:
        Of shape (rows, in / 32); zero for a block of zeros.
    """
    blocks = in_blocks(weights).reshape(-1, BLOCK_SIZE)
    scales = np.empty(len(blocks), np.float32)
    for start in range(0, len(blocks), _TOGETHER):
        scales[start : start + _TOGETHER] = _best_scales(blocks[start : start + _TOGETHER])
    return _representable(scales).reshape(len(weights), -1)


def _best_scales(blocks: Weights) -> Weights:
    """The scales (n,) of blocks (n, 32)."""
    lowest, largest = lowest_point(_INT4), _largest(blocks)
    # As shares of the largest, so that neither squares nor inverses leave the range of float32.
    shares = in_steps(blocks, _representable(largest))
    points = np.empty_like(shares)
    best, explained = np.zeros_like(largest), np.full_like(largest, -1)
    for steps in _LARGEST_AT:
        scale = np.float32(-1 / steps)
        np.multiply(shares, np.float32(-steps), out=points)
        np.clip(np.rint(points, out=points), lowest, -1 - lowest, out=points)
        # The squared error is Σ share² less this, and Σ share² is the same for every choice.
        fit = 2 * scale * np.einsum("ij,ij->i", points, shares)
        fit -= scale * scale * np.einsum("ij,ij->i", points, points)
        better = fit > explained
        np.copyto(explained, fit, where=better)
        np.copyto(best, largest / np.float32(-steps), where=better)
    return best


def nearest_points(weights: Weights, scales: Weights, bits: int = _INT4) -> Weights:
    """The points (rows, in) that are nearest to weights, as whole numbers of steps.

    Args:
        weights: Of shape (rows, in).
        scales: Of shape (rows, in / 32).
        bits: Of a point.
    """
    return clipped(rounded(in_steps(in_blocks(weights), scales), bits), bits).reshape(weights.shape)


def packed_points(points: Weights, bits: int = _INT4) -> NDArray[np.uint8]:
    """Points (rows, in) as they are stored: of int4 (rows, in / 2), two a byte and the low nibble first."""
    stored = (points - lowest_point(bits)).astype(np.uint8)
    return stored[:, 0::2] | stored[:, 1::2] << np.uint8(_INT4) if bits == _INT4 else stored


def in_blocks(weights: Weights) -> Weights:
    """Weights (rows, in) as (rows, in / 32, 32)."""
    return weights.reshape(len(weights), -1, BLOCK_SIZE)


def in_steps(blocks: Weights, scales: Weights) -> Weights:
    """Blocks (…, 32) in steps of their scales (…); zero where the scale is."""
    return blocks * inverse_of(scales)[..., None]


def inverse_of(scales: Weights) -> Weights:
    """One divided by each scale; zero where the scale is."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


def rounded(steps: Weights, bits: int = _INT4) -> Weights:
    """To whole steps; what lies between two goes up, counted from the lowest point, as in the builder's quantiser."""
    lowest = np.float32(lowest_point(bits))
    whole: Weights = np.floor(steps - lowest + np.float32(0.5)) + lowest
    return whole


def clipped(steps: Weights, bits: int = _INT4) -> Weights:
    """To the points that there are."""
    lowest = lowest_point(bits)
    return np.clip(steps, lowest, -1 - lowest)


def _largest(blocks: Weights) -> Weights:
    """The weight of largest magnitude in each block, with its sign; of two that differ in it, the one below zero."""
    least, most = blocks.min(axis=-1), blocks.max(axis=-1)
    largest: Weights = np.where(most > -least, most, least)
    return largest


def _representable(scales: Weights) -> Weights:
    """Scales, but zero where their inverse is beyond float32."""
    return np.where(np.abs(scales) < np.finfo(np.float32).tiny, 0 * scales, scales)
