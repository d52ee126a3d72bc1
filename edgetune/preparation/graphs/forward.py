"""The forward graph: a whole Phi-3 model with LoRA slots, from token ids to the loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.config import PrepareConfig
from edgetune.model.lora import Lora, Slot
from edgetune.preparation.graphs.skeleton import (
    EXAMPLE_BATCH,
    EXAMPLE_SEQUENCE,
    ROWS,
    Argument,
    export_module,
    rotary_arguments,
    skeleton,
    take_parameters,
)
from edgetune.preparation.slots import lora_of

if TYPE_CHECKING:
    import torch


def export_forward(checkpoint: Path, output: Path, config: PrepareConfig) -> Lora:
    """Export loss and logits of the checkpoint's architecture with LoRA slots.

    Inputs: `input_ids`, `labels` (batch, sequence), `attn_bias` (batch, 1, sequence, sequence), `rope_cos`, `rope_sin`
    (batch, sequence, rotated), `loss_scale` (1), then every parameter under its name in the checkpoint, and with DoRA
    each slot's gain in the place of its magnitudes. Outputs:
    `objective` = loss · loss_scale, `loss` (1), `logits` (batch, sequence, vocabulary).

    Args:
        checkpoint: Folder with a Phi-3 `config.json`; no weight is read.
        output: The ONNX file to write.
        config: Rank, alpha and targets of the slots.

    Returns:
        The slots, in the order of the layers.
    """
    import torch
    from peft.tuners.lora import Linear

    model = skeleton(checkpoint, config)
    slots = [
        Slot(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, Linear)
    ]
    rotary: dict[str, Argument] = rotary_arguments(model.config)
    tokens = torch.ones(EXAMPLE_BATCH, EXAMPLE_SEQUENCE, dtype=torch.int64)
    arguments = {
        "input_ids": Argument(ROWS, tokens),
        "labels": Argument(ROWS, tokens.clone()),
        **rotary,
        "loss_scale": Argument({}, torch.ones(1)),
    }
    forward = _training_forward(model)
    export_module(forward, forward.parameters_taken, arguments, {"objective": {}, "loss": {}, "logits": ROWS}, output)
    return lora_of(config, slots)


def _training_forward(model: torch.nn.Module) -> Any:
    """Wrap the model so that its parameters, mask and rotary tables come in as arguments."""
    import torch

    class GivenTables(torch.nn.Module):
        """Stands in for the rotary embedding: the tables are inputs."""

        tables: tuple[torch.Tensor, torch.Tensor]

        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.tables

    rotary = GivenTables()
    model.get_submodule("model").rotary_emb = rotary

    class TrainingForward(torch.nn.Module):
        config: Any = model.config
        parameters_taken = take_parameters(model)

        def forward(
            self,
            input_ids: torch.Tensor,
            labels: torch.Tensor,
            attn_bias: torch.Tensor,
            rope_cos: torch.Tensor,
            rope_sin: torch.Tensor,
            loss_scale: torch.Tensor,
            weights: list[torch.Tensor],
        ) -> dict[str, torch.Tensor]:
            self.parameters_taken.put(weights)
            rotary.tables = (rope_cos, rope_sin)
            positions = torch.zeros(1, 1, dtype=torch.int64)
            logits = model(
                input_ids=input_ids, attention_mask=attn_bias, position_ids=positions, use_cache=False
            ).logits
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100
            ).reshape(1)
            return {"objective": loss * loss_scale, "loss": loss, "logits": logits}

    return TrainingForward()
