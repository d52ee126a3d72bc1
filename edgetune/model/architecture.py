"""The sizes of a Phi-3 model, and what follows from them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from edgetune.model.lora import Slot
from edgetune.model.rope import Rope


@dataclass(frozen=True)
class Architecture:
    """Sizes of the Phi-3 model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    sliding_window: int | None
    tie_word_embeddings: bool
    rope: Rope


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this architecture holds; a tied head has none of its own."""
    a = architecture
    queries = a.num_attention_heads * a.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (a.vocab_size, a.hidden_size)}
    for layer in range(a.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (a.hidden_size,)
        shapes[f"{prefix}.self_attn.qkv_proj.weight"] = (
            queries + 2 * a.num_key_value_heads * a.head_dim,
            a.hidden_size,
        )
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (a.hidden_size, queries)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (a.hidden_size,)
        shapes[f"{prefix}.mlp.gate_up_proj.weight"] = (2 * a.intermediate_size, a.hidden_size)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (a.hidden_size, a.intermediate_size)
    shapes["model.norm.weight"] = (a.hidden_size,)
    if not a.tie_word_embeddings:
        shapes["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    return shapes


def slots_of(architecture: Architecture, modules: Collection[str]) -> list[Slot]:
    """The projections with these names, such as `qkv_proj`, in all layers."""
    matrices = {name.removesuffix(".weight"): shape for name, shape in tensor_shapes(architecture).items()}
    return [Slot(name, shape[1], shape[0]) for name, shape in matrices.items() if name.split(".")[-1] in modules]


def frozen_weights(architecture: Architecture) -> dict[str, int]:
    """Number of weights in the projections of one decoder layer, by sublayer: `attention` and `mlp`."""
    a = architecture
    queries, keys = (heads * a.head_dim for heads in (a.num_attention_heads, a.num_key_value_heads))
    return {"attention": 2 * a.hidden_size * (queries + keys), "mlp": 3 * a.hidden_size * a.intermediate_size}
