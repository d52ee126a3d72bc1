"""The rotation in which rows are rounded to int8: an enormous number is spread over its neighbours.

A row that is rounded by its largest number loses the others where one is enormous, as trained language models have
them. For an orthogonal matrix R, x·Wᵀ = (x·R)·(W·R)ᵀ; a row of x·R has no such number, and the same matrix W·R serves
the backward pass, dy·W = (dy·(W·R))·Rᵀ (QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456; QuIP#, Tseng et
al. 2024, https://arxiv.org/abs/2402.04396).

R consists of Hadamard matrices along its diagonal: channels are rotated in blocks of up to 64 neighbours. Sylvester's
Hadamard matrix H has entries ±1 and is symmetric, and H·H is its size. What is multiplied is H for activations and
gradients, H / size for weights: powers of two, which bfloat16 holds exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LARGEST_BLOCK = 64
"""Channels of a block, at most. Larger ones cost more and were no better on a real model (docs/precision.md)."""


def signs_of(width: int) -> NDArray[np.float32]:
    """H for rows of so many channels, (size, size): size is the largest power of two up to 64 that divides them."""
    size = min(width & -width, LARGEST_BLOCK)
    signs = np.ones((1, 1), np.float32)
    while len(signs) < size:
        signs = np.kron(np.array([[1, 1], [1, -1]], np.float32), signs)
    return signs


def rotated_weight(weight: NDArray[np.floating]) -> NDArray[np.float32]:
    """W·H / size of a weight (out, in): what x·H is multiplied with."""
    signs = signs_of(weight.shape[1])
    blocks = weight.astype(np.float32).reshape(-1, len(signs))
    turned: NDArray[np.float32] = blocks @ (signs / np.float32(len(signs)))
    return turned.reshape(weight.shape)
