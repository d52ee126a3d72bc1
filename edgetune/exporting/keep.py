"""The adapter beside the base: the graph takes A and B as inputs, and an `.onnx_adapter` holds their values.

Every slot gets `x·A·B` added to what its `MatMul` or `MatMulNBits` gives. A (in_features, rank) and B
(rank, out_features) are inputs with zeros as default, so that the base answers as before without an adapter;
the rank is symbolic, so that adapters of any rank fit. The inputs are named as in `Lora.shapes`. With DoRA the sum is
multiplied with a gain (out_features,), an input with ones as default.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgetune.exporting.projections import Product, products_of
from edgetune.model.lora import Lora, Parameters

if TYPE_CHECKING:
    import onnx

RANK = "lora_rank"
"""Name of the symbolic dimension; a projection with a rank of its own has one of its own, with its name behind it."""


def add_lora_inputs(model: onnx.ModelProto, lora: Lora) -> None:
    """Give a GenAI model inputs for the LoRA parameters.

    Args:
        model: The graph; its weights may stay outside.
        lora: The slots.

    Raises:
        IncompatibleError: A slot has no node in the graph.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    first: dict[str, list[onnx.NodeProto]] = {}
    after: dict[str, list[onnx.NodeProto]] = {}
    for products in products_of(graph, lora):
        slot = products[0].slot
        # One name means one size to ONNX Runtime.
        rank = f"{RANK}_{slot.module}" if slot.module in lora.rank_pattern else RANK
        shapes: list[tuple[str, list[str | int | None], tuple[int, int]]] = [
            (slot.a, [slot.in_features, rank], (slot.in_features, 1)),
            (slot.b, [rank, slot.out_features], (1, slot.out_features)),
        ]
        defaults: dict[str, NDArray[np.float32]] = {name: np.zeros(size, np.float32) for name, _, size in shapes}
        if lora.dora:
            shapes.append((slot.gain, [slot.out_features], (slot.out_features, 1)))
            defaults[slot.gain] = np.ones(slot.out_features, np.float32)
        for name, shape, _ in shapes:
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
            graph.initializer.append(numpy_helper.from_array(defaults[name], name))
        updates = [f"{slot.name}.lora.{index}" for index in range(len(products))]
        first[products[0].node.name] = _update_nodes(products, updates)
        for product, update in zip(products, updates, strict=True):
            total, frozen = product.node.output[0], f"{product.node.output[0]}.base"
            product.node.output[0] = frozen
            adapted = f"{total}.adapted" if lora.dora else total
            after[product.node.name] = [helper.make_node("Add", [frozen, update], [adapted], name=f"{update}.Add")]
            if lora.dora:
                gain = f"{update}.gain" if len(products) > 1 else slot.gain
                after[product.node.name].append(
                    helper.make_node("Mul", [adapted, gain], [total], name=f"{update}.Mul")
                )
        if lora.dora and len(products) > 1:
            gains, name = [f"{update}.gain" for update in updates], f"{slot.name}.gain.Split"
            first[products[0].node.name].append(
                helper.make_node("Split", [slot.gain], gains, name=name, axis=0, num_outputs=len(gains))
            )
    nodes = []
    for node in graph.node:
        nodes += [*first.get(node.name, []), node, *after.get(node.name, [])]
    nodes = [_copied(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = type(node)()
    copy.CopyFrom(node)
    return copy


def _update_nodes(products: list[Product], updates: list[str]) -> list[onnx.NodeProto]:
    """x·A·B, split where the builder split the projection."""
    from onnx import helper

    slot, x = products[0].slot, products[0].node.input[0]
    low, whole = f"{slot.name}.lora.A", f"{slot.name}.lora.B" if len(products) > 1 else updates[0]
    nodes = [
        helper.make_node("MatMul", [x, slot.a], [low], name=f"{slot.name}.lora_A.MatMul"),
        helper.make_node("MatMul", [low, slot.b], [whole], name=f"{slot.name}.lora_B.MatMul"),
    ]
    if len(products) > 1:
        name = f"{slot.name}.lora.Split"
        nodes.append(helper.make_node("Split", [whole], updates, name=name, axis=-1, num_outputs=len(products)))
    return nodes


def graph_values(
    lora: Lora, parameters: Parameters, gains: Parameters = MappingProxyType({})
) -> dict[str, NDArray[np.float32]]:
    """The parameters as the graph takes them.

    Args:
        lora: The slots; the scaling is folded into B.
        parameters: A (rank, in_features) and B (out_features, rank), as `Lora.shapes` names them.
        gains: Of every slot (out_features,), as `Slot.gain` names them, where slots have magnitudes.

    Returns:
        Under the same names A (in_features, rank) and B (rank, out_features), and the gains.
    """
    values: dict[str, NDArray[np.float32]] = dict(gains)
    for slot in lora.slots:
        values[slot.a] = np.ascontiguousarray(parameters[slot.a].T)
        values[slot.b] = np.ascontiguousarray(parameters[slot.b].T) * np.float32(lora.scaling_of(slot.module))
    return values


def write_onnx_adapter(path: Path, values: Parameters) -> None:
    """Write the `.onnx_adapter` that GenAI's `Adapters` and onnxruntime's `LoraAdapter` load, of `graph_values`."""
    import onnxruntime as ort

    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    adapter.export_adapter(str(path))
