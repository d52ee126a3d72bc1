"""DoRA's gains: by what each row of a slot's result is multiplied, found without a pass over the weights.

With P = W·Aᵀ (out, rank), the squared norms of the rows of W + s·B·A are
n_i² = ‖w_i‖² + Σ_j B_ij · (2·s·P_ij + s²·(B·A·Aᵀ)_ij). The gain is g = m / n, and since n counts as a constant when the
loss is differentiated (Liu et al. 2024, section 4.3), ∂m = ∂g / n.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SMALLEST_SQUARE = 1e-30
"""Instead of the squared norm of a row of zeros, whose magnitude is zero as well: its gain is 0, and no NaN."""
Array = NDArray[np.float32]


def row_norms(row_norm: Array, projected: Array, a: Array, b: Array, scaling: float) -> Array:
    """‖W + s·B·A‖ (out,), by rows.

    Args:
        row_norm: ‖w_i‖ (out,) of the frozen weight.
        projected: A·Wᵀ (rank, out).
        a: A (rank, in).
        b: B (out, rank).
        scaling: s.
    """
    change = 2 * scaling * projected.T + scaling**2 * (b @ (a @ a.T))
    square = np.square(row_norm) + np.einsum("ij,ij->i", b, change)
    norms: Array = np.sqrt(np.maximum(square, SMALLEST_SQUARE), dtype=np.float32)
    return norms


def gains_of(magnitudes: Array, norms: Array) -> Array:
    """g (out,) of magnitudes (out,) and the norms (out,) that `row_norms` gives."""
    gains: Array = magnitudes / norms
    return gains
