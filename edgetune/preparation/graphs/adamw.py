"""The optimizer as a plain ONNX graph: clipping and AdamW for every LoRA parameter at once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgetune.model.adamw import BETA1, BETA2, CLIP_EPSILON, EPSILON
from edgetune.model.lora import Lora
from edgetune.preparation.rewrites.operators import IR_VERSION, OPSET, Operators
from edgetune.preparation.rewrites.shapes import dimensions


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
    adamw = _AdamW(op, rate, decay, step, _clip_factor(op, norm, max_norm))
    for name, values in parameters.items():
        inputs += values.values()
        updated = adamw.update(values[""], values[".grad"], values[".exp_avg"], values[".exp_avg_sq"])
        for value, suffix in zip(updated, ("", ".exp_avg", ".exp_avg_sq"), strict=True):
            _output(value, f"{name}{suffix}.next", lora.shapes()[name])
            outputs.append(value)
    return _model(op, inputs, outputs, "adamw")


def build_flat_adamw() -> ir.Model:
    """The same update of a flat vector of any size; the loop computes the factor that clips.

    Inputs: `learning_rate`, `weight_decay`, `step` (1 for the first), `clip` (1,); `parameter`, `gradient`, `exp_avg`,
    `exp_avg_sq` (size). Outputs: `parameter.next`, `exp_avg.next`, `exp_avg_sq.next`, which may lie
    where the inputs do.
    """
    op = Operators()
    scalars = [_input(name, (1,)) for name in ("learning_rate", "weight_decay", "step", "clip")]
    vectors = [_input(name, ("size",)) for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq")]
    outputs = _AdamW(op, *scalars).update(*vectors)
    for value, name in zip(outputs, ("parameter", "exp_avg", "exp_avg_sq"), strict=True):
        _output(value, f"{name}.next", ("size",))
    return _model(op, [*scalars, *vectors], outputs, "adamw_flat")


def _model(op: Operators, inputs: list[ir.Value], outputs: list[ir.Value], name: str) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=op.nodes, name=name, opset_imports={"": OPSET})
    for number, node in enumerate(graph):
        node.name = f"{number}_{node.op_type}"
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgetune")


class _AdamW:
    """The update of one tensor; what is the same for all tensors is computed once."""

    def __init__(self, op: Operators, rate: ir.Value, decay: ir.Value, step: ir.Value, clip: ir.Value) -> None:
        self._op, self._clip = op, clip
        # In double precision: 1 − 0.999 loses five digits in float32.
        correction1, correction2 = (_bias_correction(op, beta, step) for beta in (BETA1, BETA2))
        self._keep = op.op("Sub", [op.floats(1), op.op("Mul", [rate, decay])])
        self._step_size = op.op("Div", [rate, correction1])
        self._root2 = op.op("Sqrt", [correction2])

    def update(
        self, parameter: ir.Value, gradient: ir.Value, exp_avg: ir.Value, exp_avg_sq: ir.Value
    ) -> list[ir.Value]:
        """The next parameter, first and second moment."""
        op = self._op
        gradient = op.op("Mul", [gradient, self._clip])
        first = _moving_average(op, exp_avg, gradient, BETA1)
        second = _moving_average(op, exp_avg_sq, op.op("Mul", [gradient, gradient]), BETA2)
        denominator = op.op("Add", [op.op("Div", [op.op("Sqrt", [second]), self._root2]), op.floats(EPSILON)])
        update = op.op("Mul", [self._step_size, op.op("Div", [first, denominator])])
        return [op.op("Sub", [op.op("Mul", [parameter, self._keep]), update]), first, second]


def _input(name: str, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.val(name, dtype=ir.DataType.FLOAT, shape=shape)


def _output(value: ir.Value, name: str, shape: tuple[int | str, ...]) -> None:
    value.name, value.shape, value.dtype = name, ir.Shape(shape), ir.DataType.FLOAT


def _global_norm(op: Operators, gradients: list[ir.Value]) -> ir.Value:
    sums = [
        op.op(
            "Reshape",
            [op.op("ReduceSum", [op.op("Mul", [g, g]), _axes(op, g)], attributes={"keepdims": 1}), op.integers(1)],
        )
        for g in gradients
    ]
    total = op.op(
        "ReduceSum", [op.op("Concat", sums, attributes={"axis": 0}), op.integers(0)], attributes={"keepdims": 1}
    )
    return op.op("Sqrt", [total])


def _axes(op: Operators, value: ir.Value) -> ir.Value:
    """All axes of an input."""
    return op.integers(*range(len(dimensions(value))))


def _clip_factor(op: Operators, norm: ir.Value, max_norm: ir.Value) -> ir.Value:
    """min(1, max_norm / (norm + 1e-6)), or 1 when max_norm is 0."""
    factor = op.op("Min", [op.op("Div", [max_norm, op.op("Add", [norm, op.floats(CLIP_EPSILON)])]), op.floats(1)])
    return op.op("Where", [op.op("Greater", [max_norm, op.floats(0)]), factor, op.floats(1)])


def _bias_correction(op: Operators, beta: float, step: ir.Value) -> ir.Value:
    """1 − beta^step."""
    exponent = op.op("Cast", [step], attributes={"to": ir.DataType.DOUBLE})
    power = op.op("Pow", [op.constant(np.array([beta])), exponent])
    return op.op("Cast", [op.op("Sub", [op.constant(np.array([1.0])), power])], attributes={"to": ir.DataType.FLOAT})


def _moving_average(op: Operators, average: ir.Value, value: ir.Value, beta: float) -> ir.Value:
    return op.op("Add", [op.op("Mul", [average, op.floats(beta)]), op.op("Mul", [value, op.floats(1 - beta)])])
