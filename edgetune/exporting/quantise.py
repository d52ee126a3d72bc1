"""A weight and its update on a grid of int4 or int8, so that the sum keeps what was learnt.

An update is smaller than half a step of int4's grid almost everywhere. Where the weights lie on the grid, as those of
an int4 base do, rounding the sum to nearest would give the base again. There the update is added as a whole number of
steps that it is the expected value of: up with the probability of its fraction, drawn from a seeded generator. The
errors have mean zero and depend neither on each other nor on the update; over the hundreds of inputs of a product they
cancel, and the update stays. Weights that lie anywhere between the points do the same service as the draws, and with
less noise: then the sum goes to its nearest point.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from edgetune.model.blocks import BITS, BLOCK_SIZE
from edgetune.model.rounding import (
    Weights,
    clipped,
    in_blocks,
    in_steps,
    largest_value_scales,
    least_squares_scales,
    nearest_points,
    packed_points,
    rounded,
)

_SEED = 0
"""The same bundle and adapter give the same model."""
_ON_GRID = 1 / 32
"""Steps by which a weight may miss its point and still lie on the grid: what bfloat16 does to one that did."""
_MOST_CLIPPED = BLOCK_SIZE / 12
"""Squared steps by which a block may leave the grid: what rounding all its weights anew costs."""


def generator_of(name: str) -> np.random.Generator:
    """Where the draws of a layer come from, whatever other layers there are and in whichever order they come.

    Args:
        name: Of the layer's weight.
    """
    return np.random.default_rng([_SEED, zlib.crc32(name.encode())])


def fresh_scales(weights: Weights, bits: int) -> Weights:
    """Scales for weights that lie on no grid, chosen as `prepare` does.

    Args:
        weights: Of shape (rows, in).
        bits: Of a point.

    Returns:
        Of shape (rows, in / 32).
    """
    return least_squares_scales(weights) if bits == BITS["int4"] else largest_value_scales(weights, bits)


def on_grid(
    weights: Weights, scales: Weights, update: Weights, draws: Weights, bits: int = BITS["int4"]
) -> tuple[NDArray[np.uint8], Weights]:
    """Round a weight and its update together.

    Without an update every weight is at its nearest point: what was on the grid comes back to the byte. A block that
    is on the grid keeps its scale, unless the sum leaves the grid by so much that rounding all of it onto a wider one
    costs less.

    Args:
        weights: Of shape (rows, in).
        scales: The base's, (rows, in / 32).
        update: What is added, (rows, in).
        draws: Uniformly from 0 to 1, (rows, in).
        bits: Of a point.

    Returns:
        The weights as `packed_points` stores them, and their scales (rows, in / 32).
    """
    base, change = in_steps(in_blocks(weights), scales), in_steps(in_blocks(update), scales)
    nearest = rounded(base, bits)
    points = clipped(nearest + np.floor(change + in_blocks(draws)), bits)
    anew = np.abs(base - nearest).max(axis=-1) > _ON_GRID
    anew |= np.square(base + change - clipped(base + change, bits)).sum(axis=-1) > _MOST_CLIPPED
    # Where a scale is zero, so is the base, and its update has no step to be counted in.
    anew |= (scales == 0) & in_blocks(update).any(axis=-1)
    if anew.any():
        total = (in_blocks(weights) + in_blocks(update))[anew]
        found = fresh_scales(total, bits)
        scales = scales.copy()
        scales[anew] = found[:, 0]
        points[anew] = nearest_points(total, found, bits)
    return packed_points(points.reshape(weights.shape), bits), scales
