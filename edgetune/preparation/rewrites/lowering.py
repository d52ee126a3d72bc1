"""From ONNX Runtime Training's operators to standard ONNX.

Each function of the table takes one operator that the gradient builder emits and writes its definition in standard
operators. Precondition of `lower`: a model that the gradient builder made. Postcondition: standard operators only,
no tensor of rank 0 among its outputs, LoRA parameters as inputs and their gradients as outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from edgetune.errors import IncompatibleError
from edgetune.preparation.rewrites.operators import CONTRIB, Operators, remove_unused
from edgetune.preparation.rewrites.shapes import dimensions, fold, resolve_shapes

_IGNORED_LABEL = -100
_RMS_NORM = "SimplifiedLayerNormalization"

Values = Sequence[ir.Value | None]
Lowering = Callable[[Operators, Values, dict[str, Any]], Sequence[ir.Value | None]]


def _softmax_cross_entropy(op: Operators, inputs: Values, attributes: dict[str, Any]) -> Sequence[ir.Value]:
    """Mean of −log p(label) over the labels that are not ignored; and log p itself."""
    _require_mean_over_labels(attributes, inputs[2:])
    logits, labels = (_before_reshape(value) for value in inputs[:2])
    log_probabilities = op.op("LogSoftmax", [logits], attributes={"axis": -1})
    valid, label = _valid_labels(op, labels)
    picked = op.op("GatherElements", [log_probabilities, label], attributes={"axis": -1})
    total = _sum_over_rows(op, op.op("Mul", [picked, valid]), labels)
    mean = op.op("Neg", [op.op("Div", [total, _label_count(op, valid, labels)])])
    return op.op("Reshape", [mean, op.integers(1)]), log_probabilities


def _softmax_cross_entropy_grad(op: Operators, inputs: Values, attributes: dict[str, Any]) -> Sequence[ir.Value]:
    """(exp(log p) − onehot(label)) · valid · dY / count."""
    _require_mean_over_labels(attributes, inputs[3:])
    d_loss, log_probabilities, labels = _before_reshape(inputs[0]), inputs[1], _before_reshape(inputs[2])
    valid, label = _valid_labels(op, labels)
    depth = op.integers(_fixed_size(log_probabilities, -1))
    indices = op.op("Squeeze", [label, op.integers(-1)])
    hot = op.op("OneHot", [indices, depth, op.floats(0, 1)], attributes={"axis": -1})
    difference = op.op("Sub", [op.op("Exp", [log_probabilities]), hot])
    scale = op.op("Div", [op.op("Mul", [valid, d_loss]), _label_count(op, valid, labels)])
    return (op.op("Mul", [difference, scale]),)


def _require_mean_over_labels(attributes: dict[str, Any], weights: Values) -> None:
    if (
        attributes.get("reduction", "mean") != "mean"
        or attributes.get("ignore_index") != _IGNORED_LABEL
        or any(value is not None for value in weights)
    ):
        raise IncompatibleError(
            f"SoftmaxCrossEntropyLoss or SoftmaxCrossEntropyLossGrad with {attributes} has no lowering; "
            f"expected the unweighted mean over the labels that are not {_IGNORED_LABEL}"
        )


def _before_reshape(value: ir.Value | None) -> ir.Value | None:
    """The (batch, sequence, …) tensor that the exporter flattened for the loss, or the (1,) that it made a scalar.

    Without it the gradient would have to be folded back to a batch and a sequence that are known at run time only.
    """
    producer = value.producer() if value is not None else None
    return producer.inputs[0] if producer is not None and producer.op_type == "Reshape" else value


def _valid_labels(op: Operators, labels: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """(…, 1) floats, 1 where the label counts; (…, 1) labels with 0 in the place of ignored ones."""
    column = op.op("Unsqueeze", [labels, op.integers(-1)])
    ignored = op.op("Equal", [column, op.integers(_IGNORED_LABEL)])
    valid = op.op("Cast", [op.op("Not", [ignored])], attributes={"to": ir.DataType.FLOAT})
    return valid, op.op("Where", [ignored, op.integers(0), column])


def _sum_over_rows(op: Operators, column: ir.Value, labels: ir.Value | None) -> ir.Value:
    """(1, …, 1): sum of a column that has one value a label."""
    axes = range(len(dimensions(labels)) + 1)
    return op.op("ReduceSum", [column, op.integers(*axes)], attributes={"keepdims": 1})


def _label_count(op: Operators, valid: ir.Value, labels: ir.Value | None) -> ir.Value:
    """(1, …, 1): how many labels count, at least 1."""
    return op.op("Max", [_sum_over_rows(op, valid, labels), op.floats(1)])


def _softmax_grad(op: Operators, inputs: Values, attributes: dict[str, Any]) -> Sequence[ir.Value]:
    """Y · (dY − Σ(Y · dY)).

    In attention, where C = Y·V and dY = dC·Vᵀ, the sum over a row's scores is Σ(C · dC) over its few channels
    (FlashAttention, Dao et al. 2022, appendix B.2).
    """
    d_output, output = inputs
    context = _context_and_gradient(d_output, output) if attributes["axis"] == -1 else None
    product = op.op("Mul", list(context) if context else [output, d_output])
    total = op.op("ReduceSum", [product, op.integers(attributes["axis"])], attributes={"keepdims": 1})
    return (op.op("Mul", [output, op.op("Sub", [d_output, total])]),)


def _context_and_gradient(d_weights: ir.Value | None, weights: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """C and dC of C = weights·V, where the gradient of `weights` is dC·Vᵀ."""
    product = d_weights.producer() if d_weights is not None else None
    if weights is None or product is None or product.op_type != "MatMul" or product.inputs[0] is None:
        return None
    transposed = product.inputs[1].producer() if product.inputs[1] is not None else None
    if transposed is None or transposed.op_type != "Transpose":
        return None
    for user, index in weights.uses():
        if index == 0 and user.op_type == "MatMul" and user.inputs[1] is transposed.inputs[0]:
            return user.outputs[0], product.inputs[0]
    return None


def _quick_gelu(op: Operators, inputs: Values, attributes: dict[str, Any]) -> Sequence[ir.Value]:
    """x · σ(αx)."""
    return (op.op("Mul", [inputs[0], op.op("Sigmoid", [_scaled(op, inputs[0], attributes["alpha"])])]),)


def _quick_gelu_grad(op: Operators, inputs: Values, attributes: dict[str, Any]) -> Sequence[ir.Value]:
    """dY · s · (1 + αx · (1 − s)) with s = σ(αx)."""
    d_output, x = inputs
    scaled = _scaled(op, x, attributes["alpha"])
    sigmoid = op.op("Sigmoid", [scaled])
    slope = op.op("Add", [op.op("Mul", [scaled, op.op("Sub", [op.floats(1), sigmoid])]), op.floats(1)])
    return (op.op("Mul", [d_output, op.op("Mul", [sigmoid, slope])]),)


def _scaled(op: Operators, x: ir.Value | None, alpha: float) -> ir.Value | None:
    return x if alpha == 1.0 else op.op("Mul", [x, op.floats(alpha)])


def _rms_norm(op: Operators, inputs: Values, attributes: dict[str, Any]) -> Sequence[ir.Value]:
    """x / √(mean(x²) + ε) · w; and the factor 1 / √(…) itself."""
    x, weight = inputs
    square = op.op("ReduceMean", [op.op("Mul", [x, x]), op.integers(-1)], attributes={"keepdims": 1})
    root = op.op("Sqrt", [op.op("Add", [square, op.floats(attributes["epsilon"])])])
    inverse = op.op("Reciprocal", [root])
    return op.op("Mul", [op.op("Mul", [x, inverse]), weight]), inverse


def _rms_norm_in_half(op: Operators, inputs: Values, attributes: dict[str, Any]) -> Sequence[ir.Value]:
    """The same for float16.

    Trained language models have activations of tens of thousands, whose squares float16 does not hold. So a row is
    divided by its largest magnitude m before it is squared: the factor is 1 / √(mean((x / m)²) + (√ε / m)²) / m, where
    nothing is above the root of the number of channels. And it is divided by √m twice: accelerators multiply with a
    reciprocal, and 1 / m has no normal float16 where m is above 16,384.
    """
    x, weight = inputs
    root_of_epsilon = op.floats(math.sqrt(attributes["epsilon"]))
    largest = op.op("ReduceMax", [op.op("Abs", [x]), op.integers(-1)], attributes={"keepdims": 1})
    shrink = op.op("Reciprocal", [op.op("Sqrt", [op.op("Max", [largest, root_of_epsilon])])])

    def shrunk(value: ir.Value | None) -> ir.Value:
        return op.op("Mul", [op.op("Mul", [value, shrink]), shrink])

    row, epsilon = shrunk(x), shrunk(root_of_epsilon)
    square = op.op("ReduceMean", [op.op("Mul", [row, row]), op.integers(-1)], attributes={"keepdims": 1})
    root = op.op("Sqrt", [op.op("Add", [square, op.op("Mul", [epsilon, epsilon])])])
    inverse = shrunk(op.op("Reciprocal", [root]))
    return op.op("Mul", [op.op("Mul", [x, inverse]), weight]), inverse


def _rms_norm_grad(op: Operators, inputs: Values, attributes: dict[str, Any]) -> Sequence[ir.Value | None]:
    """inv · (dY·w − x̂ · mean(dY·w·x̂)) with x̂ = x · inv; the frozen weight needs no gradient."""
    d_output, x, weight, inverse = inputs
    normal = op.op("Mul", [x, inverse])
    d_normal = op.op("Mul", [d_output, weight])
    mean = op.op("ReduceMean", [op.op("Mul", [d_normal, normal]), op.integers(-1)], attributes={"keepdims": 1})
    return op.op("Mul", [inverse, op.op("Sub", [d_normal, op.op("Mul", [normal, mean])])]), None


def _concat(op: Operators, inputs: Values, attributes: dict[str, Any]) -> Sequence[ir.Value | None]:
    """Concat, and the sizes that `SplitTraining` takes."""
    joined = op.op("Concat", inputs, attributes={"axis": attributes["axis"]})
    sizes = [_fixed_size(value, attributes["axis"]) for value in inputs]
    return joined, op.integers(*sizes)


def _fixed_size(value: ir.Value | None, axis: int) -> int:
    """A dimension that depends on neither batch nor sequence."""
    size = dimensions(value)[axis]
    if not isinstance(size, int):
        name = value.name if value is not None else None
        raise IncompatibleError(f"{name}: dimension {axis} is {size}, which is known at run time only")
    return size


def _split(op: Operators, inputs: Values, attributes: dict[str, Any], outputs: int) -> Sequence[ir.Value]:
    """Split by the sizes that the lowered `ConcatTraining` gives."""
    parts = op.op_multi_out("Split", inputs, attributes={"axis": attributes["axis"]}, num_outputs=outputs)
    return list(parts)


def _fused_matmul(op: Operators, inputs: Values, attributes: dict[str, Any]) -> Sequence[ir.Value]:
    """alpha · op(A) · op(B), op being a transposition of the two last dimensions or nothing.

    Only values of the forward pass are ever transposed, and their ranks are known.
    """
    if attributes.get("transBatchA") or attributes.get("transBatchB"):
        raise IncompatibleError("FusedMatMul with transposed batch dimensions has no lowering")
    left, right = (
        op.swap_last(value, len(dimensions(value))) if attributes.get(flag) and value is not None else value
        for value, flag in zip(inputs, ("transA", "transB"), strict=True)
    )
    product = op.op("MatMul", [left, right])
    alpha = attributes.get("alpha", 1.0)
    return (product if alpha == 1.0 else op.op("Mul", [product, op.floats(alpha)]),)


LOWERINGS: dict[str, Lowering] = {
    "SoftmaxCrossEntropyLoss": _softmax_cross_entropy,
    "SoftmaxCrossEntropyLossGrad": _softmax_cross_entropy_grad,
    "SoftmaxGrad_13": _softmax_grad,
    "QuickGelu": _quick_gelu,
    "QuickGeluGrad": _quick_gelu_grad,
    _RMS_NORM: _rms_norm,
    "SimplifiedLayerNormalizationGrad": _rms_norm_grad,
    "ConcatTraining": _concat,
    "FusedMatMul": _fused_matmul,
}
"""Standard form of every operator with a fixed number of outputs; `SplitTraining` is beside it."""


def lower(
    model: ir.Model,
    parameters: Sequence[str],
    outputs: Sequence[str] = ("loss", "predictions"),
    *,
    half: bool = False,
) -> ir.Model:
    """Write a gradient graph in standard operators.

    Args:
        model: ONNX Runtime Training's `training_model.onnx`, or the forward graph.
        parameters: LoRA parameters; `<parameter>.grad` becomes an output where the graph accumulates its gradient.
        outputs: Which of the graph's own outputs stay, where it has them.
        half: Write norms for float16. In bfloat16, which squares anything but rounds to eight bits, the plain form is
            more exact, and runtimes know it as one operator.

    Raises:
        IncompatibleError: An operator without a standard form occurs; all of them are named.
    """
    _expose_gradients(model, parameters, outputs)
    for name in [domain for domain in model.opset_imports if domain]:
        if name != CONTRIB:
            del model.opset_imports[name]
    fold(model)
    if half:
        _recognise_norms(model.graph)
    _lower_nodes(model, LOWERINGS | {_RMS_NORM: _rms_norm_in_half} if half else LOWERINGS)
    foreign = sorted({f"{n.op_type} ({n.name})" for n in model.graph if n.domain not in ("", "ai.onnx")})
    if foreign:
        raise IncompatibleError("no standard form is known for " + ", ".join(foreign))
    model.opset_imports.pop(CONTRIB, None)
    return resolve_shapes(model)


_NORM = ("Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Mul")
"""x², its mean, with ε, the root, 1 / root, with x, with the weight: what the exporter writes."""


def _recognise_norms(graph: ir.Graph) -> None:
    """Norms that are written out become the operator that ONNX Runtime Training makes of them, for one lowering."""
    for node in list(graph):
        chain = [node]
        while len(chain) < len(_NORM) and len(users := list(chain[-1].outputs[0].consumers())) == 1:
            chain += users
        if tuple(each.op_type for each in chain) != _NORM:
            continue
        x, normal = node.inputs[0], chain[-2].outputs[0]
        constants = (ir.convenience.get_const_tensor(value) for value in chain[2].inputs if value is not None)
        epsilon = next((value for value in constants if value is not None), None)
        (weight,) = (value for value in chain[-1].inputs if value is not normal)
        if epsilon is None or x not in chain[-2].inputs:
            continue
        op = Operators()
        attributes = {"axis": -1, "epsilon": float(epsilon.numpy().item())}
        op.replace(graph, chain[-1], {chain[-1].outputs[0]: op.op(_RMS_NORM, [x, weight], attributes=attributes)})


def _lower_nodes(model: ir.Model, lowerings: Mapping[str, Lowering]) -> None:
    for node in list(model.graph):
        op = Operators()
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if node.op_type == "SplitTraining":
            results: Sequence[ir.Value | None] = _split(op, node.inputs, attributes, len(node.outputs))
        elif node.op_type in lowerings:
            results = lowerings[node.op_type](op, node.inputs, attributes)
        else:
            continue
        kept = {old: new for old, new in zip(node.outputs, results, strict=False) if new is not None}
        for old, new in kept.items():
            if old.dtype is not None:
                new.dtype = old.dtype
        op.replace(model.graph, node, kept)


def _expose_gradients(model: ir.Model, parameters: Sequence[str], outputs: Sequence[str]) -> None:
    """Parameters become inputs, `<parameter>.grad` outputs; the objective goes, and with it what accumulates."""
    graph = model.graph
    kept = [value for value in graph.outputs if value.name in outputs]
    gradients = {
        str(node.inputs[1].name).removesuffix("_grad"): node.inputs[1]
        for node in graph
        if node.op_type == "InPlaceAccumulatorV2" and node.inputs[1] is not None
    }
    graph.outputs.clear()
    graph.outputs.extend(kept)
    inputs = {value.name: value for value in graph.inputs}
    for name in parameters:
        parameter = graph.initializers.pop(name, None) or inputs[name]
        parameter.const_value = None
        if name not in inputs:
            graph.inputs.append(parameter)
        if name in gradients:
            gradient = gradients[name]
            gradient.name = f"{name}.grad"
            gradient.shape, gradient.type = parameter.shape, parameter.type
            graph.outputs.append(gradient)
    remove_unused(model)
