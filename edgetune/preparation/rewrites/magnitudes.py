"""DoRA in the graphs that hold a whole step: magnitudes in the place of the gains that were differentiated.

The gain's norm counts as a constant in the gradient, so it is put in when differentiation is over: a graph takes m,
finds g = m / n from W, A and B, and gives ∂m = ∂g / n (`edgetune.model.gains`).
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from edgetune.formats.manifest import ROW_NORMS
from edgetune.formats.row_norms import offsets
from edgetune.model.gains import SMALLEST_SQUARE
from edgetune.model.lora import Lora, Slot
from edgetune.preparation.rewrites.operators import Operators


def put_magnitudes(model: ir.Model, folder: Path, lora: Lora) -> None:
    """Let a graph take magnitudes, and give their gradients where it gives those of gains.

    Args:
        model: A lowered graph whose frozen weights are still inputs; it is changed.
        folder: Of the bundle, which holds the row norms.
        lora: The slots. Without DoRA nothing changes.
    """
    if not lora.dora:
        return
    for slot, offset in zip(lora.slots, offsets(lora).values(), strict=True):
        _put(model.graph, slot, _row_norm(folder, slot, offset), lora.scaling_of(slot.module))


def _row_norm(folder: Path, slot: Slot, offset: int) -> ir.Value:
    shape = ir.Shape((slot.out_features,))
    tensor = ir.ExternalTensor(
        ROW_NORMS, offset, 4 * slot.out_features, ir.DataType.FLOAT,
        name=f"{slot.name}.row_norm", shape=shape, base_dir=folder,
    )  # fmt: skip
    return ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)


def _put(graph: ir.Graph, slot: Slot, row_norm: ir.Value, scaling: float) -> None:
    inputs = {value.name: value for value in graph.inputs}
    a, b, gain = (inputs[name] for name in (slot.a, slot.b, slot.gain))
    magnitude = ir.val(slot.magnitude, dtype=ir.DataType.FLOAT, shape=(slot.out_features,))
    graph.initializers[str(row_norm.name)] = row_norm
    op = Operators()
    norm = _norm(op, inputs[f"{slot.name}.weight"], a, b, row_norm, scaling)
    found = op.op("Div", [magnitude, norm])
    for value in (norm, found):
        value.shape, value.dtype = magnitude.shape, ir.DataType.FLOAT
    gain.replace_all_uses_with(found)
    graph.inputs[graph.inputs.index(gain)] = magnitude
    for number, node in enumerate(op.nodes):
        node.name = f"{slot.name}.gain/{number}_{node.op_type}"
        graph.insert_before(graph[0], node) if number == 0 else graph.insert_after(op.nodes[number - 1], node)
    for index, given in enumerate(graph.outputs):
        if given.name == f"{slot.gain}.grad":
            divided = ir.node("Div", [given, norm], name=f"{slot.name}.magnitude_grad")
            (result,) = divided.outputs
            result.name, result.shape, result.type = f"{slot.magnitude}.grad", magnitude.shape, magnitude.type
            graph.append(divided)
            graph.outputs[index] = result


def _norm(
    op: Operators, weight: ir.Value, a: ir.Value, b: ir.Value, row_norm: ir.Value, scaling: float
) -> ir.Value:
    """‖W + s·B·A‖ (out,), by rows; everything is (rank, out) on the way."""
    projected = op.op("MatMul", [a, op.swap_last(weight, 2)])
    turned = op.swap_last(b, 2)
    between = op.op("MatMul", [op.op("MatMul", [a, op.swap_last(a, 2)]), turned])
    change = op.op(
        "Add", [op.op("Mul", [projected, op.floats(2 * scaling)]), op.op("Mul", [between, op.floats(scaling**2)])]
    )
    summed = op.op("ReduceSum", [op.op("Mul", [turned, change]), op.integers(0)], attributes={"keepdims": 0})
    square = op.op("Add", [op.op("Mul", [row_norm, row_norm]), summed])
    return op.op("Sqrt", [op.op("Max", [square, op.floats(SMALLEST_SQUARE)])])
