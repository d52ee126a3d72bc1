"""Frozen weights as OpenVINO's products take them: bfloat16, float32 or int8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from edgetune.formats.roles import SCALES
from edgetune.model.blocks import BLOCK_SIZE, Block
from edgetune.runtimes.layered.backend import Allocate
from edgetune.runtimes.layered.channels import in_turn
from edgetune.runtimes.layered.onnxruntime.requantise import LARGEST_INT8, SMALLEST
from edgetune.runtimes.layered.openvino.tensor import BFLOAT16, tensor, to_bfloat16

_NIBBLE = 4
_INT8, _FLOAT = np.dtype(np.int8), np.dtype(np.float32)
_ELEMENTS = {BFLOAT16: ov.Type.bf16, _FLOAT: ov.Type.f32, _INT8: ov.Type.i8}


class OpenVinoWeights:
    """Makes them.

    Args:
        compile_model: Compiles a model that computes in float32.
        storage: The type of weights that are not int8.
    """

    def __init__(self, compile_model: Callable[[ov.Model], ov.CompiledModel], storage: np.dtype[Any]) -> None:
        self._compile = compile_model
        self._storage = storage
        self._unpackers: dict[tuple[int, int, int, int, np.dtype[Any]], ov.InferRequest] = {}

    def exact(self, block: Block, allocate: Allocate) -> NDArray[Any]:
        """The weight (out, in)."""
        out = allocate(block.shape, self._storage)
        if block.scales is not None:
            self._unpack(block, block.scales, [out])
        else:
            out[...] = to_bfloat16(block.values) if self._storage == BFLOAT16 else block.values
        return out

    def int8(self, block: Block, allocate: Allocate) -> dict[str, NDArray[Any]]:
        """The weight (out, in) as int8, and scales (out)."""
        out, scales = allocate(block.shape, _INT8), allocate(block.shape[:1], _FLOAT)
        if block.scales is not None:
            self._unpack(block, block.scales, [out, scales])
        else:
            largest = np.abs(block.values).max(axis=1).astype(np.float32)
            scales[...] = np.maximum(largest / LARGEST_INT8, SMALLEST)
            out[...] = np.rint(block.values / scales[:, None])
        return {"": out, SCALES: scales}

    def _unpack(self, block: Block, scales: NDArray[np.float32], outputs: Sequence[NDArray[Any]]) -> None:
        """Write the weight, and if it is to be int8 its scales."""
        out = outputs[0]
        rows, columns = out.shape
        size = block.group or columns
        key = (block.bits, rows, columns, size, out.dtype)
        if key not in self._unpackers:
            self._unpackers[key] = self._compile(_unpack_model(*key)).create_infer_request()
        request = self._unpackers[key]
        # A request holds its tensors, and these no arrays.
        inputs = [np.ascontiguousarray(array) for array in (block.values, scales)]
        for place, array in enumerate(inputs):
            request.set_input_tensor(place, tensor(array))
        for place, array in enumerate(outputs):
            request.set_output_tensor(place, tensor(array))
        request.start_async()
        request.wait()
        if block.bits == _NIBBLE and not block.group:
            out[...] = in_turn(out, 1, size)


def _unpack_model(bits: int, rows: int, columns: int, group: int, dtype: np.dtype[Any]) -> ov.Model:
    """(q − zero point) · scale: bytes (rows, columns · bits / 8), scales (rows, columns / 32) to (rows, columns).

    Of int4 the evens come first. With h = ⌊byte / 16⌋ the nibbles are byte − 16h and h: byte · (1, 0) + h · (−16, 1),
    both in one go over memory. Weights that are to be int8 are divided by the second output, one step for each row.
    """
    groups, blocks = columns // group, group // BLOCK_SIZE
    packed = op.parameter([rows, columns * bits // 8], ov.Type.u8)
    scales = op.parameter([rows, columns // BLOCK_SIZE], ov.Type.f32)
    byte = op.convert(_reshaped(packed, rows, groups, 1, blocks, BLOCK_SIZE * bits // 8), ov.Type.f32)
    if bits == _NIBBLE:
        both = (1, 1, 2, 1, 1)
        high = op.multiply(op.floor(op.multiply(byte, _floats(1 / 16))), _floats([-16, 1], both))
        value = op.add(high, op.subtract(op.multiply(byte, _floats([1, 0], both)), _floats(8)))
    else:
        value = op.subtract(byte, _floats(128))
    factors = _reshaped(scales, rows, groups, 1, blocks, 1)
    if dtype != _INT8:
        weight = op.convert(op.multiply(value, factors), _ELEMENTS[dtype])
        return ov.Model([_reshaped(weight, rows, columns)], [packed, scales], "unpack")
    largest = op.reduce_max(op.abs(scales), op.constant([1]), True)
    steps = op.maximum(op.multiply(largest, _floats(2 ** (bits - 1) / LARGEST_INT8)), _floats(SMALLEST))
    factors = op.divide(factors, _reshaped(steps, rows, 1, 1, 1, 1))
    weight = op.convert(op.floor(op.add(op.multiply(value, factors), _floats(0.5))), ov.Type.i8)
    outputs = [_reshaped(weight, rows, columns), _reshaped(steps, rows)]
    return ov.Model(outputs, [packed, scales], "unpack")


def _reshaped(value: ov.Node, *shape: int) -> ov.Node:
    return op.reshape(value, op.constant(list(shape)), False)


def _floats(values: float | list[float], shape: tuple[int, ...] = ()) -> ov.Node:
    return op.constant(np.array(values, np.float32).reshape(shape))
