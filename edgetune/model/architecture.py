"""The sizes of a Phi-3 model: read from its `config.json`, and what follows from them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from edgetune.errors import VerificationError
from edgetune.formats.manifest import Architecture, Slot
from edgetune.model.rope import rope_from_config


def read_architecture(config: dict[str, Any]) -> Architecture:
    """Sizes from a Phi-3 `config.json`.

    Raises:
        VerificationError: A size is missing or not a positive number; all are named.
    """
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    optional = (
        "num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings",
        "sliding_window",
    )  # fmt: skip
    given = [*required, *(key for key in optional if config.get(key) is not None)]
    wrong = [f"{key} is {config.get(key)!r:.40}" for key in given if not _is_size(config.get(key))]
    if wrong:
        raise VerificationError(f"config.json: {', '.join(wrong)}; expected whole numbers from 1 to 2^31 − 1")
    heads = config["num_attention_heads"]
    return Architecture(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config.get("max_position_embeddings") or 4096,
        sliding_window=config.get("sliding_window"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope=rope_from_config(config),
    )


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


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31
