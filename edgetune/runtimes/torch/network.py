"""Phi-3 in PyTorch, over a bundle's frozen weights: as the device has them, dequantised.

The network takes the same batches as the graphs of the bundle: attention bias and rotary tables come with them, so
that packed rows, shared prefixes, sliding windows and longrope are computed as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from edgetune.data.encode import IGNORED
from edgetune.formats.bundle import Bundle
from edgetune.formats.frozen_weights import EMBEDDING, HEAD, FrozenWeights
from edgetune.formats.json_file import read_object
from edgetune.formats.row_norms import read_row_norms
from edgetune.model.architecture import Architecture
from edgetune.model.gains import SMALLEST_SQUARE
from edgetune.model.lora import Lora, Parameters, RowNorms, Slot

CONFIG = "config.json"
"""The checkpoint's, in the bundle: has the norms' epsilon."""
_COPY_AGAIN = "copy the bundle again"
Place = Callable[[nn.Module], nn.Module]
"""Puts a module where it is to be: on its device, or divided between processes."""


@dataclass(frozen=True)
class Source:
    """What a network is made of."""

    bundle: Bundle
    parameters: Parameters
    """Of the adapter, by the names of `Lora.shapes`."""
    device: torch.device
    dtype: torch.dtype
    """Of frozen weights and products; norms, the softmax of the loss and the adapter are float32."""

    def frozen(self, weights: FrozenWeights, name: str) -> nn.Parameter:
        """A frozen weight (out, in), or the gains of a norm (size,)."""
        norm = len(weights.shape(name)) == 1
        values = torch.from_numpy(weights.plain(name).copy() if norm else weights.whole(name))
        return nn.Parameter(values.to(self.device, torch.float32 if norm else self.dtype), requires_grad=False)

    def trained(self, name: str) -> nn.Parameter:
        """A parameter of the adapter."""
        return nn.Parameter(torch.from_numpy(self.parameters[name].copy()).to(self.device))


class Network(nn.Module):
    """The summed loss of a batch; `adapter` are its trained parameters.

    Args:
        source: What it is made of.
        place: Called with each layer as soon as it is made, so that no more than one lies whole in a process that has
            only its share of the others.
    """

    def __init__(self, source: Source, place: Place) -> None:
        super().__init__()
        manifest = source.bundle.manifest
        weights = FrozenWeights(source.bundle.path, manifest.architecture)
        epsilon = _epsilon(source.bundle)
        norms = read_row_norms(source.bundle)
        self.embedding = source.frozen(weights, EMBEDDING)
        self.layers = nn.ModuleList()
        for index in range(manifest.architecture.num_hidden_layers):
            self.layers.append(place(Layer(source, weights, norms, epsilon, index)))
            weights.forget()
        self.norm = RmsNorm(source.frozen(weights, "model.norm.weight"), epsilon)
        self.head = source.frozen(weights, HEAD)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Σ of the cross-entropies of the trained tokens, a number.

        Args:
            batch: What `Batch.tensors` has. Layers are computed again in the backward pass, so that what they keep is
                their input alone.
        """
        hidden = functional.embedding(batch["input_ids"], self.embedding)
        tables = batch["rope_cos"][:, None].to(hidden.dtype), batch["rope_sin"][:, None].to(hidden.dtype)
        bias = batch["attn_bias"].to(hidden.dtype)
        for layer in self.layers:
            if torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, bias, *tables, use_reentrant=False)
            else:
                hidden = layer(hidden, bias, *tables)
        trained = batch["labels"] != IGNORED
        logits = functional.linear(self.norm(hidden[trained]), self.head)
        return functional.cross_entropy(logits.float(), batch["labels"][trained], reduction="sum")

    def adapter(self) -> dict[str, nn.Parameter]:
        """The trained parameters by the names of `Lora.shapes`."""
        return {
            name: value
            for part in self.modules()
            if isinstance(part, Projection)
            for name, value in part.named().items()
        }


