"""Frozen weights as OpenVINO's products take them: bfloat16, float32, or rotated and rounded to int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as op

from edgetune.formats.roles import SCALES
from edgetune.model.bfloat16 import BFLOAT16, to_bfloat16
from edgetune.model.blocks import BLOCK_SIZE, Block
from edgetune.model.rotation import rotated_weight, signs_of
from edgetune.runtimes.layered.backend import Allocate
from edgetune.runtimes.layered.onnxruntime.requantise import LARGEST_INT8, SMALLEST
from edgetune.runtimes.layered.openvino.products import multiplied_by
from edgetune.runtimes.layered.openvino.tensor import tensor

_NIBBLE = 4
_AT_ONCE = 1 << 19
"""Weights that are rotated at a time, about: what lies between operators stays in a processor's cache."""
_INT8, _FLOAT = np.dtype(np.int8), np.dtype(np.float32)
_ELEMENTS = {BFLOAT16: ov.Type.bf16, _FLOAT: ov.Type.f32}
_Build = Callable[[ov.Output], ov.Node]
"""Makes a model's output of a weight (rows, columns)."""
_Key = tuple[_Build, ov.Type, int, int, int, int]


class OpenVinoWeights:
    """Makes them.

    Args:
        compile_model: Compiles a model that multiplies in a type, and computes all else in float32.
        storage: The type of weights that are not int8, in which rotations are multiplied.
    """

    def __init__(self, compile_model: Callable[[ov.Model, ov.Type], ov.CompiledModel], storage: np.dtype[Any]) -> None:
        self._compile = compile_model
        self._storage = storage
        self._element = _ELEMENTS[storage]
        self._requests: dict[_Key, ov.InferRequest] = {}

    def exact(self, block: Block, allocate: Allocate) -> NDArray[Any]:
        """The weight (out, in)."""
        out = allocate(block.shape, self._storage)
        if block.scales is not None:
            self._unpack(_as_it_is, block, slice(None), block.scales, out)
        else:
            out[...] = to_bfloat16(block.values) if self._storage == BFLOAT16 else block.values
        return out

    def int8(self, block: Block, allocate: Allocate, scales: NDArray[np.float32] | None) -> dict[str, NDArray[Any]]:
        """The rotated weight (out, in) as int8, and scales (out), which are found unless they are known."""
        out = allocate(block.shape, _INT8)
        if block.scales is None:
            rotated = rotated_weight(block.values)
            scales = np.maximum(np.abs(rotated).max(axis=1) / LARGEST_INT8, SMALLEST) if scales is None else scales
            out[...] = np.rint(rotated / scales[:, None])
            return {"": out, SCALES: scales}
        found = np.empty(len(out), np.float32) if scales is None else scales
        most = 1 << max(1, _AT_ONCE // out.shape[1]).bit_length() - 1
        for start in range(0, len(out), most):
            part = slice(start, start + most)
            if scales is None:
                self._unpack(_steps, block, part, block.scales[part], found[part])
            self._unpack(_rounded, block, part, block.scales[part] / found[part, None], out[part])
        return {"": out, SCALES: found}

    def _unpack(
        self, build: _Build, block: Block, part: slice, scales: NDArray[np.float32], out: NDArray[Any]
    ) -> None:
        """Write what is made of these rows of a weight in blocks, with these scales."""
        rows, blocks = scales.shape
        # What is not multiplied is converted where it is unpacked, in one go over memory.
        exact = build is _as_it_is
        key = (build, self._element if exact else ov.Type.f32, block.bits, rows, blocks * BLOCK_SIZE, block.group)
        if key not in self._requests:
            packed, factors, weight = _unpacked(*key[1:])
            model = ov.Model([build(weight)], [packed, factors], "unpack")
            compiled = self._compile(model, ov.Type.f32 if exact else self._element)
            self._requests[key] = compiled.create_infer_request()
        request = self._requests[key]
        # A request holds its tensors, and these no arrays.
        inputs = [np.ascontiguousarray(array) for array in (block.values[part], scales)]
        for place, array in enumerate(inputs):
            request.set_input_tensor(place, tensor(array))
        request.set_output_tensor(0, tensor(out))
        request.start_async()
        request.wait()


def _unpacked(
    element: ov.Type, bits: int, rows: int, columns: int, group: int
) -> tuple[ov.Node, ov.Node, ov.Output]:
    """(q − zero point) · scale: bytes (rows, columns · bits / 8), scales (rows, columns / 32) to (rows, columns).

    Of int4 the evens of a group come first, or all are in turn where there are no groups. With h = ⌊byte / 16⌋ the
    nibbles are byte − 16h and h: byte · (1, 0) + h · (−16, 1), both in one go over memory.
    """
    size = group or columns
    groups, blocks = columns // size, size // BLOCK_SIZE
    packed = op.parameter([rows, columns * bits // 8], ov.Type.u8)
    scales = op.parameter([rows, columns // BLOCK_SIZE], ov.Type.f32)
    byte = op.convert(_reshaped(packed, rows, groups, 1, blocks, BLOCK_SIZE * bits // 8), ov.Type.f32)
    if bits == _NIBBLE:
        both = (1, 1, 2, 1, 1)
        high = op.multiply(op.floor(op.multiply(byte, _floats(1 / 16))), _floats([-16, 1], both))
        value = op.add(high, op.subtract(op.multiply(byte, _floats([1, 0], both)), _floats(8)))
    else:
        value = op.subtract(byte, _floats(128))
    weight = op.convert(op.multiply(value, _reshaped(scales, rows, groups, 1, blocks, 1)), element)
    if bits == _NIBBLE and not group:
        weight = op.transpose(weight, op.constant([0, 1, 3, 4, 2]))
    return packed, scales, _reshaped(weight, rows, columns).output(0)


def _as_it_is(weight: ov.Output) -> ov.Node:
    return weight.get_node()


def _rotated(weight: ov.Output) -> ov.Output:
    signs = signs_of(weight.shape[1])
    return multiplied_by(signs / np.float32(len(signs)), weight)


def _steps(weight: ov.Output) -> ov.Node:
    """One step of int8 for each row."""
    largest = op.reduce_max(op.abs(_rotated(weight)), op.constant([1]), False)
    return op.maximum(op.multiply(largest, _floats(1 / LARGEST_INT8)), _floats(SMALLEST))


def _rounded(weight: ov.Output) -> ov.Node:
    """Of a weight in steps of its rows."""
    steps = op.clamp(_rotated(weight), -LARGEST_INT8, LARGEST_INT8)
    return op.convert(op.floor(op.add(steps, _floats(0.5))), ov.Type.i8)


def _reshaped(value: ov.Node, *shape: int) -> ov.Node:
    return op.reshape(value, op.constant(list(shape)), False)


def _floats(values: float | list[float], shape: tuple[int, ...] = ()) -> ov.Node:
    return op.constant(np.array(values, np.float32).reshape(shape))
