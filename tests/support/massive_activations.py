"""A tiny Phi-3 with a massive activation, as trained language models have one.

At the first token one channel of the residual stream is enormous from a certain layer on (Sun et al. 2024, "Massive
Activations in Large Language Models"): there 24,890 was found in a real model of 135 million parameters, where the
median is 2. Here the token of the beginning is marked in a channel of its own, which one inner channel of a
feed-forward network reads, squares and writes.
"""

from __future__ import annotations

from pathlib import Path

from edgetune.formats.bundle import Bundle
from support.prepared_bundles import CONFIG, prepare_checkpoint
from support.tiny_phi3 import save_checkpoint

LAYERS = 4
GROWN_AFTER = 0
"""The layer that writes the activation."""
_MARK, _MASSIVE = 5, 40
"""Hidden channels: of the token's mark, and of the activation."""
_INNER = 7
"""The inner channel between them."""
_READ = 30.0
"""What gate and up make of the mark."""


def save_massive(folder: Path, largest: float) -> Path:
    """Write a checkpoint whose residual stream reaches about `largest` at the token `<s>`, and nowhere else."""
    import torch
    from transformers import Phi3ForCausalLM

    save_checkpoint(folder, {"num_hidden_layers": LAYERS})
    model = Phi3ForCausalLM.from_pretrained(folder)
    layer = model.model.layers[GROWN_AFTER]
    gate_up, down = layer.mlp.gate_up_proj.weight.data, layer.mlp.down_proj.weight.data
    inner = down.shape[1]
    model.model.embed_tokens.weight.data[:, _MARK] = 0
    model.model.embed_tokens.weight.data[model.config.bos_token_id, _MARK] = 1
    layer.self_attn.o_proj.weight.data[_MARK] = 0
    gate_up[:, _MARK] = 0
    for row in (_INNER, inner + _INNER):
        gate_up[row] = 0
        gate_up[row, _MARK] = _READ
    down[:, _INNER] = 0
    down[_MASSIVE, _INNER] = 1
    found: list[float] = []
    hook = layer.register_forward_hook(lambda _module, _inputs, output: found.append(output[0, 0, _MASSIVE].item()))
    with torch.no_grad():
        model(input_ids=torch.tensor([[model.config.bos_token_id, 10, 11]]))
    hook.remove()
    down[_MASSIVE, _INNER] = largest / found[0]
    model.save_pretrained(folder)
    return folder


def prepare_massive(folder: Path, largest: float) -> Bundle:
    """The int4 bundle of `save_massive`, in a folder of its own."""
    return prepare_checkpoint(save_massive(folder / "checkpoint", largest), folder / "bundle", CONFIG)
