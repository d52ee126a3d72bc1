"""Shape arithmetic made explicit: nothing of it is left, and the graph computes what it did."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from edgetune.errors import IncompatibleError
from edgetune.preparation.rewrites.shapes import resolve_shapes

SIZES = [(1, 1), (2, 5), (3, 40), (5, 3)]
ARITHMETIC = {"Shape", "Size", "Range", "ConstantOfShape"}

# As the exporter writes `x.view(batch, sequence, 2, 4).transpose(1, 2)` and back.
HEADS = """
  <ir_version: 10, opset_import: ["": 21]>
  heads (float[batch,sequence,8] x) => (float[batch,sequence,8] y)
  <int64 first = {0}, int64 second = {1}, int64[1] axis = {0}, int64[1] two = {2}, int64[1] four = {4},
   int64[1] rest = {-1}>
  {
    shape = Shape(x)
    b = Gather<axis=0>(shape, first)
    s = Gather<axis=0>(shape, second)
    b1 = Unsqueeze(b, axis)
    s1 = Unsqueeze(s, axis)
    split = Concat<axis=0>(b1, s1, two, four)
    heads = Reshape(x, split)
    turned = Transpose<perm=[0,2,1,3]>(heads)
    soft = Softmax<axis=-1>(turned)
    back = Transpose<perm=[0,2,1,3]>(soft)
    joined = Concat<axis=0>(b1, s1, rest)
    y = Reshape(back, joined)
  }
"""
# `repeat_kv` of grouped-query attention: Where and Equal choose the sizes of the Expand.
REPEATED_HEADS = """
  <ir_version: 10, opset_import: ["": 21]>
  repeated (float[batch,2,sequence,4] x) => (float[batch,6,sequence,4] y)
  <int64 i0 = {0}, int64 i2 = {2}, int64[1] axis0 = {0}, int64[1] axis2 = {2}, int64[1] two = {2},
   int64[1] three = {3}, int64[1] four = {4}, int64[1] six = {6}, int64[1] five = {5}, int64 minus = {-1}>
  {
    shape = Shape(x)
    b = Gather<axis=0>(shape, i0)
    s = Gather<axis=0>(shape, i2)
    b1 = Unsqueeze(b, axis0)
    s1 = Unsqueeze(s, axis0)
    wide = Unsqueeze(x, axis2)
    asked = Concat<axis=0>(b1, two, three, s1, four)
    ones = ConstantOfShape<value = int64[1] {1}>(five)
    inferred = Mul(ones, minus)
    is_inferred = Equal(asked, inferred)
    sizes = Where(is_inferred, ones, asked)
    repeated = Expand(wide, sizes)
    joined = Concat<axis=0>(b1, six, s1, four)
    y = Reshape(repeated, joined)
  }
"""
# `torch.cat((-x[..., half:], x[..., :half]))` with a half that is computed, then a slice over the whole sequence.
ROTATED_HALVES = """
  <ir_version: 10, opset_import: ["": 21]>
  rotated (float[batch,sequence,6] x) => (float[batch,sequence,6] y)
  <int64 i1 = {1}, int64 i2 = {2}, int64 two = {2}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] last = {2},
   int64[1] end = {9223372036854775807}>
  {
    shape = Shape(x)
    d = Gather<axis=0>(shape, i2)
    half = Div(d, two)
    half1 = Unsqueeze(half, zero)
    upper = Slice(x, half1, end, last, one)
    negative = Neg(upper)
    lower = Slice(x, zero, half1, last, one)
    rotated = Concat<axis=-1>(negative, lower)
    s = Gather<axis=0>(shape, i1)
    s1 = Unsqueeze(s, zero)
    all = Slice(rotated, zero, s1, one, one)
    y = Exp(all)
  }
"""
# The loss sees all rows as one.
FLATTENED = """
  <ir_version: 10, opset_import: ["": 21]>
  flat (float[batch,sequence,8] x) => (float[rows,8] y)
  <int64 i2 = {2}, int64[1] zero = {0}, int64[1] rest = {-1}>
  {
    shape = Shape(x)
    d = Gather<axis=0>(shape, i2)
    d1 = Unsqueeze(d, zero)
    target = Concat<axis=0>(rest, d1)
    rows = Reshape(x, target)
    y = Exp(rows)
  }
"""
# Same shape, other content: must not be taken for a slice of everything.
REVERSED = """
  <ir_version: 10, opset_import: ["": 21]>
  reversed (float[batch,sequence,8] x) => (float[batch,sequence,8] y)
  <int64[1] start = {-1}, int64[1] end = {-9223372036854775807}, int64[1] axis = {1}, int64[1] step = {-1}>
  {
    turned = Slice(x, start, end, axis, step)
    y = Exp(turned)
  }
