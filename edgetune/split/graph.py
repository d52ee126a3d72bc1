"""The trunk as one float32 graph, put together from the bundle's layered graphs and its frozen weights.

`layers/attention.onnx` and `layers/mlp.onnx` are repeated for every layer and piece, with the weights as initializers.
What belongs to the adapters is left out: in the trunk they are zero and stay so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as rewrites

from edgetune.errors import ResourceError
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.layered_graphs import pieces_of
from edgetune.formats.roles import LAYERS
from edgetune.model.architecture import frozen_weights
from edgetune.model.pieces import LAYER_PREFIX, Slice, attention_slices, mlp_slices
from edgetune.runtimes.layered.onnxruntime.backend import OrtBackend

OPSET, IR_VERSION = 17, 8
"""Ryzen AI recommends opset 17, Vitis AI 3.5 takes up to 18, Vitis AI 6.2 up to 20."""
TABLES = ("attn_bias", "rope_cos", "rope_sin")
_LARGEST_PROTOBUF = 2**31 - 1
_FLOAT_BYTES = 4
"""Bytes of a float32."""


@dataclass
class TrunkGraph:
    """The trunk's graph, and which of its products belong to which projection."""

    model: ir.Model
    """Inputs `hidden` (batch, sequence, hidden_size), `attn_bias`, `rope_cos`, `rope_sin`; output `output`."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Name of the activation that is multiplied, by the name of the product's result in the graph."""
    modules: dict[str, str] = field(default_factory=dict)
    """Projection in the checkpoint that the product belongs to, by the name of the product's result in the graph."""


def build_trunk(bundle: Bundle, layers: int) -> TrunkGraph:
    """Put the lowest layers of a bundle together.

    Args:
        bundle: A bundle with the layered form.
        layers: Number of layers, from the first one on.

    Raises:
        ResourceError: Their float32 weights are more than an ONNX file can hold.
    """
    architecture, pieces = bundle.manifest.architecture, pieces_of(bundle.manifest)
    weights = sum(frozen_weights(architecture).values())
    most = _LARGEST_PROTOBUF // (_FLOAT_BYTES * weights)
    if layers > most:
        raise ResourceError(
            f"the float32 graph of {layers} layers has {_FLOAT_BYTES * weights * layers:,} bytes of weights, "
            f"and an ONNX file holds 2 GiB; use --layers {most} or fewer"
        )
    composer = _Composer(bundle)
    sublayers = (
        ("attention", list(attention_slices(architecture, pieces.attention))),
        ("mlp", list(mlp_slices(architecture, pieces.mlp))),
    )
    for layer in range(layers):
        for name, slices in sublayers:
            composer.append(layer, name, slices)
    return composer.finished()


