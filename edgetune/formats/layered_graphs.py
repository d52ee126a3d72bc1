"""How a sublayer is cut into pieces that are computed one after the other.

Attention is cut by heads, the feed-forward network by its inner channels, as tensor parallelism does (Megatron-LM,
Shoeybi et al. 2019): the first projection by rows, the second by columns, and the pieces' results add up. A piece needs
only its part of the weights and activations; a small model is one piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from edgetune.errors import VerificationError
from edgetune.formats.frozen_weights import BLOCK_SIZE, LAYERS, Range
from edgetune.formats.manifest import Architecture, BundleManifest, TensorSpec
from edgetune.model.architecture import frozen_weights

MOST_WEIGHTS, MOST_WIDE_WEIGHTS = 10_000_000, 20_000_000
"""Frozen weights of a piece, about, and of a wide one. All of a sublayer's pieces repeat its norm, the rounding of rows
and the adapters' first product: wide ones are faster, and need more memory."""
WIDE = "wide"
"""Folder of the graphs for wide pieces, beside those for the others."""
LAYER_PREFIX = "model.layers.{}."


@dataclass(frozen=True)
class Part:
    """What a graph's input is of a layer's parameter (out, in)."""

    parameter: str
    """Name in the checkpoint without `model.layers.N.`."""
    rows: Range | None = None
    """First row and the one after the last; all when none."""
    columns: Range | None = None


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


def sublayer_role(folder: str, name: str, *, wide: bool) -> str:
    """The graph of a sublayer, or of its wide pieces, among those of a folder: `layers`, or `layers/int8`."""
    return f"{folder}/{WIDE}/{name}" if wide else f"{folder}/{name}"


def widths(manifest: BundleManifest) -> tuple[bool, ...]:
    """Which pieces a bundle has graphs for: wide ones where those differ from the others."""
    wide = any(graph.role.startswith(f"{LAYERS}/{WIDE}/") for graph in manifest.graphs)
    return (False, True) if wide else (False,)


def pieces_of(manifest: BundleManifest, *, wide: bool = False) -> Pieces:
    """How the graphs of a bundle were cut.

    Raises:
        VerificationError: The manifest does not say, or says what cannot be.
    """
    a = manifest.architecture
    attention, mlp = (sublayer_role(LAYERS, name, wide=wide) for name in ("attention", "mlp"))
    found = Pieces(
        _count(manifest, attention, "q_proj.weight", a.num_attention_heads * a.head_dim, a.num_key_value_heads),
        _count(manifest, mlp, "gate_proj.weight", a.intermediate_size, a.intermediate_size),
    )
    others = pieces_of(manifest) if wide else found
    if others.attention % found.attention or others.mlp % found.mlp:
        raise VerificationError(
            f"the bundle's manifest: {found.attention} and {found.mlp} wide pieces, expected each to be several of the "
            f"{others.attention} and {others.mlp} others; make the bundle anew"
        )
    return found


def _count(manifest: BundleManifest, role: str, name: str, rows: int, units: int) -> int:
    """Into how many pieces a weight's rows were cut, each of which has as many of the units that stay together."""
    shapes = [spec.shape for spec in manifest.graph(role).inputs if spec.name == name]
    size = shapes[0][0] if len(shapes) == 1 and shapes[0] else None
    if not isinstance(size, int) or size < 1 or rows % size or units % (rows // size):
        raise VerificationError(
            f"the bundle's manifest: {role} takes {name} of shape {shapes!s:.60}, expected one matrix with "
            f"an equal part of the {rows} rows; make the bundle anew"
        )
    return rows // size


def kept_outputs(manifest: BundleManifest, role: str) -> list[TensorSpec]:
    """What a sublayer's graph gives beside its output, for the backward pass.

    Raises:
        VerificationError: The manifest does not say, or says what cannot be.
    """
    kept = [spec for spec in manifest.graph(role).outputs if spec.name != "output"]
    a = manifest.architecture
    widest = max(a.num_attention_heads * a.head_dim, a.intermediate_size)
    for spec in kept:
        sizes = [size for size in spec.shape if isinstance(size, int)]
        names = [size for size in spec.shape if not isinstance(size, int)]
        if names != ["batch", "sequence"] or not 1 <= math.prod(sizes) <= widest:
            raise VerificationError(
                f"the bundle's manifest: {role} gives {spec.name:.40} of shape {spec.shape!s:.60}, expected batch, "
                f"sequence and at most {widest} channels; make the bundle anew"
            )
    return kept


def _divisor(count: int, least: float) -> int:
    return next((n for n in range(1, count + 1) if n >= least and count % n == 0), count)


def attention_parts(architecture: Architecture, pieces: int) -> Iterator[dict[str, Part]]:
    """The inputs of the attention graphs, piece by piece."""
    a = architecture
    queries, keys = (heads * a.head_dim // pieces for heads in (a.num_attention_heads, a.num_key_value_heads))
    for piece in range(pieces):
        starts = {
            "q": (piece * queries, queries),
            "k": (pieces * queries + piece * keys, keys),
            "v": (pieces * (queries + keys) + piece * keys, keys),
        }
        parts = {"qkv_proj.lora_A.weight": Part("self_attn.qkv_proj.lora_A.weight")}
        for name, (start, size) in starts.items():
            rows = (start, start + size)
            parts[f"{name}_proj.weight"] = Part("self_attn.qkv_proj.weight", rows)
            parts[f"{name}_proj.lora_B.weight"] = Part("self_attn.qkv_proj.lora_B.weight", rows)
        columns = (piece * queries, (piece + 1) * queries)
        yield parts | _second("self_attn.o_proj", columns) | {"norm.weight": Part("input_layernorm.weight")}


def mlp_parts(architecture: Architecture, pieces: int) -> Iterator[dict[str, Part]]:
    """The inputs of the feed-forward graphs, piece by piece."""
    inner = architecture.intermediate_size
    size = inner // pieces
    for piece in range(pieces):
        parts = {"gate_up_proj.lora_A.weight": Part("mlp.gate_up_proj.lora_A.weight")}
        for name, start in (("gate", piece * size), ("up", inner + piece * size)):
            rows = (start, start + size)
            parts[f"{name}_proj.weight"] = Part("mlp.gate_up_proj.weight", rows)
            parts[f"{name}_proj.lora_B.weight"] = Part("mlp.gate_up_proj.lora_B.weight", rows)
        columns = (piece * size, (piece + 1) * size)
        yield parts | _second("mlp.down_proj", columns) | {"norm.weight": Part("post_attention_layernorm.weight")}


def _second(module: str, columns: Range) -> dict[str, Part]:
    name = module.partition(".")[2]
    return {
        f"{name}.weight": Part(f"{module}.weight", columns=columns),
        f"{name}.lora_A.weight": Part(f"{module}.lora_A.weight", columns=columns),
        f"{name}.lora_B.weight": Part(f"{module}.lora_B.weight"),
    }
