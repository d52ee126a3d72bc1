"""GenAI's model builder without the model in memory: weights come from mapped files and leave one at a time.

As it is, the builder loads the whole model in fp32, casts it into tensors that it keeps, and for int4 serialises all of
it once more before the quantiser starts: about nine bytes a parameter. Three of its methods are exchanged, as Olive
exchanges others. What they make is the builder's, but for the integers and scales of weights in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.config import Base, Quantiser
from edgetune.formats.genai import BLOCKS_DOMAIN, HALF, QUANTISED, block_attributes
from edgetune.host.mapped_model import mapped_model
from edgetune.model.blocks import BITS, BLOCK_SIZE
from edgetune.model.rounding import (
    Weights,
    largest_value_scales,
    least_squares_scales,
    nearest_points,
    packed_points,
)

if TYPE_CHECKING:
    import onnx_ir as ir

_PIECE = 1 << 20
"""Weights that are rounded at once, roughly; a handful of arrays of this size are in memory."""


@contextmanager
def lean_builder(base: Base, quantiser: Quantiser) -> Iterator[None]:
    """Within, the builder maps, casts and quantises weight by weight.

    Args:
        base: What becomes of linear layers where the builder would make them int4: that, int8, or fp16.
        quantiser: How an int4 base is rounded: `nearest` as by the builder's own quantiser, to the byte, and otherwise
            by scales of least squared error. An int8 base is rounded as by the builder's.
    """
    model = import_module("onnxruntime_genai.models.builder").Model
    lean = {
        "load_weights": lambda _, folder: mapped_model(Path(folder)),
        "make_initializer": _cast_once(model.make_initializer),
        "to_int4": _halve if base == "fp16" else _put_into_blocks(base, quantiser),
    }
    original = {name: getattr(model, name) for name in lean}
    for name, method in lean.items():
        setattr(model, name, method)
    try:
        yield
    finally:
        for name, method in original.items():
            setattr(model, name, method)


def _cast_once(make_initializer: Callable[..., None]) -> Callable[..., None]:
    """Give up a weight when it is cast; the builder's own closure keeps the result for good."""

    def make(builder: Any, tensor: Any, /, name: str, to: ir.DataType | None = None) -> None:
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

        make_initializer(builder, tensor, name, to)
        if to is None:
            return
        held = [tensor]

        def cast() -> TorchTensor:
            return TorchTensor(held.pop().to(to_torch_dtype(to)), name=name)

        builder.model.graph.initializers[name].const_value = ir.LazyTensor(
            cast, dtype=to, shape=ir.Shape(tensor.shape), name=name
        )

    return make


def _put_into_blocks(base: Base, quantiser: Quantiser) -> Callable[[Any], ir.Model]:
    """Turn one `MatMul` after the other into the `MatMulNBits` that the builder's quantiser makes of it."""
    bits = BITS.get(base, 0)
    least_squares = base == "int4" and quantiser != "nearest"

    def put(builder: Any) -> ir.Model:
        import onnx_ir as ir

        whole: ir.Model = builder.model
        whole.graph.opset_imports[BLOCKS_DOMAIN] = 1
        for node, weight in list(_products(whole.graph)):
            name = str(weight.name)
            values = _values(weight).T  # (out, in), as the checkpoint has it
            del whole.graph.initializers[name]
            packed, scales = _rounded(values, bits, least_squares=least_squares)
            stored = [
                ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
                for tensor in (ir.Tensor(packed, name=name + QUANTISED[bits]), ir.Tensor(scales, name=f"{name}_scales"))
            ]
            node.op_type, node.domain, node.name = "MatMulNBits", BLOCKS_DOMAIN, f"{node.name}{QUANTISED[bits]}"
            outputs, inputs = values.shape
            sizes = block_attributes(outputs, inputs, bits)
            node.attributes.update({key: ir.AttrInt64(key, value) for key, value in sorted(sizes.items())})
            node.resize_inputs(1 + len(stored))
            for place, value in enumerate(stored, 1):
                whole.graph.register_initializer(value)
                node.replace_input_with(place, value)
        return whole

    return put


def _rounded(values: Weights, bits: int, *, least_squares: bool) -> tuple[NDArray[np.uint8], Weights]:
    """A weight (out, in) in blocks: integers (out, in / 32, bytes of a block) and scales (out, in / 32)."""
    outputs, inputs = values.shape
    packed = np.empty((outputs, inputs * bits // 8), np.uint8)
    scales = np.empty((outputs, inputs // BLOCK_SIZE), np.float32)
    rows = max(1, _PIECE // inputs)
    for start in range(0, outputs, rows):
        piece, span = np.ascontiguousarray(values[start : start + rows]), slice(start, start + rows)
        scales[span] = least_squares_scales(piece) if least_squares else largest_value_scales(piece, bits)
        packed[span] = packed_points(nearest_points(piece, scales[span], bits), bits)
    return packed.reshape(*scales.shape, -1), scales


def _halve(builder: Any) -> ir.Model:
    """Store the weight of every `MatMul` in fp16, and cast it where it is used."""
    import onnx_ir as ir

    whole: ir.Model = builder.model
    for node, weight in list(_products(whole.graph)):
        name = str(weight.name)
        del whole.graph.initializers[name]
        half = ir.Value(name=name + HALF, type=ir.TensorType(ir.DataType.FLOAT16), shape=weight.shape)
        half.const_value = _as_half(weight, str(half.name))
        whole.graph.register_initializer(half)
        cast = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT}, name=f"{name}.Cast")
        cast.outputs[0].name = name
        whole.graph.insert_before(node, cast)
        node.replace_input_with(1, cast.outputs[0])
    return whole


def _as_half(weight: ir.Value, name: str) -> ir.LazyTensor:
    """The weight in fp16, made when it is written."""
    import onnx_ir as ir

    def half() -> ir.Tensor[Any]:
        values = _values(weight).astype(np.float16)
        if not np.isfinite(values).all():
            raise ValueError(f"{weight.name} has numbers that fp16 cannot hold; use --base fp32 or int8")
        return ir.Tensor(values, name=name)

    shape = ir.Shape([] if weight.shape is None else weight.shape)
    return ir.LazyTensor(half, dtype=ir.DataType.FLOAT16, shape=shape, name=name)


def _products(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Every `MatMul` with a weight, and the weight."""
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.is_initializer():
            yield node, weight


def _values(weight: ir.Value) -> Weights:
    """The numbers of a weight in fp32, (in, out)."""
    tensor = weight.const_value
    assert tensor is not None  # for mypy: it is an initializer
    return tensor.numpy()
