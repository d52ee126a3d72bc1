"""The layered form with int8 products: what is multiplied with a frozen weight is quantised at run time, row by row.

A row of x, rotated (edgetune.model.rotation), becomes u = round(x / s) + 128 with s = max|x| / 127, a rotated weight an
int8 matrix with a scale for every column of the product (edgetune.runtimes.layered.onnxruntime.requantise makes both);
what comes out of a backward product is rotated back. Products with adapters, attention, norms
and the head stay float32. ONNX Runtime has fast kernels for unsigned activations only; `MatMulIntegerToFloat` takes the
scales of columns, and the row's is multiplied afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgetune.formats.roles import BACKWARD, FORWARD, INT8, SCALES
from edgetune.model.rotation import signs_of
from edgetune.preparation.graphs.dequantise import build_requantise
from edgetune.preparation.rewrites.operators import CONTRIB, Operators, remove_unused
from edgetune.preparation.rewrites.shapes import dimensions, fold

_LINEAR = ("_proj.weight", "lm_head.weight")
_ZERO_POINT = 128
_LARGEST = 127.0
_SMALLEST_ROW = 1e-30
"""Stands in for the largest magnitude of a row of zeros."""


def build_int8(sublayers: Mapping[str, ir.Model], bits: int) -> dict[str, ir.Model]:
    """The graphs of the int8 plan by their names: every sublayer's, and those that requantise weights.

    Args:
        sublayers: The float32 graphs by their names; they are left as they are.
        bits: Bits per weight where weights are stored in blocks.
    """
    graphs = {name: quantise_products(ir.from_proto(ir.to_proto(graph))) for name, graph in sublayers.items()}
    graphs |= {layout: build_requantise(layout, bits) for layout in (FORWARD, BACKWARD)}
    return {f"{INT8}/{name}": graph for name, graph in graphs.items()}


def quantise_products(model: ir.Model) -> ir.Model:
    """Replace products with frozen weights by int8 products.

    Precondition: frozen weights (out, in) are inputs `…_proj.weight`, used by MatMul as they are (in the backward pass)
    or through a Transpose (in the forward pass). Postcondition: instead of `W` the graph takes what it needs of
    `W.forward`, int8 (in, out), with `W.forward.scales` (out), and `W.backward`, int8 (out, in), with
    `W.backward.scales` (in).
    """
    graph = model.graph
    activations: dict[tuple[ir.Value, str], tuple[ir.Value, ir.Value]] = {}
    signs: dict[int, ir.Value] = {}
    for node in list(graph):
        found = frozen_product(node)
        if found is None:
            continue
        x, weight, layout = found
        op = Operators()
        if (x, layout) not in activations:
            rows = _rotated(op, signs, x, x) if layout == FORWARD else x
            activations[x, layout] = _quantised_rows(op, rows)
        quantised, row_scales = activations[x, layout]
        matrix, scales = _operand(graph, weight, layout)
        product = op.op(
            "MatMulIntegerToFloat",
            [quantised, matrix, _scalar(op, 1, np.float32), scales, _scalar(op, _ZERO_POINT, np.uint8)],
            domain=CONTRIB,
        )
        result = op.op("Mul", [product, row_scales])
        result = result if layout == FORWARD else _rotated(op, signs, result, node.outputs[0])
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        op.replace(graph, node, {node.outputs[0]: result})
    model.opset_imports[CONTRIB] = 1
    remove_unused(model)
    fold(model)
    return model


def frozen_product(node: ir.Node) -> tuple[ir.Value, ir.Value, str] | None:
    """The other factor, the weight and its layout in a product with a frozen linear weight; None for any other node."""
    if node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    weight, layout = node.inputs[1], BACKWARD
    producer = weight.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        weight, layout = producer.inputs[0], FORWARD
    frozen = weight.is_graph_input() and str(weight.name).endswith(_LINEAR)
    return (node.inputs[0], weight, layout) if frozen else None


def _rotated(op: Operators, signs: dict[int, ir.Value], rows: ir.Value, like: ir.Value) -> ir.Value:
    """Rows of the shape of `like`, rotated.

    Args:
        op: Takes the nodes.
        signs: Those of blocks that the graph has already, by their size.
        rows: What is rotated.
        like: Of the same shape, which is known.
    """
    *others, width = dimensions(like)
    block = signs_of(int(width))
    if len(block) not in signs:
        signs[len(block)] = op.constant(block)
    blocks = op.op("Reshape", [rows, op.integers(*[0] * len(others), -1, len(block))])
    product = op.op("MatMul", [blocks, signs[len(block)]])
    return op.op("Reshape", [product, op.integers(*[0] * len(others), int(width))])


def _quantised_rows(op: Operators, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The rows of x as uint8, and the scale of each row (…, 1)."""
    largest = op.op("ReduceMax", [x, op.integers(-1)], attributes={"keepdims": 1})
    least = op.op("ReduceMin", [x, op.integers(-1)], attributes={"keepdims": 1})
    bound = op.op("Max", [largest, op.op("Neg", [least]), op.floats(_SMALLEST_ROW)])
    scaled = op.op("Mul", [x, op.op("Div", [op.floats(_LARGEST), bound])])
    quantised = op.op("QuantizeLinear", [scaled, _scalar(op, 1, np.float32), _scalar(op, _ZERO_POINT, np.uint8)])
    return quantised, op.op("Mul", [bound, op.floats(1 / _LARGEST)])


def _scalar(op: Operators, value: int, dtype: type[np.generic]) -> ir.Value:
    """A constant of rank 0, as scales and zero points of a whole tensor have to be."""
    return op.constant(np.array(value, dtype=dtype))


def _operand(graph: ir.Graph, weight: ir.Value, layout: str) -> tuple[ir.Value, ir.Value]:
    """The inputs that take the place of a weight: its int8 matrix, and the scales of the matrix's columns."""
    out, wide = dimensions(weight)
    shapes = {FORWARD: ((wide, out), out), BACKWARD: ((out, wide), wide)}
    matrix_shape, columns = shapes[layout]
    inputs = {str(value.name): value for value in graph.inputs}
    found = []
    for suffix, shape, dtype in (
        ("", matrix_shape, ir.DataType.INT8), (SCALES, (columns,), ir.DataType.FLOAT)
    ):  # fmt: skip
        name = f"{weight.name}.{layout}{suffix}"
        if name not in inputs:
            value = ir.val(name, dtype=dtype, shape=shape)
            graph.inputs.append(value)
            inputs[name] = value
        found.append(inputs[name])
    return found[0], found[1]