class Layer(nn.Module):
    """A decoder layer."""

    def __init__(self, source: Source, weights: FrozenWeights, norms: RowNorms, epsilon: float, index: int) -> None:
        super().__init__()
        lora, prefix = source.bundle.manifest.lora, f"model.layers.{index}"
        slots = {slot.name: slot for slot in lora.slots}

        def projection(name: str) -> Projection:
            full = f"{prefix}.{name}"
            return Projection(source, weights, lora, full, slots.get(full), norms)

        def norm(name: str) -> RmsNorm:
            return RmsNorm(source.frozen(weights, f"{prefix}.{name}.weight"), epsilon)

        self._sizes = source.bundle.manifest.architecture
        self.input_norm, self.output_norm = norm("input_layernorm"), norm("post_attention_layernorm")
        self.qkv, self.o = projection("self_attn.qkv_proj"), projection("self_attn.o_proj")
        self.gate_up, self.down = projection("mlp.gate_up_proj"), projection("mlp.down_proj")

    def forward(self, hidden: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, hidden) to the same; the bias is (B, 1, T, T), the tables (B, 1, T, rotated)."""
        hidden = hidden + self._attention(self.input_norm(hidden), bias, cos, sin)
        gate, up = self.gate_up(self.output_norm(hidden)).chunk(2, dim=-1)
        output: Tensor = hidden + self.down(up * functional.silu(gate))
        return output

    def _attention(self, hidden: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        sizes = self._sizes
        query, key, value = _heads(self.qkv(hidden), sizes)
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        grouped = sizes.num_attention_heads != sizes.num_key_value_heads
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=grouped)
        output: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return output


class RmsNorm(nn.Module):
    """Root mean square normalisation, in float32 as transformers computes it."""

    def __init__(self, gain: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.gain, self._epsilon = gain, epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, size) to the same."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._epsilon)
        return (self.gain * wide).to(hidden.dtype)


class Projection(nn.Module):
    """A frozen weight, with its slot if it has one: y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ, with DoRA times m / ‖W + s·B·A‖."""

    def __init__(
        self,
        source: Source,
        weights: FrozenWeights,
        lora: Lora,
        name: str,
        slot: Slot | None,
        norms: RowNorms,
    ) -> None:
        super().__init__()
        self.weight = source.frozen(weights, f"{name}.weight")
        self._slot, self._scaling = slot, lora.scaling_of(name.rpartition(".")[2])
        self.a = None if slot is None else source.trained(slot.a)
        self.b = None if slot is None else source.trained(slot.b)
        self.magnitude: nn.Parameter | None = None
        self.row_norms: Tensor
        if slot is not None and lora.dora:
            self.magnitude = source.trained(slot.magnitude)
            self.register_buffer("row_norms", torch.from_numpy(norms[slot.name].copy()).to(source.device))

    def named(self) -> dict[str, nn.Parameter]:
        """The trained parameters by the names of `Lora.shapes`."""
        if self._slot is None or self.a is None or self.b is None:
            return {}
        named = {self._slot.a: self.a, self._slot.b: self.b}
        return named if self.magnitude is None else named | {self._slot.magnitude: self.magnitude}

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        y = functional.linear(x, self.weight)
        if self.a is None or self.b is None:
            return y
        y = y + self._scaling * functional.linear(functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return y if self.magnitude is None else y * (self.magnitude / self._norms()).to(y.dtype)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """‖W + s·B·A‖ (out,) by rows, which counts as a constant (`edgetune.model.gains` has the formula)."""
        assert self.a is not None and self.b is not None
        projected = functional.linear(self.a.to(self.weight.dtype), self.weight).float()
        change = 2 * self._scaling * projected.T + self._scaling**2 * (self.b @ (self.a @ self.a.T))
        square = self.row_norms.square() + (self.b * change).sum(1)
        return square.clamp_min(SMALLEST_SQUARE).sqrt()


def _heads(fused: Tensor, sizes: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, heads, T, head_dim) of what `qkv_proj` gives (B, T, …)."""
    counts = (sizes.num_attention_heads, sizes.num_key_value_heads, sizes.num_key_value_heads)
    parts = torch.split(fused, [count * sizes.head_dim for count in counts], dim=-1)
    query, key, value = (torch.unflatten(part, -1, (-1, sizes.head_dim)).transpose(1, 2) for part in parts)
    return query, key, value


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads with their first dimensions rotated, as many as the tables have."""
    turned, rest = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-high, low), dim=-1) * sin, rest), dim=-1)


def _epsilon(bundle: Bundle) -> float:
    """What the norms add to the mean square."""
    return float(read_object(bundle.path / CONFIG, _COPY_AGAIN)["rms_norm_eps"])
