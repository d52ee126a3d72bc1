"""Graphs that turn block-quantised weights into matrices: float32, or int8 with other scales.

Inputs are `packed` (out, in · bits / 8) uint8, `scales` (out, in / 32) and `rows` (out): 0, 1, 2, …. ONNX Runtime's
`GatherBlockQuantized` takes weights as inputs and is more than twice as fast as `DequantizeLinear`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetune.formats.roles import FORWARD
from edgetune.model.blocks import BLOCK_SIZE
from edgetune.preparation.rewrites.operators import CONTRIB, IR_VERSION, OPSET, Operators


def build_dequantise(bits: int) -> ir.Model:
    """The graph that turns blocks into float32: output `weight` (out, in)."""
    op = Operators()
    inputs = _inputs()
    return _model(op, inputs, _dequantised(op, inputs, bits), ("out", "in"), "dequantise")


def build_requantise(layout: str, bits: int) -> ir.Model:
    """The graph that turns blocks into int8: output `weight` (out, in), or (in, out) for the forward pass.

    The scales are those of the blocks divided by those of int8.
    """
    op = Operators()
    inputs = _inputs()
    unit, zero = (op.constant(np.array(value, dtype=dtype)) for value, dtype in ((1, np.float32), (0, np.int8)))
    weight = op.op("QuantizeLinear", [_dequantised(op, inputs, bits), unit, zero])
    weight.dtype = ir.DataType.INT8
    if layout != FORWARD:
        return _model(op, inputs, weight, ("out", "in"), layout)
    turned = op.op("Transpose", [weight], attributes={"perm": [1, 0]})
    turned.dtype = ir.DataType.INT8
    return _model(op, inputs, turned, ("in", "out"), layout)


def _inputs() -> list[ir.Value]:
    return [
        ir.val("packed", dtype=ir.DataType.UINT8, shape=("out", "packed_in")),
        ir.val("rows", dtype=ir.DataType.INT64, shape=("out",)),
        ir.val("scales", dtype=ir.DataType.FLOAT, shape=("out", "blocks")),
    ]


def _dequantised(op: Operators, inputs: list[ir.Value], bits: int) -> ir.Value:
    attributes = {"bits": bits, "block_size": BLOCK_SIZE, "gather_axis": 0, "quantize_axis": 1}
    weight = op.op("GatherBlockQuantized", inputs, attributes=attributes, domain=CONTRIB)
    weight.dtype = ir.DataType.FLOAT
    return weight


def _model(op: Operators, inputs: list[ir.Value], weight: ir.Value, shape: tuple[str, str], name: str) -> ir.Model:
    weight.name, weight.shape = "weight", ir.Shape(shape)
    for number, node in enumerate(op.nodes):
        node.name = f"{number}_{node.op_type}"
    graph = ir.Graph(inputs, [weight], nodes=op.nodes, name=name, opset_imports={"": OPSET, CONTRIB: 1})
    return ir.Model(graph, ir_version=IR_VERSION)
