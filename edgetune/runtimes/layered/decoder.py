"""Phi-3's decoder layers in numpy, for one row, with the products of the frozen projections done by others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from edgetune.bundle import Bundle
from edgetune.data.batches import MASKED
from edgetune.frozen import FrozenWeights
from edgetune.pieces import LAYER_PREFIX

Floats = NDArray[np.float32]
Product = Callable[[Floats], Floats]
"""(positions, in) → (positions, out) of a frozen projection."""
_DEFAULT_EPSILON = 1e-5
"""`rms_norm_eps` of transformers' Phi3Config."""


class DecoderLayers:
    """The lowest layers of a model; see `edgetune.runtimes.layered.trunk.TrunkLayers`.

    Args:
        bundle: Holds the norms.
        layers: How many.
        products: Of every projection in them, by its name in the checkpoint.
    """

    def __init__(self, bundle: Bundle, layers: int, products: Mapping[str, Product]) -> None:
        self._architecture = bundle.manifest.architecture
        self._frozen = FrozenWeights(bundle.path)
        self._layers, self._products = layers, products
        config = json.loads((bundle.path / "config.json").read_bytes())
        self._epsilon = np.float32(config.get("rms_norm_eps") or _DEFAULT_EPSILON)

    def forward(self, hidden: Floats, rope_cos: Floats, rope_sin: Floats) -> Floats:
        """See `TrunkLayers.forward`."""
        for layer in range(self._layers):
            prefix = LAYER_PREFIX.format(layer)
            normal = self._norm(hidden, f"{prefix}input_layernorm.weight")
            joined = self._products[f"{prefix}self_attn.qkv_proj"](normal)
            context = self._attention(joined, rope_cos, rope_sin)
            hidden = hidden + self._products[f"{prefix}self_attn.o_proj"](context)
            normal = self._norm(hidden, f"{prefix}post_attention_layernorm.weight")
            gate, up = np.split(self._products[f"{prefix}mlp.gate_up_proj"](normal), 2, axis=1)
            inner = gate / (1 + np.exp(-gate)) * up
            hidden = hidden + self._products[f"{prefix}mlp.down_proj"](inner)
        return hidden

    def _norm(self, hidden: Floats, weight: str) -> Floats:
        """RMSNorm (Zhang and Sennrich 2019)."""
        mean = np.mean(hidden * hidden, axis=-1, keepdims=True)
        normal: Floats = self._frozen.plain(weight) * (hidden / np.sqrt(mean + self._epsilon))
        return normal

    def _attention(self, joined: Floats, cos: Floats, sin: Floats) -> Floats:
        """(positions, query channels) from query, key and value side by side."""
        a, count = self._architecture, len(joined)
        queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        query, key, value = (
            part.reshape(count, -1, a.head_dim).swapaxes(0, 1)
            for part in np.split(joined, (queries, queries + keys), axis=1)
        )
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        groups = a.num_attention_heads // a.num_key_value_heads
        key, value = np.repeat(key, groups, axis=0), np.repeat(value, groups, axis=0)
        place = np.arange(count)
        visible = place <= place[:, None]
        if a.sliding_window is not None:
            visible &= place > place[:, None] - a.sliding_window
        scores = query @ key.swapaxes(1, 2) * np.float32(a.head_dim**-0.5) + np.where(visible, np.float32(0), MASKED)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        context: Floats = (weights @ value).swapaxes(0, 1).reshape(count, queries)
        return context


def _rotated(heads: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotary embedding (Su et al. 2021) of the first dimensions of each head, as many as the tables have."""
    width = cos.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    low, high = np.split(turned, 2, axis=-1)
    return np.concatenate([turned * cos + np.concatenate([-high, low], axis=-1) * sin, rest], axis=-1)