"""
SUPPORTED = {
    "heads": (HEADS, {"Reshape", "Transpose", "Softmax"}),
    "repeated heads": (REPEATED_HEADS, {"Unsqueeze", "Expand", "Reshape"}),
    "rotated halves": (ROTATED_HALVES, {"Slice", "Neg", "Concat", "Exp"}),
    "flattened": (FLATTENED, {"Reshape", "Exp"}),
    "reversed": (REVERSED, {"Slice", "Exp"}),
}

POSITIONS = """
  <ir_version: 10, opset_import: ["": 21]>
  positions (float[batch,sequence,8] x) => (int64[sequence] y)
  <int64 one = {1}, int64 zero = {0}>
  {
    shape = Shape(x)
    s = Gather<axis=0>(shape, one)
    y = Range(zero, s, one)
  }
"""
COUNTED = """
  <ir_version: 10, opset_import: ["": 21]>
  counted (float[batch,sequence,8] x) => (float y)
  {
    size = Size(x)
    count = Cast<to=1>(size)
    total = ReduceSum<keepdims=0>(x)
    y = Div(total, count)
  }
"""
EXCHANGED = """
  <ir_version: 10, opset_import: ["": 21]>
  exchanged (float[batch,sequence,8] x) => (float[sequence,batch,8] y)
  <int64 i0 = {0}, int64 i1 = {1}, int64[1] zero = {0}, int64[1] eight = {8}>
  {
    shape = Shape(x)
    b = Gather<axis=0>(shape, i0)
    s = Gather<axis=0>(shape, i1)
    b1 = Unsqueeze(b, zero)
    s1 = Unsqueeze(s, zero)
    target = Concat<axis=0>(s1, b1, eight)
    y = Reshape(x, target)
  }
"""
REPEATED_ROWS = """
  <ir_version: 10, opset_import: ["": 21]>
  repeated_rows (float[batch,sequence,8] x, float[1,sequence,8] row) => (float[batch,sequence,8] y)
  {
    shape = Shape(x)
    y = Expand(row, shape)
  }
"""
UNKNOWN = """
  <ir_version: 10, opset_import: ["": 21]>
  unknown (float[batch,sequence,8] x, int64[n] target) => (float y)
  {
    reshaped = Reshape(x, target)
    y = ReduceSum<keepdims=0>(reshaped)
  }
"""
REFUSED = {
    "positions": (POSITIONS, "Range"),
    "counted": (COUNTED, "Size"),
    "exchanged": (EXCHANGED, "more than one unknown"),
    "repeated rows": (REPEATED_ROWS, "repeats a symbolic dimension"),
    "unknown": (UNKNOWN, "cannot be inferred"),
}


def parse(text: str) -> onnx.ModelProto:
    model: onnx.ModelProto = onnx.parser.parse_model(text)
    for number, node in enumerate(model.graph.node):
        node.name = f"node{number}"
    onnx.checker.check_model(model)
    return model


def run(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize("name", SUPPORTED)
def test_arithmetic_becomes_constant_and_the_result_stays(name: str) -> None:
    text, operators = SUPPORTED[name]
    original = parse(text)
    resolved = ir.to_proto(resolve_shapes(ir.from_proto(original)))
    onnx.checker.check_model(resolved)
    assert {node.op_type for node in resolved.graph.node} == operators
    constants = {tensor.name for tensor in resolved.graph.initializer}
    for node in resolved.graph.node:
        if node.op_type in ("Reshape", "Expand", "Slice"):
            assert set(node.input[1:]) <= constants
    for batch, sequence in SIZES:
        dims = [d.dim_value or {"batch": batch, "sequence": sequence}[d.dim_param] for d in shape_of(original, "x")]
        x = np.random.default_rng(batch).standard_normal(dims, dtype=np.float32)
        np.testing.assert_array_equal(run(resolved, x), run(original, x))


def shape_of(model: onnx.ModelProto, name: str) -> list[onnx.TensorShapeProto.Dimension]:
    value = next(value for value in model.graph.input if value.name == name)
    return list(value.type.tensor_type.shape.dim)


def test_a_slice_of_everything_disappears() -> None:
    resolved = resolve_shapes(ir.from_proto(parse(ROTATED_HALVES)))
    # Two halves are cut; the slice over the whole sequence is gone.
    assert sum(node.op_type == "Slice" for node in resolved.graph) == 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_arithmetic_is_refused_with_the_node(name: str) -> None:
    text, reason = REFUSED[name]
    with pytest.raises(IncompatibleError, match=reason) as caught:
        resolve_shapes(ir.from_proto(parse(text)))
    assert name == "unknown" or "node" in str(caught.value)


def test_values_carry_symbolic_shapes() -> None:
    resolved = resolve_shapes(ir.from_proto(parse(HEADS)))
    shapes = {tuple(map(str, value.shape or ())) for node in resolved.graph for value in node.outputs}
    assert ("batch", "sequence", "2", "4") in shapes
    assert ("batch", "2", "sequence", "4") in shapes
    assert not ARITHMETIC & {node.op_type for node in resolved.graph}
