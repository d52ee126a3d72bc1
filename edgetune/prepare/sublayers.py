"""The two sublayers of a decoder layer, attention and feed-forward network ("mlp"), exported one by one.

A sublayer computes output = hidden + f(norm(hidden)). All layers share its graphs: the weights are inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgetune.config import PrepareConfig
from edgetune.prepare.skeleton import (
    EXAMPLE_BATCH,
    EXAMPLE_SEQUENCE,
    ROWS,
    Argument,
    Axes,
    Parameters,
    export_module,
    rotary_arguments,
    skeleton,
    take_parameters,
)

ANCHOR = "anchor"
"""A zero (hidden_size,) that is added to `hidden`: ONNX Runtime Training differentiates parameters only, and passes the
gradient of `hidden` on its way to this one."""


@dataclass(frozen=True)
class Sublayer:
    """One of the two."""

    name: str
    norm: str
    module: str
    kept: dict[str, Axes]
    """Forward results, with their symbolic dimensions, that the backward pass can take instead of recomputing them."""


SUBLAYERS = (
    Sublayer("attention", "input_layernorm", "self_attn", {"qkv": ROWS, "context": {0: "batch", 2: "sequence"}}),
    Sublayer("mlp", "post_attention_layernorm", "mlp", {"gate_up": ROWS}),
)


def export_sublayer(checkpoint: Path, output: Path, config: PrepareConfig, sublayer: Sublayer) -> list[str]:
    """Export one sublayer.

    Inputs: `hidden` (batch, sequence, hidden_size), the anchor, for attention `attn_bias`, `rope_cos` and `rope_sin`,
    then the layer's parameters under their names in the checkpoint, without `model.layers.N.`. Outputs: `objective`
    (1), the sum of `output`; `output`, shaped as `hidden`; `qkv` and `gate_up` (batch, sequence, out_features);
    `context` (batch, heads, sequence, head_dim).

    Args:
        checkpoint: Folder with a Phi-3 `config.json`; no weight is read.
        output: The ONNX file to write.
        config: Rank, alpha and targets of the slots.
        sublayer: Which one.

    Returns:
        The LoRA parameters among the inputs.
    """
    model = skeleton(checkpoint, config, layers=1)
    layer = model.get_submodule("model.layers.0")
    parameters = take_parameters(layer, (f"{sublayer.norm}.", f"{sublayer.module}."))
    size = model.config.hidden_size
    rows = torch.ones(EXAMPLE_BATCH, EXAMPLE_SEQUENCE, size)
    arguments = {"hidden": Argument(ROWS, rows), ANCHOR: Argument({}, torch.zeros(size))}
    module: _Forward
    if sublayer.module == "self_attn":
        module = _AttentionForward(model.config, layer, parameters)
        arguments |= rotary_arguments(model.config)
    else:
        module = _MlpForward(model.config, layer, parameters)
    outputs: dict[str, Axes] = {"objective": {}, "output": ROWS, **sublayer.kept}
    export_module(module, parameters, arguments, outputs, output)
    return [name for name in parameters.names if ".lora_" in name]


class _Forward(torch.nn.Module):
    """What both have in common."""

    def __init__(self, config: Any, layer: Any, parameters: Parameters) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.parameters_taken = parameters
        self.projected: torch.Tensor
        first = layer.self_attn.qkv_proj if isinstance(self, _AttentionForward) else layer.mlp.gate_up_proj
        first.register_forward_hook(self._remember)

    def _remember(self, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        self.projected = output

    def results(self, output: torch.Tensor, **kept: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"objective": output.sum().reshape(1), "output": output, **kept}


class _AttentionForward(_Forward):
    def forward(
        self,
        hidden: torch.Tensor,
        anchor: torch.Tensor,
        attn_bias: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        weights: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        self.parameters_taken.put(weights)
        anchored = hidden + anchor
        mixed, _ = self.layer.self_attn(
            self.layer.input_layernorm(anchored), position_embeddings=(rope_cos, rope_sin), attention_mask=attn_bias
        )
        return self.results(anchored + mixed, qkv=self.projected, context=self.layer.self_attn.context)


class _MlpForward(_Forward):
    def forward(
        self, hidden: torch.Tensor, anchor: torch.Tensor, weights: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        self.parameters_taken.put(weights)
        anchored = hidden + anchor
        output = anchored + self.layer.mlp(self.layer.post_attention_layernorm(anchored))
        return self.results(output, gate_up=self.projected)
