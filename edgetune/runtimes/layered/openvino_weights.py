"""Frozen weights as OpenVINO's products take them: bfloat16, float32 or int8.

A byte of an int4 block holds an even and an odd weight; what comes out fastest is all even ones, then all odd ones of a
block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from edgetune.frozen import BLOCK_SIZE, SCALES, Block
from edgetune.runtimes.layered.backend import Allocate
from edgetune.runtimes.layered.openvino_tensor import BFLOAT16, tensor, to_bfloat16

_HALF = BLOCK_SIZE // 2
_INT8, _FLOAT = np.dtype(np.int8), np.dtype(np.float32)
_LARGEST_INT4, _LARGEST_INT8 = 8, 127
_SMALLEST = 1e-30
"""The least scale, for weights that are all zero."""
_ELEMENTS = {BFLOAT16: ov.Type.bf16, _FLOAT: ov.Type.f32, _INT8: ov.Type.i8}


class OpenVinoWeights:
    """Makes them.

    Args:
        compile_model: Compiles a model that computes in float32.
        storage: The type of weights that are not int8.
        evens_first: Leave the channels of each block in the order in which they come out; otherwise they are put into
            their own, which takes longer.
    """

    def __init__(
        self, compile_model: Callable[[ov.Model], ov.CompiledModel], storage: np.dtype[Any], evens_first: bool
    ) -> None:
        self._compile = compile_model
        self._storage = storage
        self._evens_first = evens_first
        self._unpackers: dict[tuple[int, int, np.dtype[Any]], ov.InferRequest] = {}

    def exact(self, block: Block, allocate: Allocate) -> NDArray[Any]:
        """The weight (out, in)."""
        out = allocate(block.shape, self._storage)
        if block.scales is not None:
            self._unpack(block.values, block.scales, out)
            return out
        values = self._ordered(block.values)
        out[...] = to_bfloat16(values) if self._storage == BFLOAT16 else values
        return out

    def int8(self, block: Block, allocate: Allocate) -> dict[str, NDArray[Any]]:
        """The weight (out, in) as int8, and scales (out)."""
        out, scales = allocate(block.shape, _INT8), allocate(block.shape[:1], _FLOAT)
        if block.scales is not None:
            # An int4 weight is never larger than 8 scales.
            steps = _steps(block.scales, _LARGEST_INT8 / _LARGEST_INT4)
            self._unpack(block.values, block.scales / steps, out)
        else:
            steps = _steps(block.values, _LARGEST_INT8)
            out[...] = np.rint(self._ordered(block.values) / steps)
        scales[...] = steps.ravel()
        return {"": out, SCALES: scales}

    def _unpack(self, packed: NDArray[Any], scales: NDArray[np.float32], out: NDArray[Any]) -> None:
        rows, blocks = scales.shape
        packed, scales = (np.ascontiguousarray(array) for array in (packed, scales))
        key = (rows, blocks, out.dtype)
        if key not in self._unpackers:
            self._unpackers[key] = self._compile(_unpack_model(rows, blocks, out.dtype)).create_infer_request()
        request = self._unpackers[key]
        arrays = (packed.reshape(rows, blocks, 1, _HALF), scales.reshape(rows, blocks, 1, 1))
        tensors = [tensor(array) for array in arrays]
        for place, given in enumerate(tensors):
            request.set_input_tensor(place, given)
        halves = out.reshape(rows, blocks, 2, _HALF)
        result = tensor(halves)
        request.set_output_tensor(0, result)
        request.start_async()
        request.wait()
        if not self._evens_first:
            out[...] = halves.swapaxes(2, 3).reshape(out.shape)

    def _ordered(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Weights (rows, channels) in the order in which int4 blocks come out, where that is wanted."""
        rows, channels = values.shape
        if not self._evens_first or channels % BLOCK_SIZE:
            return values
        return np.ascontiguousarray(values).reshape(rows, -1, _HALF, 2).swapaxes(2, 3).reshape(rows, channels)


def _steps(values: NDArray[np.float32], most: float) -> NDArray[np.float32]:
    """What one step of int8 is worth in each row, (rows, 1)."""
    largest: NDArray[np.float32] = np.abs(values).max(axis=1, keepdims=True)
    steps: NDArray[np.float32] = np.maximum(largest / np.float32(most), np.float32(_SMALLEST))
    return steps


def _unpack_model(rows: int, blocks: int, dtype: np.dtype[Any]) -> ov.Model:
    """(q − 8) · scale: bytes (rows, blocks, 1, 16), scales (rows, blocks, 1, 1) to (rows, blocks, 2, 16).

    With t = ⌊byte · (1, 1/16)⌋ the nibble is t − 16⌊t/16⌋, for the low and the high half at once: one pass over memory.
    """
    packed = op.parameter([rows, blocks, 1, _HALF], ov.Type.u8)
    scales = op.parameter([rows, blocks, 1, 1], ov.Type.f32)
    shifts = op.constant(np.array([1, 1 / 16], np.float32).reshape(1, 1, 2, 1))
    shifted = op.floor(op.multiply(op.convert(packed, ov.Type.f32), shifts))
    above = op.multiply(op.floor(op.multiply(shifted, op.constant(np.float32(1 / 16)))), op.constant(np.float32(16)))
    value = op.multiply(op.subtract(op.subtract(shifted, above), op.constant(np.float32(8))), scales)
    if dtype == _INT8:
        value = op.floor(op.add(value, op.constant(np.float32(0.5))))
    return ov.Model([op.convert(value, _ELEMENTS[dtype])], [packed, scales], "unpack")
