"""The frozen weights of the training graphs: references into the GenAI model's data file, never a copy.

The GenAI builder stores a linear layer transposed (in, out) in fp32 or fp16, and as the blocks of `MatMulNBits` in int4
and int8: rows of the checkpoint's (out, in) matrix; of int4 two values a byte, low nibble first, zero point 8; of int8
zero point 128. `DequantizeLinear` reads the very same bytes as uint4 or uint8. The builder splits the packed gate_up
projection in two; the training graphs join it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as rewrites

from edgetune.config import Base
from edgetune.errors import VerificationError
from edgetune.formats.frozen_weights import FrozenIndex, Layout, Stored
from edgetune.formats.genai import HALF, MODEL, QUANTISED, WEIGHTS
from edgetune.model.architecture import Architecture, tensor_shapes
from edgetune.model.blocks import BITS, BLOCK_SIZE
from edgetune.preparation.rewrites.operators import CONTRIB, Operators
from edgetune.preparation.rewrites.shapes import fold

ReadLinear = Callable[[str, Sequence[str]], ir.Value]
_ZERO_POINTS_BYTE = {4: 0x88, 8: 0x80}
"""A byte of zero points by their bits: two of 8, or one of 128."""
_IN_BLOCKS = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
_LAYOUTS: dict[Base, Layout] = {"fp32": "transposed", "fp16": "half", "int4": "int4", "int8": "int8"}
"""How each base stores the tensors of linear layers."""


def attach_weights(model: ir.Model, folder: Path, architecture: Architecture, base: Base) -> None:
    """Turn every frozen weight that is a graph input into a reference to the GenAI model's data.

    Args:
        model: A graph whose inputs carry the checkpoint's tensor names; it is changed.
        folder: Holds the GenAI model `model.onnx` and its data; the graph will be saved there too.
        architecture: Sizes of the model.
        base: How the GenAI model stores linear layers.

    Raises:
        VerificationError: The GenAI model lacks a tensor.
    """
    stored = ir.load(folder / MODEL).graph.initializers
    op = Operators()
    source = _Source(op, stored, model.graph, base)
    read_linear: ReadLinear = source.dequantised if base in BITS else source.transposed
    for value in list(model.graph.inputs):
        name = str(value.name)
        if not name.endswith(".weight") or ".lora_" in name:
            continue
        weight = _frozen_weight(name, architecture, source, read_linear)
        value.replace_all_uses_with(weight)
        model.graph.inputs.remove(value)
    for node in reversed(op.nodes):
        node.name = f"{node.outputs[0].name}/{node.op_type}"
        model.graph.insert_before(model.graph[0], node)
    cancel_transposes(model.graph)
    fold(model)


def _frozen_weight(name: str, architecture: Architecture, source: _Source, read_linear: ReadLinear) -> ir.Value:
    """The value that plays the checkpoint's tensor `name`, in the checkpoint's orientation."""
    stored = _stored_names(name, architecture)
    return read_linear(name, stored) if stored[0].endswith(_LINEAR) else source.plain(stored[0])


_LINEAR = ".MatMul.weight"


def _stored_names(name: str, architecture: Architecture) -> list[str]:
    """The GenAI model's names for the checkpoint's tensor `name`, or for what is stacked in it by rows."""
    module = name.removesuffix(".weight")
    if module == "model.norm":
        return [f"model.layers.{architecture.num_hidden_layers}.final_norm_layernorm.weight"]
    if module == "model.embed_tokens" or module.endswith("layernorm"):
        return [name]
    if module.endswith("gate_up_proj"):
        parent = module.removesuffix("gate_up_proj")
        return [f"{parent}{half}_proj{_LINEAR}" for half in ("gate", "up")]
    return [f"{module.replace('.self_attn.', '.attn.')}{_LINEAR}"]


def index_weights(folder: Path, architecture: Architecture, base: Base) -> FrozenIndex:
    """Where every frozen tensor lies in the GenAI model's data file.

    Args:
        folder: Holds the GenAI model `model.onnx` and its data.
        architecture: Sizes of the model.
        base: How the GenAI model stores linear layers.

    Raises:
        VerificationError: The GenAI model lacks a tensor.
    """
    stored = ir.load(folder / MODEL).graph.initializers
    names = {**tensor_shapes(architecture), "lm_head.weight": ()}
    tensors = {name: [_location(stored, own, base) for own in _stored_names(name, architecture)] for name in names}
    return FrozenIndex(WEIGHTS, tensors)


def _location(stored: Mapping[str, ir.Value], name: str, base: Base) -> Stored:
    if not name.endswith(_LINEAR):
        tensor = _external(stored, name)
        return Stored("plain", list(tensor.shape.numpy()), tensor.offset or 0)
    layout = _LAYOUTS[base]
    if base not in BITS:
        tensor = _external(stored, name + HALF if base == "fp16" else name)
        return Stored(layout, list(tensor.shape.numpy())[::-1], tensor.offset or 0)
    packed, scales = _external(stored, name + QUANTISED[BITS[base]]), _external(stored, f"{name}_scales")
    rows, blocks, _ = packed.shape.numpy()
    return Stored(layout, [rows, blocks * BLOCK_SIZE], packed.offset or 0, scales.offset or 0)


def _external(stored: Mapping[str, ir.Value], name: str) -> ir.ExternalTensor:
    value = stored.get(name)
    if value is None or not isinstance(value.const_value, ir.ExternalTensor):
        raise VerificationError(f"the GenAI model has no tensor {name!r}; this builder's naming is not known")
    return value.const_value


class _Source:
    """Tensors of the GenAI model, added to a training graph when they are first read."""

    def __init__(self, op: Operators, stored: Mapping[str, ir.Value], graph: ir.Graph, base: Base) -> None:
        self._op = op
        self._stored = stored
        self._graph = graph
        self._bits = BITS.get(base, 0)
        self._half = base == "fp16"

    def plain(self, name: str) -> ir.Value:
        """A tensor as it is stored."""
        return self._initializer(_external(self._stored, name), name)

    def transposed(self, name: str, stored: Sequence[str]) -> ir.Value:
        """The fp32 or fp16 linear layer `name`: tensors (in, out) that stand side by side."""
        joined = self._joined([self._cast(part) if self._half else self.plain(part) for part in stored], axis=1)
        value = self._op.op("Transpose", [joined], attributes={"perm": [1, 0]})
        value.name = name
        return value

    def dequantised(self, name: str, stored: Sequence[str]) -> ir.Value:
        """The linear layer `name` in blocks: tensors (out, in), blocks along the input, one above the other."""
        value = self._joined([self._dequantised(part) for part in stored], axis=0)
        value.name = name
        return value

    def _joined(self, parts: list[ir.Value], axis: int) -> ir.Value:
        if len(parts) == 1:
            return parts[0]
        value = self._op.op("Concat", parts, attributes={"axis": axis})
        value.name = f"{parts[0].name}.joined"
        return value

    def _cast(self, name: str) -> ir.Value:
        value = self._op.op("Cast", [self.plain(name + HALF)], attributes={"to": ir.DataType.FLOAT})
        value.name, value.dtype = name, ir.DataType.FLOAT
        return value

    def _dequantised(self, name: str) -> ir.Value:
        quantised = name + QUANTISED[self._bits]
        packed, scales = (_external(self._stored, part) for part in (quantised, f"{name}_scales"))
        rows, blocks, _ = packed.shape.numpy()
        inputs = [
            self._initializer(_view(packed, _IN_BLOCKS[self._bits], (rows, blocks * BLOCK_SIZE)), quantised),
            self._initializer(_view(scales, scales.dtype, (rows, blocks)), f"{name}_scales"),
            self._zero_points(rows, blocks),
        ]
        value = self._op.op("DequantizeLinear", inputs, attributes={"axis": 1, "block_size": BLOCK_SIZE})
        value.name = f"{name}.dequantised"
        return value

    def _zero_points(self, rows: int, blocks: int) -> ir.Value:
        """Zero points (rows, blocks), shared by all layers of the same shape."""
        name = f"zero_points_{rows}x{blocks}"
        count = (rows * blocks * self._bits + 7) // 8
        points = np.full(count, _ZERO_POINTS_BYTE[self._bits], dtype=np.uint8)
        shape, dtype = ir.Shape((rows, blocks)), _IN_BLOCKS[self._bits]
        if dtype == ir.DataType.UINT8:
            return self._initializer(ir.Tensor(points.reshape(rows, blocks), name=name), name)
        return self._initializer(ir.PackedTensor(points, dtype, shape=shape, name=name), name)

    def _initializer(self, tensor: ir.ExternalTensor | ir.PackedTensor[Any] | ir.Tensor[Any], name: str) -> ir.Value:
        if name not in self._graph.initializers:
            self._graph.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
        return self._graph.initializers[name]


def _view(tensor: ir.ExternalTensor, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
    """The same bytes of the same file as another type and shape."""
    return ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, dtype,
        name=str(tensor.name), shape=ir.Shape(shape), base_dir=tensor.base_dir,
    )  # fmt: skip


def cancel_transposes(graph: ir.Graph) -> None:
    """Transpose(Transpose(x)) of two dimensions is x."""
    for node in graph:
        source = node.inputs[0].producer() if _swaps_matrix(node) and node.inputs[0] is not None else None
        if source is not None and _swaps_matrix(source) and source.inputs[0] is not None:
            node.outputs[0].replace_all_uses_with(source.inputs[0])


def absorb_transposes(model: ir.Model) -> None:
    """Let products read frozen weights as they are stored: MatMul(x, Transpose(w)) becomes FusedMatMul(x, w, transB).

    For the artifacts only, which hold such operators anyway. ONNX Runtime Training 1.19.2 pushes a Transpose through
    `DequantizeLinear` without transposing the scales of its blocks, and then refuses the graph.
    """
    model.opset_imports[CONTRIB] = 1
    for node in list(model.graph):
        if not _swaps_matrix(node) or node.inputs[0] is None or node.inputs[0].producer() is None:
            continue
        for user, index in list(node.outputs[0].uses()):
            flipped = user.attributes["transB"].as_int() if "transB" in user.attributes else 0
            if index == 1 and user.op_type in ("MatMul", "FusedMatMul"):
                user.op_type, user.domain = "FusedMatMul", CONTRIB
                user.attributes["transB"] = ir.AttrInt64("transB", 1 - flipped)
                user.replace_input_with(1, node.inputs[0])
    rewrites.RemoveUnusedNodesPass()(model)


def _swaps_matrix(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]
