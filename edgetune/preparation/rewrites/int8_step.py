"""The whole step with int8 frozen weights, for NPUs: half the weights of float16, and integer products.

Two kinds. `qdq`: each row of a product's factor is divided by its largest magnitude and rounded to 16 bits, as the
result is over a range that was measured, and multiplied by that magnitude again; with one range for all rows the
massive activations of the first token would leave the others a handful of steps. Weights have 8 bits with a scale for
each column of the product; compilers recognise the pattern of QuantizeLinear and DequantizeLinear around MatMul and
multiply integers. `blocks`: ONNX Runtime's `MatMulNBits` with 8 bits, a scale for 32 neighbours along the sum,
activations as they are. Each product has a matrix of its own, so that its scales are those of its columns: W (out, in)
backward, its transpose forward. Everything else stays as in `step` and `loss`.

What the forward pass rounds goes through all layers above, and into every gradient. There a `qdq` weight is the sum of
two int8 matrices, the second being what rounding left of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgetune.config import Base, NpuKind
from edgetune.errors import IncompatibleError
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.roles import FORWARD
from edgetune.model.architecture import Architecture
from edgetune.model.blocks import BLOCK_SIZE
from edgetune.preparation.rewrites.frozen_weights import attach_weights, cancel_transposes
from edgetune.preparation.rewrites.int8_products import frozen_product
from edgetune.preparation.rewrites.operators import CONTRIB, Operators, remove_unused
from edgetune.preparation.rewrites.ranges import Range, row_factors
from edgetune.preparation.rewrites.shapes import dimensions

DATA = "int8.onnx.data"
"""The int8 weights of both graphs."""
_MARGIN = 2.0
"""Factor by which ranges are wider than measured, for other rows and for trained adapters."""
_LEVELS = 65535
_LARGEST = 127
_BLOCK_ZERO = 128
_ALIGNMENT = 4096
"""Tensors begin at multiples of so many bytes in the file, so that they can be mapped."""
_Scaled = tuple[ir.ExternalTensor, NDArray[np.float32]]
"""An integer matrix and its scales."""


def write_int8_graphs(
    graphs: Mapping[str, ir.Model],
    folder: Path,
    architecture: Architecture,
    base: Base,
    kind: NpuKind,
    ranges: Mapping[str, Range],
) -> list[str]:
    """Write `step_int8.onnx`, `loss_int8.onnx` and their weights.

    Args:
        graphs: The lowered graphs `step` and `loss`, whose frozen weights are inputs; they are changed.
        folder: The folder of the bundle that is being built; it holds the GenAI model and the layered form already.
        architecture: Sizes of the model.
        base: How the GenAI model stores linear layers.
        kind: `qdq` or `blocks`.
        ranges: The ranges that `calibrate` measured.

    Returns:
        The roles that were written.
    """
    with (folder / DATA).open("wb") as file:
        weights = _Int8Weights(file, folder, architecture)
        for name, model in graphs.items():
            quantise_frozen(model, kind, weights, ranges)
            attach_weights(model, folder, architecture, base)
            ir.save(model, folder / f"{name}_int8.onnx")
    return [f"{name}_int8" for name in graphs]


class _Int8Weights:
    """Quantised frozen weights, each written once, however many graphs take it.

    Args:
        file: The data file, open for writing.
        folder: The folder of the file; it holds the weights as the bundle stores them, too.
        architecture: Sizes of the model.
    """

    def __init__(self, file: BinaryIO, folder: Path, architecture: Architecture) -> None:
        self._file, self._folder = file, folder
        self._frozen = FrozenWeights(folder, architecture)
        self._tensors: dict[str, ir.ExternalTensor] = {}
        self._scales: dict[str, NDArray[np.float32]] = {}

    def columns(self, weight: str, direction: str) -> list[_Scaled]:
        """The weight as a sum of int8 matrices (K, N), with a scale for each of the N columns; backward of one."""
        terms = [f"{weight}.{direction}"]
        if direction == FORWARD:
            terms.append(f"{terms[0]}.rest")
        if terms[0] not in self._tensors:
            rest = self._matrix(weight, direction)
            for name in terms:
                scales = np.maximum(np.abs(rest).max(axis=0), np.finfo(np.float32).tiny) / np.float32(_LARGEST)
                rounded = np.round(rest / scales)
                self._write(name, rounded.astype(np.int8))
                self._scales[name] = scales.astype(np.float32)
                rest = rest - rounded * scales
        return [(self._tensors[name], self._scales[name]) for name in terms]

    def blocks(self, weight: str, direction: str) -> _Scaled:
        """The weight as uint8 (N, K / 32, 32) with zero point 128, and a scale for each block (N · K / 32)."""
        name = f"{weight}.{direction}"
        if name not in self._tensors:
            blocks = self._matrix(weight, direction).T
            blocks = blocks.reshape(len(blocks), -1, BLOCK_SIZE)
            scales = self._frozen.scales(weight) if direction == FORWARD else None
            if scales is None:
                largest = np.abs(blocks).max(axis=2)
                scales = np.maximum(largest, np.finfo(np.float32).tiny) / np.float32(_LARGEST)
            # Blocks of int4 lie as the forward product takes them: with their own scales nothing is lost.
            self._write(name, (np.round(blocks / scales[..., None]) + _BLOCK_ZERO).astype(np.uint8))
            self._scales[name] = scales.astype(np.float32).reshape(-1)
        return self._tensors[name], self._scales[name]

    def _matrix(self, weight: str, direction: str) -> NDArray[np.float32]:
        """The float32 weight (K, N), as a product x (…, K) takes it."""
        matrix = self._frozen.whole(weight)
        return matrix.T if direction == FORWARD else matrix

    def _write(self, name: str, array: NDArray[Any]) -> None:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(array).tobytes())
        self._tensors[name] = ir.ExternalTensor(
            DATA, offset, array.nbytes, ir.DataType.from_numpy(array.dtype),
            name=name, shape=ir.Shape(array.shape), base_dir=self._folder,
        )  # fmt: skip


def quantise_frozen(model: ir.Model, kind: NpuKind, weights: _Int8Weights, ranges: Mapping[str, Range]) -> None:
    """Replace every product with a frozen weight by an int8 product.

    Precondition: frozen weights (out, in) are inputs, used by MatMul as they are or through a Transpose.
    Postcondition: the weights of linear layers are not inputs any more.
    """
    graph = model.graph
    cancel_transposes(graph)
    for node in list(graph):
        found = frozen_product(node)
        if found is None:
            continue
        x, weight, direction = found
        name = str(weight.name)
        op = Operators()
        if kind == "qdq":
            result = _rounded_product(op, graph, x, node.outputs[0], weights.columns(name, direction), ranges)
        elif dimensions(weight)[1 if direction == FORWARD else 0] % BLOCK_SIZE:
            raise IncompatibleError(f"{name} does not consist of blocks of {BLOCK_SIZE}; use --npu qdq")
        else:
            result = _block_product(op, graph, x, weights.blocks(name, direction))
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        op.replace(graph, node, {node.outputs[0]: result})
    if kind == "blocks":
        model.opset_imports[CONTRIB] = 1
    remove_unused(model)


def _rounded_product(
    op: Operators,
    graph: ir.Graph,
    x: ir.Value,
    result: ir.Value,
    terms: Sequence[_Scaled],
    ranges: Mapping[str, Range],
) -> ir.Value:
    shrink, grow = row_factors(op, x)
    rows = _rounded(op, op.op("Mul", [op.op("Mul", [x, shrink]), shrink]), (-1.0, 1.0))
    least, largest = ranges[str(result.name)]
    products = []
    for tensor, scales in terms:
        inputs = [_initializer(graph, tensor), op.constant(scales), op.constant(np.zeros(scales.shape, np.int8))]
        matrix = op.op("DequantizeLinear", inputs, attributes={"axis": 1})
        product = op.op("MatMul", [rows, matrix])
        products.append(_rounded(op, product, (_MARGIN * min(least, 0.0), _MARGIN * max(largest, 0.0))))
    total = reduce(lambda total, product: op.op("Add", [total, product]), products)
    return op.op("Mul", [op.op("Mul", [total, grow]), grow])


def _rounded(op: Operators, value: ir.Value, bounds: Range) -> ir.Value:
    """A tensor in 65,536 steps over a range that holds zero, which is exact."""
    step = np.float32(max(bounds[1] - bounds[0], float(np.finfo(np.float32).tiny)) / _LEVELS)
    parameters = [op.constant(np.array(step)), op.constant(np.array(round(-bounds[0] / step), np.uint16))]
    return op.op("DequantizeLinear", [op.op("QuantizeLinear", [value, *parameters]), *parameters])


def _block_product(op: Operators, graph: ir.Graph, x: ir.Value, weight: _Scaled) -> ir.Value:
    tensor, scales = weight
    columns, blocks, size = tensor.shape.numpy()
    attributes = {"K": blocks * size, "N": columns, "bits": 8, "block_size": size}
    inputs = [x, _initializer(graph, tensor), op.constant(scales)]
    return op.op("MatMulNBits", inputs, attributes=attributes, domain=CONTRIB)


def _initializer(graph: ir.Graph, tensor: ir.ExternalTensor) -> ir.Value:
    name = str(tensor.name)
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
        )
    return graph.initializers[name]
