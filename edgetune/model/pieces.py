"""How a sublayer is cut into pieces that are computed one after the other.

Attention is cut by heads, the feed-forward network by its inner channels, as tensor parallelism does (Megatron-LM,
Shoeybi et al. 2019): the first projection by rows, the second by columns, and the pieces' results add up. A piece needs
only its share of the weights and activations; a small model is one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from edgetune.model.architecture import Architecture, frozen_weights
from edgetune.model.blocks import BLOCK_SIZE, Range
from edgetune.model.lora import GAIN

MOST_WEIGHTS, MOST_WIDE_WEIGHTS = 10_000_000, 20_000_000
"""Frozen weights of a piece, about, and of a wide one. All of a sublayer's pieces repeat its norm, the rounding of rows
and the adapters' first product: wide ones are faster, and need more memory."""
LAYER_PREFIX = "model.layers.{}."


@dataclass(frozen=True)
class Slice:
    """The rows or columns of a layer's parameter (out, in) that a graph's input takes."""

    parameter: str
    """Name in the checkpoint; without `model.layers.N.` where it stands for every layer."""
    rows: Range | None = None
    """First row and the one after the last; all when none."""
    columns: Range | None = None

    def of_layer(self, number: int) -> Slice:
        """The same of one layer, with its whole name."""
        return replace(self, parameter=LAYER_PREFIX.format(number) + self.parameter)


@dataclass(frozen=True)
class Pieces:
    """Into how many pieces the sublayers are cut."""

    attention: int
    mlp: int


def cut(architecture: Architecture) -> Pieces:
    """As few pieces of equal size as hold no more than `MOST_WEIGHTS` each; a group of heads stays together."""
    a, weights = architecture, frozen_weights(architecture)
    blocks = a.intermediate_size // BLOCK_SIZE if a.intermediate_size % BLOCK_SIZE == 0 else 1
    return Pieces(
        _divisor(a.num_key_value_heads, weights["attention"] / MOST_WEIGHTS),
        _divisor(blocks, weights["mlp"] / MOST_WEIGHTS),
    )


def cut_wide(architecture: Architecture) -> Pieces:
    """The same with `MOST_WIDE_WEIGHTS`: each is several of the other pieces."""
    pieces, weights = cut(architecture), frozen_weights(architecture)
    return Pieces(
        _divisor(pieces.attention, weights["attention"] / MOST_WIDE_WEIGHTS),
        _divisor(pieces.mlp, weights["mlp"] / MOST_WIDE_WEIGHTS),
    )


def _divisor(count: int, least: float) -> int:
    return next((n for n in range(1, count + 1) if n >= least and count % n == 0), count)


def attention_slices(architecture: Architecture, pieces: int) -> Iterator[dict[str, Slice]]:
    """What the inputs of the attention graphs take, piece by piece."""
    a = architecture
    queries, keys = (heads * a.head_dim // pieces for heads in (a.num_attention_heads, a.num_key_value_heads))
    for piece in range(pieces):
        starts = {
            "q": (piece * queries, queries),
            "k": (pieces * queries + piece * keys, keys),
            "v": (pieces * (queries + keys) + piece * keys, keys),
        }
        slices = {"qkv_proj.lora_A.weight": Slice("self_attn.qkv_proj.lora_A.weight")}
        for name, (start, size) in starts.items():
            rows = (start, start + size)
            slices[f"{name}_proj.weight"] = Slice("self_attn.qkv_proj.weight", rows)
            slices[f"{name}_proj.lora_B.weight"] = Slice("self_attn.qkv_proj.lora_B.weight", rows)
            slices[f"{name}_proj{GAIN}"] = Slice(f"self_attn.qkv_proj{GAIN}", rows)
        columns = (piece * queries, (piece + 1) * queries)
        yield slices | _second("self_attn.o_proj", columns) | {"norm.weight": Slice("input_layernorm.weight")}


def mlp_slices(architecture: Architecture, pieces: int) -> Iterator[dict[str, Slice]]:
    """What the inputs of the feed-forward graphs take, piece by piece."""
    inner = architecture.intermediate_size
    size = inner // pieces
    for piece in range(pieces):
        slices = {"gate_up_proj.lora_A.weight": Slice("mlp.gate_up_proj.lora_A.weight")}
        for name, start in (("gate", piece * size), ("up", inner + piece * size)):
            rows = (start, start + size)
            slices[f"{name}_proj.weight"] = Slice("mlp.gate_up_proj.weight", rows)
            slices[f"{name}_proj.lora_B.weight"] = Slice("mlp.gate_up_proj.lora_B.weight", rows)
            slices[f"{name}_proj{GAIN}"] = Slice(f"mlp.gate_up_proj{GAIN}", rows)
        columns = (piece * size, (piece + 1) * size)
        yield slices | _second("mlp.down_proj", columns) | {"norm.weight": Slice("post_attention_layernorm.weight")}


def _second(module: str, columns: Range) -> dict[str, Slice]:
    name = module.partition(".")[2]
    return {
        f"{name}.weight": Slice(f"{module}.weight", columns=columns),
        f"{name}.lora_A.weight": Slice(f"{module}.lora_A.weight", columns=columns),
        f"{name}.lora_B.weight": Slice(f"{module}.lora_B.weight"),
        f"{name}{GAIN}": Slice(f"{module}{GAIN}"),
    }
