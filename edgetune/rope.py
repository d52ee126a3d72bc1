"""Rotary position embedding: the cos and sin tables that the training graphs take as inputs.

The graphs leave the choice between longrope's short and long factors to this module, which decides by the longest row
of a batch, as transformers' `modeling_rope_utils` does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import IncompatibleError
from edgetune.manifest import Rope

LONGROPE = ("longrope", "su")
"""What configs call longrope; `su` is the older name."""
_LARGEST = 1e30
"""Far above any number that means something, far below what overflows when such numbers are multiplied."""


def rope_tables(
    rope: Rope, positions: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cos and sin of every position.

    Args:
        rope: The model's rotary embedding.
        positions: (B, T), counted from 0.
        lengths: (B,) tokens of each row; longrope's long factors serve a batch whose longest row has more than
            `rope.original_max_position_embeddings`.

    Returns:
        cos and sin, each (B, T, rope.dim).
    """
    is_long = lengths.max() > rope.original_max_position_embeddings
    frequencies = _inverse_frequencies(rope, rope.long_factor if is_long else rope.short_factor)
    angles = positions.astype(np.float32)[:, :, None] * frequencies
    angles = np.concatenate([angles, angles], axis=-1)
    scale = np.float32(rope.attention_factor)
    return np.cos(angles) * scale, np.sin(angles) * scale


def _inverse_frequencies(rope: Rope, factors: list[float] | None) -> NDArray[np.float32]:
    # In float32 like transformers', but for the power: torch's is exact to the last bit, numpy's float32 one is not.
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    powers = np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    scales = np.float32(1) if factors is None else np.asarray(factors, dtype=np.float32)
    return (np.float32(1) / (scales * powers)).astype(np.float32)


def rope_from_config(config: dict[str, Any]) -> Rope:
    """The rotary embedding that a Hugging Face `config.json` of a Phi-3 model describes.

    Args:
        config: The parsed file; absent keys have `Phi3Config`'s defaults.

    Raises:
        IncompatibleError: Another kind of rotary embedding, or values that do not fit together.
    """
    if "rope_parameters" in config:
        raise IncompatibleError(
            "config.json has rope_parameters, which transformers 5 writes; save the model with transformers 4.57"
        )
    heads = _number(config, "num_attention_heads", 32)
    head_dim = _number(config, "head_dim", _number(config, "hidden_size", 3072) // heads)
    dim = int(head_dim * _number(config, "partial_rotary_factor", 1.0))
    theta = float(_number(config, "rope_theta", 10000.0))
    original = int(_number(config, "original_max_position_embeddings", 4096))
    if dim < 2 or dim % 2 or dim > head_dim:
        raise IncompatibleError(
            f"config.json rotates {dim} of {head_dim:g} dimensions of a head; expected an even part"
        )
    scaling = config.get("rope_scaling")
    if scaling is None:
        return Rope(dim, theta, 1.0, None, None, original)
    if not isinstance(scaling, dict):
        raise IncompatibleError(f"config.json: rope_scaling must be an object or null, found {scaling!r:.60}")
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in LONGROPE:
        raise IncompatibleError(
            f"config.json: rope_scaling is of type {kind!r:.40}; Phi-3 models have none or longrope"
        )
    unknown = sorted(set(scaling) - {"rope_type", "type", "short_factor", "long_factor", "attention_factor", "factor"})
    if unknown:
        raise IncompatibleError(f"config.json: rope_scaling has {unknown[0]!r:.40}, which is not supported")
    short, long = (_factors(scaling, key, dim // 2) for key in ("short_factor", "long_factor"))
    # Phi-3 states the stretch by the two lengths; transformers ignores `factor` here, too.
    stretch = _number(config, "max_position_embeddings", 4096) / original
    default = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return Rope(dim, theta, float(_number(scaling, "attention_factor", default)), short, long, original)


def _number(values: dict[str, Any], key: str, default: float) -> float:
    value = values.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
        raise IncompatibleError(f"config.json: {key} must be a number above 0, found {value!r:.40}")
    return value


def _factors(scaling: dict[str, Any], key: str, count: int) -> list[float]:
    values = scaling.get(key)
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)}" if isinstance(values, list) else f"{values!r:.40}"
        raise IncompatibleError(f"config.json: rope_scaling.{key} must be a list of {count} numbers, found {found}")
    return [float(_number({key: value}, key, 0.0)) for value in values]
