"""Checks a graph against the rules that Vitis AI documents, without Vitis AI.

Sources: "Supported Operators" and "ONNX Operators" of Vitis AI 6.2 (vitisai.docs.amd.com, gen2), the Vitis AI User
Guide UG1414 3.5 ("Programming with VOE"), "Model Compatibility" of Ryzen AI, and Quark's "Supported Data and Op Types".
A graph that passes is one that the documents allow; which of its operators run on the accelerator, only the compiler
decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgetune.errors import IncompatibleError, UsageError, VerificationError

NEWEST_OPSET = 17
"""Recommended for Ryzen AI; Vitis AI 3.5 takes up to 18, Vitis AI 6.2 up to 20."""
OPERATORS = frozenset(
    {
        # The INT8 column of Vitis AI 6.2, as far as decoders are made of such operators; of those after Slice the page
        # that was at hand was cut off.
        "Abs", "Add", "Clip", "Concat", "Cos", "Div", "Erf", "Exp", "Expand", "Flatten", "Gather", "Gelu",
        "HardSigmoid", "HardSwish", "Identity", "LayerNormalization", "Log", "LogSoftmax", "Max", "Min", "Mul", "Neg",
        "Pad", "Pow", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare", "Relu",
        "Reshape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose",
        "Unsqueeze",
        # Quantised products: Quark's table, and Ryzen AI's list.
        "Conv", "Gemm", "MatMul",
        # How int8 is written.
        "DequantizeLinear", "QuantizeLinear",
    }
)  # fmt: skip
"""Operators that may occur."""
PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
"""Operators that have to compute in int8."""
_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT64})
"""float32, int8, and int64 for shapes and axes."""
_SHOWN = 20


@dataclass(frozen=True)
class Violation:
    """A rule that a graph breaks in one place."""

    rule: str
    """Name of the rule."""
    where: str
    """Name of the node or value."""
    found: str
    """What is there, and what was expected."""

    def __str__(self) -> str:
        """The violation in one line."""
        return f"{self.rule}: {self.where}: {self.found}"


def check_file(path: Path) -> list[Violation]:
    """All violations in an ONNX file.

    Raises:
        UsageError: There is no such file.
        VerificationError: It is not an ONNX model.
    """
    import onnx

    if not path.is_file():
        raise UsageError(f"{path}: no such file; give an ONNX graph, or a bundle that `edgetune split` made")
    try:
        proto = onnx.load(path)
        # Shapes inside are worked out here: those that are written down may be missing.
        del proto.graph.value_info[:]
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    except Exception as error:  # protobuf, onnx and onnx_ir each have their own
        raise VerificationError(f"{path}: not an ONNX model that can be read ({error})") from error
    return check(model)


def check(model: ir.Model) -> list[Violation]:
    """All violations of a model whose shapes were inferred, rule by rule."""
    return [violation for rule in RULES for violation in rule(model)]


def require_conformance(path: Path) -> None:
    """Refuse a graph that breaks a rule.

    Raises:
        IncompatibleError: The graph breaks a rule; the first 20 violations are named, the others counted.
    """
    found = check_file(path)
    if found:
        more = [f"… and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise IncompatibleError("\n".join([f"{path} breaks rules of Vitis AI:", *map(str, found[:_SHOWN]), *more]))


def _opset(model: ir.Model) -> Iterator[Violation]:
    version = model.opset_imports.get("")
    if version is None or version > NEWEST_OPSET:
        yield Violation("opset", "the graph", f"is of opset {version}; expected {NEWEST_OPSET} at most")


def _domains(model: ir.Model) -> Iterator[Violation]:
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            yield Violation("domain", _name(node), f"is {node.domain}.{node.op_type}; expected standard ONNX")


def _operators(model: ir.Model) -> Iterator[Violation]:
    for node in model.graph:
        if node.domain in ("", "ai.onnx") and node.op_type not in OPERATORS:
            yield Violation("operator", _name(node), f"is {node.op_type}, which is not among those for INT8")


def _shapes(model: ir.Model) -> Iterator[Violation]:
    for value in _values(model):
        if value.shape is None:
            yield Violation("static shape", _of(value), "has no known shape; expected numbers only")
        elif not all(isinstance(d, int) for d in value.shape):
            yield Violation("static shape", _of(value), f"is {_shape(value)}; expected numbers only")
        elif 0 in value.shape:
            yield Violation("static shape", _of(value), f"is {_shape(value)}; expected no dimension of size 0")


def _types(model: ir.Model) -> Iterator[Violation]:
    for value in [*_values(model), *model.graph.initializers.values()]:
        if value.dtype is not None and value.dtype not in _TYPES:
            yield Violation("type", _of(value), f"is {value.dtype.name}; expected FLOAT, INT8, or INT64 for shapes")


def _symmetry(model: ir.Model) -> Iterator[Violation]:
    for node in _quantisers(model):
        zero = _constant(node, 2)
        if zero is None:
            yield Violation("symmetric int8", _name(node), "has no constant zero point; expected int8 zero")
        elif zero.dtype != np.int8 or zero.any():
            found = np.unique(zero)[:4].tolist()
            has = f"has zero point {found} of {zero.dtype}; expected int8 zero"
            yield Violation("symmetric int8", _name(node), has)


def _scales(model: ir.Model) -> Iterator[Violation]:
    for node in _quantisers(model):
        scale = _constant(node, 1)
        if scale is None or scale.size != 1:
            found = "no constant scale" if scale is None else f"{scale.size} scales"
            yield Violation("scale", _name(node), f"has {found}; expected one for the whole tensor")
        elif not _is_power_of_two(float(scale.item())):
            yield Violation("scale", _name(node), f"has scale {scale.item():.6g}; expected a power of two")


def _products(model: ir.Model) -> Iterator[Violation]:
    for node in model.graph:
        if node.op_type not in PRODUCTS:
            continue
        for value in node.inputs[:2]:
            producer = value.producer() if value is not None else None
            if producer is None or producer.op_type != "DequantizeLinear":
                name = "nothing" if value is None else value.name
                yield Violation("int8 product", _name(node), f"takes {name} in float; expected int8 behind it")
        if not node.outputs[0].uses() or any(user.op_type != "QuantizeLinear" for user in node.outputs[0].consumers()):
            yield Violation("int8 product", _name(node), "gives float; expected QuantizeLinear behind it")


RULES: tuple[Callable[[ir.Model], Iterator[Violation]], ...] = (
    _opset, _domains, _operators, _shapes, _types, _symmetry, _scales, _products,
)  # fmt: skip
"""Every rule."""


def _quantisers(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear"))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _constant(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def _is_power_of_two(scale: float) -> bool:
    return math.isfinite(scale) and scale > 0 and math.frexp(scale)[0] == 0.5


def _name(node: ir.Node) -> str:
    return node.name or f"{node.op_type} for {node.outputs[0].name}"


def _of(value: ir.Value) -> str:
    return str(value.name)


def _shape(value: ir.Value) -> str:
    return f"[{', '.join('?' if d is None else str(d) for d in value.shape or ())}]"
