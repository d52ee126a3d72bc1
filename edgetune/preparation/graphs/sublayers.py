"""The two sublayers of a decoder layer, attention and feed-forward network ("mlp"), exported one by one.

A sublayer computes output = residual + f(norm(hidden)); of several pieces (edgetune.model.pieces) each adds
its own. All layers share the graphs: the weights are inputs. Queries, keys and values, and gate and up, which a packed
projection has together, are computed one by one, so that nothing has to be split or joined; what scales an update
scales the few columns that A gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm, apply_rotary_pos_emb

from edgetune.config import PrepareConfig
from edgetune.model.architecture import Architecture
from edgetune.model.lora import GAIN, Lora
from edgetune.model.pieces import Pieces, Slice, attention_slices, mlp_slices
from edgetune.preparation.graphs.skeleton import (
    EXAMPLE_BATCH,
    EXAMPLE_SEQUENCE,
    ROWS,
    Argument,
    Axes,
    Parameters,
    export_module,
    rotary_arguments,
)
from edgetune.preparation.slots import lora_of

ANCHOR = "anchor"
"""A zero (hidden_size,) that is added to `hidden`: ONNX Runtime Training differentiates parameters only, and passes the
gradient of `hidden` on its way to this one."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sublayer:
    """A sublayer of every decoder layer."""

    name: str
    kept: tuple[str, ...]
    """Forward results that the backward pass can take instead of computing them again."""


def sublayers_of(config: PrepareConfig) -> tuple[Sublayer, Sublayer]:
    """Both sublayers. With DoRA the last projection's result is kept as well, for the gradient of its gain."""
    modules = lora_of(config).target_modules if config.dora else ()
    attention, mlp = (("result",) if module in modules else () for module in ("o_proj", "down_proj"))
    return (
        Sublayer("attention", ("query", "key", "value", "context", *attention)),
        Sublayer("mlp", ("gate", "up", *mlp)),
    )


def export_sublayer(
    checkpoint: Path,
    output: Path,
    architecture: Architecture,
    config: PrepareConfig,
    sublayer: Sublayer,
    pieces: Pieces,
) -> list[str]:
    """Export a piece of one sublayer.

    Inputs: `hidden` and `residual` (batch, sequence, hidden_size), the anchor, for attention `attn_bias`, `rope_cos`
    and `rope_sin`, then the parameters of `edgetune.model.pieces`. Outputs: `objective` (1), the sum of
    `output`; `output`, shaped as `hidden`; what can be kept: `query`, `key`, `value`, `context` (batch, key-value
    heads, query heads of each or 1, sequence, head_dim) after rotation, or `gate`, `up` (batch, sequence, inner
    channels). Of a projection with a gain it is what is multiplied with that, (batch, sequence, rows), and `result` of
    the last one.

    Args:
        checkpoint: Folder with a Phi-3 `config.json`; no weight is read.
        output: The ONNX file to write.
        architecture: Sizes of the model.
        config: Rank, alpha and targets of the slots.
        sublayer: The sublayer to export.
        pieces: How it is cut.

    Returns:
        The LoRA parameters among the inputs.
    """
    model_config = Phi3Config.from_pretrained(checkpoint)
    attention = sublayer.name == "attention"
    cut = attention_slices(architecture, pieces.attention) if attention else mlp_slices(architecture, pieces.mlp)
    lora = lora_of(config)
    found = {name: _shape(slice_, architecture, lora) for name, slice_ in next(cut).items()}
    shapes = {name: shape for name, shape in found.items() if shape is not None}
    parameters = Parameters(tuple(shapes), tuple(shapes.values()), ())
    states = torch.ones(EXAMPLE_BATCH, EXAMPLE_SEQUENCE, architecture.hidden_size)
    arguments = {
        "hidden": Argument(ROWS, states),
        "residual": Argument(ROWS, states),
        ANCHOR: Argument({}, torch.zeros(architecture.hidden_size)),
    }
    kept = dict.fromkeys(sublayer.kept, ROWS)
    module: _Piece
    if attention:
        module = _Attention(model_config, parameters.names, lora, architecture)
        heads = ["context"] if f"q_proj{GAIN}" in shapes else ["query", "key", "value", "context"]
        kept |= {name: {0: "batch", 3: "sequence"} for name in heads}
        arguments |= rotary_arguments(model_config)
    else:
        module = _Mlp(model_config, parameters.names, lora)
    outputs: dict[str, Axes] = {"objective": {}, "output": ROWS, **kept}
    export_module(module, parameters, arguments, outputs, output)
    return [name for name in parameters.names if ".lora_" in name]


