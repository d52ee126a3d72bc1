"""Frozen weights as int8 matrices: for the forward pass with a scale for each row, for the backward pass of columns.

A product's scales can be taken out of its sum only where they belong to what is not summed over: x·Wᵀ has one for each
row of W, y·W one for each column. Weights are rotated first (edgetune.model.rotation), some rows at a time. Graphs of
older bundles do not rotate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.formats.roles import FORWARD, SCALES
from edgetune.model.blocks import BLOCK_SIZE, Block
from edgetune.model.rotation import rotated_weight, signs_of
from edgetune.runtimes.layered.backend import Allocate, LayeredGraph

_INT8 = np.dtype(np.int8)
LARGEST_INT8 = 127
SMALLEST = 1e-30
"""The least scale, for weights that are all zero."""
_AT_ONCE = 1 << 20
"""Weights that are rotated at a time, about: what lies between operators stays in a processor's cache."""
_ROTATION = "rotation"


class Requantiser:
    """Makes int8 matrices.

    Args:
        dequantise: Turns blocks into float32.
        graphs: Turn blocks into int8 (edgetune.preparation.rewrites.int8_products), one for the way forward and one for
            the way back.
    """

    def __init__(self, dequantise: LayeredGraph, graphs: Mapping[str, LayeredGraph]) -> None:
        self._dequantise = dequantise
        self._graphs = graphs

    def weight(
        self, layout: str, block: Block, allocate: Allocate, scales: NDArray[np.float32] | None
    ) -> dict[str, NDArray[Any]]:
        """`W.forward`, int8 (in, out), with scales (out); or `W.backward`, int8 (out, in), with scales (in).

        Scales are found unless they are known.
        """
        forward = layout == FORWARD
        weight = allocate(block.shape[::-1] if forward else block.shape, _INT8)
        if _ROTATION not in self._graphs[layout].inputs:
            return {"": weight, SCALES: self._as_it_lies(layout, block, weight)}
        most = max(1, _AT_ONCE // block.shape[1])
        parts = [slice(start, start + most) for start in range(0, block.shape[0], most)]
        found = self._scales(layout, block, parts) if scales is None else scales
        for part in parts:
            place = weight[:, part] if forward else weight[part]
            place[...] = self._rounded(layout, block, part, found)
        return {"": weight, SCALES: found}

    def _scales(self, layout: str, block: Block, parts: Iterable[slice]) -> NDArray[np.float32]:
        """A 127th of what is largest in each row of a rotated weight, or in each column."""
        axis = 1 if layout == FORWARD else 0
        found = []
        for part in parts:
            rotated = rotated_weight(self._exact(block, part))
            found.append(np.maximum(rotated.max(axis), -rotated.min(axis)))
        largest = np.concatenate(found) if layout == FORWARD else np.max(found, axis=0)
        scales: NDArray[np.float32] = np.maximum(largest / np.float32(LARGEST_INT8), np.float32(SMALLEST))
        return scales

    def _exact(self, block: Block, part: slice) -> NDArray[np.floating]:
        """Rows of a weight."""
        values = block.values[part]
        if block.scales is None:
            return values
        weight = np.empty((len(values), block.shape[1]), np.float32)
        inputs = {"packed": values, "rows": np.arange(len(values), dtype=np.int64), "scales": block.scales[part]}
        self._dequantise.run({name: np.ascontiguousarray(array) for name, array in inputs.items()}, {"weight": weight})
        return weight

    def _rounded(
        self, layout: str, block: Block, part: slice, steps: NDArray[np.float32]
    ) -> NDArray[np.int8] | NDArray[np.floating]:
        """Rows of a rotated weight as whole numbers, (in, rows) for the forward pass and (rows, in) for the other."""
        forward = layout == FORWARD
        if block.scales is None:
            rotated = rotated_weight(block.values[part])
            whole: NDArray[np.float32] = np.rint(rotated / (steps[part, None] if forward else steps))
            return whole.T if forward else whole
        values, scales, columns = block.values[part], block.scales[part], block.shape[1]
        signs = signs_of(columns)
        size, rows = len(signs), len(values)
        inputs: dict[str, NDArray[Any]] = {
            "packed": np.ascontiguousarray(values).reshape(rows, columns // size, -1),
            "rows": np.arange(rows, dtype=np.int64),
            "scales": np.ascontiguousarray(scales / steps[part, None] if forward else scales),
            _ROTATION: signs / np.float32(size),
        }
        inputs["scales"] = inputs["scales"].reshape(rows, columns // size, -1)
        if not forward:
            inputs["steps"] = steps.reshape(-1, size)
        shape = (columns // size, size, rows) if forward else (rows, columns // size, size)
        rounded = np.empty(shape, np.int8)
        self._graphs[layout].run(inputs, {"weight": rounded})
        return rounded.reshape((columns, rows) if forward else (rows, columns))

    def _as_it_lies(self, layout: str, block: Block, weight: NDArray[np.int8]) -> NDArray[np.float32]:
        """Write a matrix without rotation, and give its scales."""
        axis = 1 if layout == FORWARD else 0
        largest = np.abs(block.values if block.scales is None else block.scales).max(axis, keepdims=True)
        if block.scales is None:
            steps = np.maximum(largest.astype(np.float32) / LARGEST_INT8, SMALLEST)
            rounded = np.rint(block.values / steps)
            weight[...] = rounded.T if layout == FORWARD else rounded
            found: NDArray[np.float32] = steps.ravel().astype(np.float32)
            return found
        # A weight in blocks is never larger than its zero point times its scale.
        steps = np.maximum(largest * np.float32(block.zero_point / LARGEST_INT8), np.float32(SMALLEST))
        rows = np.arange(len(block.values), dtype=np.int64)
        inputs = {"packed": np.ascontiguousarray(block.values), "rows": rows, "scales": block.scales / steps}
        self._graphs[layout].run(inputs, {"weight": weight})
        return np.repeat(steps, 1 if layout == FORWARD else BLOCK_SIZE)
