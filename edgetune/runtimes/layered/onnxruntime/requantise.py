"""Frozen weights as int8 matrices: for the forward pass with a scale for each row, for the backward pass of columns.

A product's scales can be taken out of its sum only where they belong to what is not summed over: x·Wᵀ has one for each
row of W, y·W one for each column.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.formats.roles import BACKWARD, FORWARD, SCALES
from edgetune.model.blocks import BLOCK_SIZE, Block
from edgetune.runtimes.layered.backend import Allocate, LayeredGraph

_INT8 = np.dtype(np.int8)
LARGEST_INT8 = 127
SMALLEST = 1e-30
"""The least scale, for weights that are all zero."""


class Requantiser:
    """Makes int8 matrices.

    Args:
        graphs: Turn int4 blocks into int8 (edgetune.preparation.rewrites.int8_products), one for the way forward and
            one for the way back.
    """

    def __init__(self, graphs: dict[str, LayeredGraph]) -> None:
        self._graphs = graphs

    def weight(self, layout: str, block: Block, allocate: Allocate) -> dict[str, NDArray[Any]]:
        """`W.forward`, int8 (in, out), with scales (out); or `W.backward`, int8 (out, in), with scales (in)."""
        shape, axis = (block.shape[::-1], 1) if layout == FORWARD else (block.shape, 0)
        weight, scales = allocate(shape, _INT8), np.empty(shape[1], np.float32)
        largest = np.abs(block.values if block.scales is None else block.scales).max(axis, keepdims=True)
        if block.scales is None:
            steps = np.maximum(largest.astype(np.float32) / LARGEST_INT8, SMALLEST)
            rounded = np.rint(block.values / steps)
            weight[...] = rounded.T if layout == FORWARD else rounded
        else:
            # A weight in blocks is never larger than its zero point times its scale.
            steps = np.maximum(largest * (block.zero_point / LARGEST_INT8), SMALLEST)
            rows = np.arange(len(block.values), dtype=np.int64)
            inputs = {"packed": np.ascontiguousarray(block.values), "rows": rows, "scales": block.scales / steps}
            self._graphs[layout].run(inputs, {"weight": weight})
        per_column = layout == BACKWARD and block.scales is not None
        scales[...] = np.repeat(steps, BLOCK_SIZE) if per_column else steps.ravel()
        return {"": weight, SCALES: scales}