def _shape(slice_: Slice, architecture: Architecture, lora: Lora) -> tuple[int, ...] | None:
    """Shape of a slice; None for a LoRA parameter of a projection without a slot."""
    a = architecture
    queries = a.num_attention_heads * a.head_dim
    features = {
        "qkv_proj": (queries + 2 * a.num_key_value_heads * a.head_dim, a.hidden_size),
        "o_proj": (a.hidden_size, queries),
        "gate_up_proj": (2 * a.intermediate_size, a.hidden_size),
        "down_proj": (a.hidden_size, a.intermediate_size),
    }
    if slice_.parameter.endswith("layernorm.weight"):
        return (a.hidden_size,)
    _, module, *kind = slice_.parameter.split(".")
    rows, columns = features[module]
    if kind[0] != "weight" and module not in lora.target_modules:
        return None
    if f".{kind[0]}" == GAIN:
        start, stop = slice_.rows or (0, rows)
        return (stop - start,) if lora.dora else None
    if kind[0] == "lora_A":
        rows = lora.rank_of(module)
    if kind[0] == "lora_B":
        columns = lora.rank_of(module)
    return tuple(stop - start for start, stop in (slice_.rows or (0, rows), slice_.columns or (0, columns)))


class _Piece(torch.nn.Module):
    """What the modules of both sublayers have in common."""

    def __init__(self, config: Phi3Config, names: tuple[str, ...], lora: Lora) -> None:
        super().__init__()
        self.config = config
        self._names = names
        self._lora = lora

    def normal(self, hidden: torch.Tensor, weights: Tensors) -> torch.Tensor:
        norm = Phi3RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        del norm.weight
        norm.weight = weights["norm.weight"]
        result: torch.Tensor = norm(hidden)
        return result

    def named(self, weights: list[torch.Tensor]) -> Tensors:
        return dict(zip(self._names, weights, strict=True))

    def small(self, x: torch.Tensor, slot: str, weights: Tensors) -> torch.Tensor | None:
        """Scaling · x·Aᵀ; None where the projection is not trained."""
        a = weights.get(f"{slot}.lora_A.weight")
        return None if a is None else torch.nn.functional.linear(x, a) * self._lora.scaling_of(slot)

    def project(self, x: torch.Tensor, small: torch.Tensor | None, name: str, weights: Tensors) -> torch.Tensor:
        """x·Wᵀ + small·Bᵀ, without the gain."""
        product = torch.nn.functional.linear(x, weights[f"{name}.weight"])
        if small is None:
            return product
        return product + torch.nn.functional.linear(small, weights[f"{name}.lora_B.weight"])

    def gained(self, product: torch.Tensor, name: str, weights: Tensors) -> torch.Tensor:
        """What `project` gave, multiplied with the projection's gain if it has one."""
        gain = weights.get(f"{name}{GAIN}")
        return product if gain is None else product * gain


class _Attention(_Piece):
    def __init__(self, config: Phi3Config, names: tuple[str, ...], lora: Lora, architecture: Architecture) -> None:
        super().__init__(config, names, lora)
        self._head_dim = architecture.head_dim
        self._groups = architecture.num_attention_heads // architecture.num_key_value_heads

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        anchor: torch.Tensor,
        attn_bias: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        weights: list[torch.Tensor],
    ) -> Tensors:
        named = self.named(weights)
        x = self.normal(hidden + anchor, named)
        small = self.small(x, "qkv_proj", named)
        products = {name: self.project(x, small, f"{name}_proj", named) for name in ("q", "k", "v")}
        query, key, value = (
            self._heads(self.gained(products[name], f"{name}_proj", named), groups)
            for name, groups in (("q", self._groups), ("k", 1), ("v", 1))
        )
        query, key = apply_rotary_pos_emb(query, key, rope_cos.unsqueeze(1), rope_sin.unsqueeze(1))
        query = query * self._head_dim**-0.5
        keys, values = (torch.cat([states] * self._groups, dim=2) for states in (key, value))
        scores = query @ keys.transpose(3, 4) + attn_bias.unsqueeze(1)
        context = torch.softmax(scores, dim=-1) @ values
        joined = context.permute(0, 3, 1, 2, 4).reshape(*hidden.shape[:2], -1)
        result = self.project(joined, self.small(joined, "o_proj", named), "o_proj", named)
        output = residual + self.gained(result, "o_proj", named)
        kept = {"query": query, "key": key, "value": value, "context": context}
        if f"q_proj{GAIN}" in named:
            kept |= {"query": products["q"], "key": products["k"], "value": products["v"]}
        if f"o_proj{GAIN}" in named:
            kept["result"] = result
        return {"objective": output.sum().reshape(1), "output": output, **kept}

    def _heads(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """(batch, key-value heads, groups, sequence, head_dim)."""
        heads = x.shape[2] // self._head_dim // groups
        return x.view(*x.shape[:2], heads, groups, self._head_dim).permute(0, 2, 3, 1, 4)


class _Mlp(_Piece):
    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor, anchor: torch.Tensor, weights: list[torch.Tensor]
    ) -> Tensors:
        named = self.named(weights)
        x = self.normal(hidden + anchor, named)
        small = self.small(x, "gate_up_proj", named)
        gate, up = (self.project(x, small, f"{name}_proj", named) for name in ("gate", "up"))
        inner = torch.nn.functional.silu(self.gained(gate, "gate_proj", named)) * self.gained(up, "up_proj", named)
        result = self.project(inner, self.small(inner, "down_proj", named), "down_proj", named)
        output = residual + self.gained(result, "down_proj", named)
        kept = {"gate": gate, "up": up} | ({"result": result} if f"down_proj{GAIN}" in named else {})
        return {"objective": output.sum().reshape(1), "output": output, **kept}
