"""The optimizer as a plain ONNX graph: clipping and AdamW for every LoRA parameter at once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetune.manifest import Lora
from edgetune.prepare.lowering import IR_VERSION, OPSET, Operators

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
"""torch.optim.AdamW's defaults; ONNX Runtime Training's optimizer is given the same."""
_CLIP_EPSILON = 1e-6
"""torch.nn.utils.clip_grad_norm_ adds this to the norm."""


def build_adamw(lora: Lora) -> ir.Model:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019) and global-norm clipping, as torch computes them.

    Inputs: `learning_rate`, `weight_decay`, `max_grad_norm` (0: no clipping), `step` (1 for the first), all float32
    (1,); then for every parameter P of shape S: `P`, `P.grad`, `P.exp_avg`, `P.exp_avg_sq`. Outputs: `grad_norm` (1,)
    before clipping; `P.next`, `P.exp_avg.next`, `P.exp_avg_sq.next`.
    """
    op = Operators()
    rate, decay, max_norm, step = (
        _input(name, (1,)) for name in ("learning_rate", "weight_decay", "max_grad_norm", "step")
    )
    inputs, outputs = [rate, decay, max_norm, step], []
    parameters = {
        name: {s: _input(name + s, shape) for s in ("", ".grad", ".exp_avg", ".exp_avg_sq")}
        for name, shape in lora.shapes().items()
    }
    norm = _global_norm(op, [values[".grad"] for values in parameters.values()])
    _output(norm, "grad_norm", (1,))
    outputs.append(norm)
    clip = _clip_factor(op, norm, max_norm)
    # In double precision: 1 − 0.999 loses five digits in float32.
    correction1, correction2 = (_bias_correction(op, beta, step) for beta in (BETA1, BETA2))
    keep = op.op("Sub", [op.floats(1), op.op("Mul", [rate, decay])])
    step_size = op.op("Div", [rate, correction1])
    root2 = op.op("Sqrt", [correction2])
    for name, values in parameters.items():
        gradient = op.op("Mul", [values[".grad"], clip])
        first = _moving_average(op, values[".exp_avg"], gradient, BETA1)
        second = _moving_average(op, values[".exp_avg_sq"], op.op("Mul", [gradient, gradient]), BETA2)
        denominator = op.op("Add", [op.op("Div", [op.op("Sqrt", [second]), root2]), op.floats(EPSILON)])
        update = op.op("Mul", [step_size, op.op("Div", [first, denominator])])
        following = op.op("Sub", [op.op("Mul", [values[""], keep]), update])
        inputs += values.values()
        for value, suffix in ((following, ""), (first, ".exp_avg"), (second, ".exp_avg_sq")):
            _output(value, f"{name}{suffix}.next", lora.shapes()[name])
            outputs.append(value)
    graph = ir.Graph(inputs, outputs, nodes=op.nodes, name="adamw", opset_imports={"": OPSET})
    for number, node in enumerate(graph):
        node.name = f"{number}_{node.op_type}"
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgetune")


def _input(name: str, shape: tuple[int, ...]) -> ir.Value:
    return ir.val(name, dtype=ir.DataType.FLOAT, shape=shape)


def _output(value: ir.Value, name: str, shape: tuple[int, ...]) -> None:
    value.name, value.shape, value.dtype = name, ir.Shape(shape), ir.DataType.FLOAT


def _global_norm(op: Operators, gradients: list[ir.Value]) -> ir.Value:
    sums = [
        op.op(
            "Reshape",
            [op.op("ReduceSum", [op.op("Mul", [g, g]), op.integers(0, 1)], attributes={"keepdims": 1}), op.integers(1)],
        )
        for g in gradients
    ]
    total = op.op(
        "ReduceSum", [op.op("Concat", sums, attributes={"axis": 0}), op.integers(0)], attributes={"keepdims": 1}
    )
    return op.op("Sqrt", [total])


def _clip_factor(op: Operators, norm: ir.Value, max_norm: ir.Value) -> ir.Value:
    """min(1, max_norm / (norm + 1e-6)), or 1 when max_norm is 0."""
    factor = op.op("Min", [op.op("Div", [max_norm, op.op("Add", [norm, op.floats(_CLIP_EPSILON)])]), op.floats(1)])
    return op.op("Where", [op.op("Greater", [max_norm, op.floats(0)]), factor, op.floats(1)])


def _bias_correction(op: Operators, beta: float, step: ir.Value) -> ir.Value:
    """1 − beta^step."""
    exponent = op.op("Cast", [step], attributes={"to": ir.DataType.DOUBLE})
    power = op.op("Pow", [op.constant(np.array([beta])), exponent])
    return op.op("Cast", [op.op("Sub", [op.constant(np.array([1.0])), power])], attributes={"to": ir.DataType.FLOAT})


def _moving_average(op: Operators, average: ir.Value, value: ir.Value, beta: float) -> ir.Value:
    return op.op("Add", [op.op("Mul", [average, op.floats(beta)]), op.op("Mul", [value, op.floats(1 - beta)])])
