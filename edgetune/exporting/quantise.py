"""A weight and its update on an int4 grid, so that the sum keeps what was learnt.

An update is smaller than half a step of the grid almost everywhere. Where the weights lie on the grid, as those of an
int4 base do, rounding the sum to nearest would give the base again. There the update is added as a whole number of
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

Weights = NDArray[np.float32]

_BITS = BITS["int4"]
_ZERO_POINT = 1 << (_BITS - 1)
_LOWEST, _HIGHEST = -_ZERO_POINT, _ZERO_POINT - 1
"""Points of the grid, in steps."""
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


def scales_of(weights: Weights) -> Weights:
    """Scales (rows, in / 32) with which the largest weight of each block lies on the grid's lowest point.

    This is what GenAI's builder does for an int4 base.

    Args:
        weights: Of shape (rows, in).
    """
    blocks = _blocks(weights)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    return largest[..., 0] / np.float32(_LOWEST)


def on_grid(weights: Weights, scales: Weights, update: Weights, draws: Weights) -> tuple[NDArray[np.uint8], Weights]:
    """Round a weight and its update together.

    Without an update every weight is at its nearest point: what was on the grid comes back to the byte. A block that
    is on the grid keeps its scale, unless the sum leaves the grid by so much that rounding all of it onto a wider one
    costs less.

    Args:
        weights: Of shape (rows, in).
        scales: The base's, (rows, in / 32).
        update: What is added, (rows, in).
        draws: Uniformly from 0 to 1, (rows, in).

    Returns:
        The weights (rows, in / 2), two a byte and the low nibble first, and their scales (rows, in / 32).
    """
    base, change = _in_steps(_blocks(weights), scales), _in_steps(_blocks(update), scales)
    nearest = _rounded(base)
    points = _clipped(nearest + np.floor(change + _blocks(draws)))
    anew = np.abs(base - nearest).max(axis=-1) > _ON_GRID
    anew |= np.square(base + change - _clipped(base + change)).sum(axis=-1) > _MOST_CLIPPED
    # Where a scale is zero, so is the base, and its update has no step to be counted in.
    anew |= (scales == 0) & _blocks(update).any(axis=-1)
    if anew.any():
        total = (_blocks(weights) + _blocks(update))[anew]
        scales = scales.copy()
        scales[anew] = scales_of(total)[:, 0]
        points[anew] = _clipped(_rounded(_in_steps(total[:, None], scales[anew][:, None])))[:, 0]
    stored = (points.reshape(weights.shape) + _ZERO_POINT).astype(np.uint8)
    return stored[:, 0::2] | stored[:, 1::2] << np.uint8(_BITS), scales


def _blocks(weights: Weights) -> Weights:
    """Of shape (rows, in / 32, 32)."""
    return weights.reshape(len(weights), -1, BLOCK_SIZE)


def _in_steps(blocks: Weights, scales: Weights) -> Weights:
    """Of shape (rows, in / 32, 32); zero where the scale is."""
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return blocks * inverse[..., None]


def _rounded(steps: Weights) -> Weights:
    """To whole steps; what lies between two goes away from zero, as in the builder's quantiser."""
    return np.copysign(np.floor(np.abs(steps) + np.float32(0.5)), steps)


def _clipped(steps: Weights) -> Weights:
    return np.clip(steps, _LOWEST, _HIGHEST)