class _Composer:
    """Builds the trunk's graph out of copies of the sublayers' graphs."""

    def __init__(self, bundle: Bundle) -> None:
        self._frozen = FrozenWeights(bundle.path, bundle.manifest.architecture)
        self._backend = OrtBackend(bundle, "fp32")
        self._sources = {name: ir.load(bundle.file(f"{LAYERS}/{name}")) for name in ("attention", "mlp")}
        self._tables = {value.name: _like(value, str(value.name)) for value in self._given() if value.name in TABLES}
        (hidden,) = (value for value in self._given() if value.name == "hidden")
        self._input = self._hidden = _like(hidden, "hidden")
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []
        self._inputs: dict[str, str] = {}
        self._modules: dict[str, str] = {}

    def _given(self) -> Iterator[ir.Value]:
        return iter(self._sources["attention"].graph.inputs)

    def append(self, layer: int, name: str, pieces: list[dict[str, Slice]]) -> None:
        """One sublayer, piece by piece."""
        residual = self._hidden
        for index, slices in enumerate(pieces):
            residual = self._append_piece(f"layers.{layer}.{name}.{index}", layer, name, slices, residual)
        self._hidden = residual

    def _append_piece(
        self, prefix: str, layer: int, sublayer: str, slices: Mapping[str, Slice], residual: ir.Value
    ) -> ir.Value:
        source = self._sources[sublayer].graph
        values: dict[ir.Value, ir.Value] = {}
        adapters: set[ir.Value] = set()
        modules: dict[ir.Value, str] = {}
        for value in source.inputs:
            name = str(value.name)
            if ".lora_" in name:
                adapters.add(value)
            elif name.endswith("_proj.weight"):
                parameter = LAYER_PREFIX.format(layer) + slices[name].parameter
                (transpose,) = value.consumers()
                product = transpose.outputs[0]
                values[product] = self._initializer(f"{prefix}.{name}", self._matrix(parameter, slices[name]))
                modules[product] = parameter.removesuffix(".weight")
            elif name == "norm.weight":
                plain = self._frozen.plain(LAYER_PREFIX.format(layer) + slices[name].parameter)
                values[value] = self._initializer(f"{prefix}.{name}", plain)
            else:
                values[value] = {"hidden": self._hidden, "residual": residual, **self._tables}[name]
        for value in source.initializers.values():
            assert value.const_value is not None
            values[value] = self._initializer(f"{prefix}.{value.name}", value.const_value.numpy())
        for node in source:
            self._append_node(prefix, node, values, adapters, modules)
        return values[source.outputs[0]]

    def _append_node(
        self,
        prefix: str,
        node: ir.Node,
        values: dict[ir.Value, ir.Value],
        adapters: set[ir.Value],
        modules: Mapping[ir.Value, str],
    ) -> None:
        (result,) = node.outputs
        if result in values:  # the transposed weight
            return
        own = [value for value in node.inputs if value is not None and value not in adapters]
        if len(own) < len(node.inputs):
            if node.op_type == "Add":
                # product + adapter: the adapter is zero.
                values[result] = values[own[0]]
            else:
                adapters.add(result)
            return
        attributes = dict(node.attributes)
        inputs = [values[value] for value in own]
        if node.op_type in ("ReduceMax", "ReduceMean"):
            # Their axes are an attribute before opset 18.
            axes = ir.convenience.get_const_tensor(inputs.pop())
            assert axes is not None
            attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
        copy = ir.Node("", node.op_type, inputs, list(attributes.values()), name=f"{prefix}.{len(self._nodes)}")
        (out,) = copy.outputs
        out.name, out.shape, out.type = f"{prefix}.{result.name}", result.shape, result.type
        self._nodes.append(copy)
        values[result] = out
        if len(own) == 2 and own[1] in modules:
            self._inputs[out.name] = str(inputs[0].name)
            self._modules[out.name] = modules[own[1]]

    def _matrix(self, parameter: str, slice_: Slice) -> np.ndarray:
        """A float32 weight as a product takes it, (in, out)."""
        block = self._frozen.linear(parameter, slice_.rows, slice_.columns)
        return np.ascontiguousarray(self._backend.weight("", block, np.empty)[""].T)

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        value = ir.Value(
            name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape),
            const_value=ir.tensor(array, name=name),
        )  # fmt: skip
        self._initializers.append(value)
        return value

    def finished(self) -> TrunkGraph:
        self._hidden.name = "output"
        inputs = [self._input, *self._tables.values()]
        graph = ir.Graph(
            inputs, [self._hidden], nodes=self._nodes, initializers=self._initializers, name="trunk",
            opset_imports={"": OPSET},
        )  # fmt: skip
        model = ir.Model(graph, ir_version=IR_VERSION)
        rewrites.RemoveUnusedNodesPass()(model)
        used = {str(value.name) for node in model.graph for value in node.outputs}
        modules = {name: module for name, module in self._modules.items() if name in used}
        return TrunkGraph(model, {name: self._inputs[name] for name in modules}, modules)


def make_static(model: ir.Model, length: int) -> ir.Model:
    """A copy for one row of so many positions: every dimension is a number, in the targets of Reshape as well."""
    copy = ir.from_proto(ir.to_proto(model))
    sizes = {"batch": 1, "sequence": length}
    values = [*copy.graph.inputs, *(value for node in copy.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape])
    for node in copy.graph:
        if node.op_type == "Reshape" and node.outputs[0].shape is not None:
            target = np.array(node.outputs[0].shape.numpy(), dtype=np.int64)
            name = f"{node.outputs[0].name}.target"
            value = ir.Value(
                name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(target.shape),
                const_value=ir.tensor(target, name=name),
            )  # fmt: skip
            copy.graph.register_initializer(value)
            node.replace_input_with(1, value)
    rewrites.DeduplicateInitializersPass()(copy)
    rewrites.RemoveUnusedNodesPass()(copy)
    return copy


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)
