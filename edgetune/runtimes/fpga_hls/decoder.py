"""Phi-3's decoder layers in numpy, with the products of the frozen projections done by others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.data.batches import MASKED, causal_mask
from edgetune.errors import VerificationError
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import FrozenWeights
from edgetune.formats.json_file import read_object
from edgetune.model.lora import Lora
from edgetune.model.pieces import LAYER_PREFIX
from edgetune.runtimes.layered.backend import Arrays
from edgetune.runtimes.layered.lower_layers import SublayerForward
from edgetune.runtimes.layered.parameters import FlatParameters
from edgetune.runtimes.placement import Placement

Floats = NDArray[np.float32]
Product = Callable[[Floats], Floats]
"""(count, in) → (count, out) of a frozen projection."""
Update = Callable[[str, Floats], Floats | float]
"""What the adapter of a projection, called as in the checkpoint, adds to (count, in) → (count, out)."""
_DEFAULT_EPSILON = 1e-5
"""`rms_norm_eps` of transformers' Phi3Config."""


def no_update(_: str, __: Floats) -> float:
    """Where there is no adapter."""
    return 0.0


class DecoderLayers:
    """The lowest layers of a model, forward only; see `edgetune.runtimes.layered.lower_layers.TrunkLayers`.

    Args:
        bundle: Holds the norms.
        layers: How many.
        products: Of every projection in them, by its name in the checkpoint.
        placement: Where the products are computed.

    Raises:
        VerificationError: The bundle's index of weights, or its `config.json`, cannot be what it should be.
    """

    def __init__(
        self, bundle: Bundle, layers: int, products: Mapping[str, Product], placement: Placement | None = None
    ) -> None:
        self.layers, self.placement = layers, placement
        self._architecture, self._lora = bundle.manifest.architecture, bundle.manifest.lora
        self._frozen = FrozenWeights(bundle.path, self._architecture)
        self._products = products
        self._epsilon = _epsilon(bundle.path / "config.json")

    def with_adapters(self, parameters: FlatParameters) -> AdaptedLayers:
        """The same layers with adapters beside their products."""
        return AdaptedLayers(self, parameters, self._lora)

    def forward(self, hidden: Floats, rope_cos: Floats, rope_sin: Floats) -> Floats:
        """See `TrunkLayers.forward`."""
        visible = causal_mask(len(hidden), self._architecture.sliding_window)
        bias = np.where(visible, np.float32(0), MASKED)[None, None]
        states = hidden[None]
        for layer in range(self.layers):
            states = self.attention(layer, states, bias, rope_cos[None], rope_sin[None], no_update)
            states = self.mlp(layer, states, no_update)
        row: Floats = states[0]
        return row

    def attention(
        self, layer: int, hidden: Floats, attn_bias: Floats, rope_cos: Floats, rope_sin: Floats, update: Update
    ) -> Floats:
        """Hidden states after the first sublayer, of the shape of those before it.

        Args:
            layer: Its number.
            hidden: (batch, sequence, hidden_size).
            attn_bias: (batch, 1, sequence, sequence), added to the scores.
            rope_cos: (batch, sequence, rotated).
            rope_sin: The same.
            update: The adapters.
        """
        prefix, a = LAYER_PREFIX.format(layer), self._architecture
        joined = self._project(
            f"{prefix}self_attn.qkv_proj", self._norm(hidden, f"{prefix}input_layernorm.weight"), update
        )
        queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        query, key, value = (
            part.reshape(*part.shape[:2], -1, a.head_dim).swapaxes(1, 2)
            for part in np.split(joined, (queries, queries + keys), axis=-1)
        )
        cos, sin = rope_cos[:, None], rope_sin[:, None]
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        groups = a.num_attention_heads // a.num_key_value_heads
        key, value = np.repeat(key, groups, axis=1), np.repeat(value, groups, axis=1)
        scores = query @ key.swapaxes(2, 3) * np.float32(a.head_dim**-0.5) + attn_bias
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        context = (weights @ value).swapaxes(1, 2).reshape(*hidden.shape[:2], queries)
        return hidden + self._project(f"{prefix}self_attn.o_proj", context, update)

    def mlp(self, layer: int, hidden: Floats, update: Update) -> Floats:
        """Hidden states after the other sublayer; arguments as those of `attention`."""
        prefix = LAYER_PREFIX.format(layer)
        normal = self._norm(hidden, f"{prefix}post_attention_layernorm.weight")
        gate, up = np.split(self._project(f"{prefix}mlp.gate_up_proj", normal, update), 2, axis=-1)
        inner = gate / (1 + np.exp(-gate)) * up
        return hidden + self._project(f"{prefix}mlp.down_proj", inner, update)

    def _project(self, name: str, states: Floats, update: Update) -> Floats:
        flat = states.reshape(-1, states.shape[-1])
        return (self._products[name](flat) + update(name, flat)).reshape(*states.shape[:-1], -1)

    def _norm(self, hidden: Floats, weight: str) -> Floats:
        """RMSNorm (Zhang and Sennrich 2019)."""
        mean = np.mean(hidden * hidden, axis=-1, keepdims=True)
        normal: Floats = self._frozen.plain(weight) * (hidden / np.sqrt(mean + self._epsilon))
        return normal


class AdaptedLayers:
    """The lowest layers of a session, forward, each sublayer by itself; see `LowestLayers`.

    Args:
        decoder: Computes them.
        parameters: LoRA parameters, as they are when a sublayer runs.
        lora: What each slot is scaled with.
    """

    def __init__(self, decoder: DecoderLayers, parameters: FlatParameters, lora: Lora) -> None:
        self.layers, self.placement = decoder.layers, decoder.placement
        self._parameters, self._lora = parameters, lora
        self.sublayers: tuple[SublayerForward, SublayerForward] = (
            _Sublayer(lambda layer, tables, hidden: decoder.attention(layer, hidden, **tables, update=self._update)),
            _Sublayer(lambda layer, _, hidden: decoder.mlp(layer, hidden, self._update)),
        )

    def _update(self, module: str, states: Floats) -> Floats | float:
        """What a projection's adapter adds (Hu et al. 2021)."""
        a, b = (f"{module}.lora_{matrix}.weight" for matrix in "AB")
        if a not in self._parameters:
            return 0.0
        scaling = np.float32(self._lora.scaling_of(module.rpartition(".")[2]))
        small: Floats = states @ self._parameters.parameter(a).T * scaling
        added: Floats = small @ self._parameters.parameter(b).T
        return added


@dataclass(frozen=True)
class _Sublayer:
    compute: Callable[[int, Arrays, Floats], Floats]
    """Layer, tables and hidden states → hidden states after the sublayer."""

    def forward(
        self, layer: int, tables: Arrays, hidden: NDArray[Any], output: NDArray[Any], kept_under: str | None
    ) -> None:
        """See `SublayerForward`; nothing is kept."""
        output[...] = self.compute(layer, tables, hidden)


def _epsilon(path: Path) -> np.float32:
    """What the norms add to a mean."""
    found = read_object(path, "prepare the bundle again").get("rms_norm_eps") or _DEFAULT_EPSILON
    if not isinstance(found, int | float) or not 0 < found <= 1:
        raise VerificationError(f"{path}: rms_norm_eps is {found!r:.40}, expected a number from 0 to 1")
    return np.float32(found)


def _rotated(heads: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotary embedding (Su et al. 2021) of the first dimensions of each head, as many as the tables have."""
    width = cos.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    low, high = np.split(turned, 2, axis=-1)
    return np.concatenate([turned * cos + np.concatenate([-high, low], axis=-1) * sin, rest], axis=-1)
