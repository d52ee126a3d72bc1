"""Graphs that turn block-quantised weights into matrices: float32, or rotated int8 with other scales.

ONNX Runtime's `GatherBlockQuantized` takes weights as inputs and is more than twice as fast as `DequantizeLinear`. Its
`rows` are 0, 1, 2, ….
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetune.formats.roles import FORWARD
from edgetune.model.blocks import BLOCK_SIZE
from edgetune.preparation.rewrites.operators import CONTRIB, IR_VERSION, OPSET, Operators


def build_dequantise(bits: int) -> ir.Model:
    """The graph that turns blocks into float32: output `weight` (out, in).

    Inputs are `packed` (out, in · bits / 8) uint8, `rows` (out) and `scales` (out, in / 32).
    """
    op = Operators()
    inputs = _inputs(("packed_in",), ("blocks",))
    return _model(op, inputs, _dequantised(op, inputs, bits, axis=1), ("out", "in"), "dequantise")


def build_requantise(layout: str, bits: int) -> ir.Model:
    """The graph that rotates a weight and rounds it to int8; its columns are seen as blocks of the rotation's size.

    Inputs are those of `build_dequantise`, cut into blocks (out, turned, …), and `rotation` (size, size). For the
    forward pass each row of scales is divided by the row's step of int8, and `weight` comes out as (turned, size, out);
    for the backward pass each column's step is an input, `steps` (turned, size), and `weight` is (out, turned, size).
    """
    op = Operators()
    inputs = _inputs(("turned", "packed_in"), ("turned", "blocks"))
    rotation = ir.val("rotation", dtype=ir.DataType.FLOAT, shape=("size", "size"))
    rotated = op.op("MatMul", [_dequantised(op, inputs, bits, axis=2), rotation])
    inputs.append(rotation)
    if layout != FORWARD:
        inputs.append(ir.val("steps", dtype=ir.DataType.FLOAT, shape=("turned", "size")))
        rotated = op.op("Div", [rotated, inputs[-1]])
    unit, zero = (op.constant(np.array(value, dtype=dtype)) for value, dtype in ((1, np.float32), (0, np.int8)))
    weight = op.op("QuantizeLinear", [rotated, unit, zero])
    weight.dtype = ir.DataType.INT8
    if layout != FORWARD:
        return _model(op, inputs, weight, ("out", "turned", "size"), layout)
    last = op.op("Transpose", [weight], attributes={"perm": [1, 2, 0]})
    last.dtype = ir.DataType.INT8
    return _model(op, inputs, last, ("turned", "size", "out"), layout)


def _inputs(packed: tuple[str, ...], scales: tuple[str, ...]) -> list[ir.Value]:
    return [
        ir.val("packed", dtype=ir.DataType.UINT8, shape=("out", *packed)),
        ir.val("rows", dtype=ir.DataType.INT64, shape=("out",)),
        ir.val("scales", dtype=ir.DataType.FLOAT, shape=("out", *scales)),
    ]


def _dequantised(op: Operators, inputs: list[ir.Value], bits: int, axis: int) -> ir.Value:
    attributes = {"bits": bits, "block_size": BLOCK_SIZE, "gather_axis": 0, "quantize_axis": axis}
    weight = op.op("GatherBlockQuantized", inputs, attributes=attributes, domain=CONTRIB)
    weight.dtype = ir.DataType.FLOAT
    return weight


def _model(op: Operators, inputs: list[ir.Value], weight: ir.Value, shape: tuple[str, ...], name: str) -> ir.Model:
    weight.name, weight.shape = "weight", ir.Shape(shape)
    for number, node in enumerate(op.nodes):
        node.name = f"{number}_{node.op_type}"
    graph = ir.Graph(inputs, [weight], nodes=op.nodes, name=name, opset_imports={"": OPSET, CONTRIB: 1})
    return ir.Model(graph, ir_version=IR_VERSION)
