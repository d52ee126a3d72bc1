"""Where the LoRA slots are in the GenAI graph, whose builder splits gate_up_proj and names things its own way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetune.errors import IncompatibleError
from edgetune.formats.genai import weight_name
from edgetune.model.lora import Lora, Slot

if TYPE_CHECKING:
    import onnx

_BUILDER_NAMES: dict[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("attn.qkv_proj",),
    "self_attn.o_proj": ("attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""The builder's projections for each of the checkpoint's, from the first output row to the last."""


@dataclass(frozen=True)
class Product:
    """One of the `MatMul` or `MatMulNBits` that compute a slot's projection: it takes these rows of B, and all of A."""

    slot: Slot
    node: onnx.NodeProto
    start: int
    """First row of B."""
    stop: int


def products_of(graph: onnx.GraphProto, lora: Lora) -> Iterator[list[Product]]:
    """The products that compute every slot's projection.

    Args:
        graph: The graph of a GenAI model.
        lora: The slots.

    Raises:
        IncompatibleError: A slot has no node in the graph.
    """
    nodes = {weight_name(node.input[1]): node for node in graph.node if node.op_type in ("MatMul", "MatMulNBits")}
    for slot in lora.slots:
        layer, _, projection = slot.name.removeprefix("model.layers.").partition(".")
        names = _BUILDER_NAMES.get(projection, ())
        weights = [f"model.layers.{layer}.{name}.MatMul.weight" for name in names]
        found = [nodes.get(weight) for weight in weights]
        if not found or slot.out_features % len(found):
            raise IncompatibleError(f"{slot.name}: not a projection of Phi-3; prepare the bundle anew")
        rows = slot.out_features // len(found)
        products = []
        for index, node in enumerate(found):
            if node is None:
                raise IncompatibleError(f"{slot.name}: no {weights[index]} in the GenAI model; prepare the bundle anew")
            products.append(Product(slot, node, index * rows, (index + 1) * rows))
        yield products
