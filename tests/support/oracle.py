"""The independent oracle: the same model, adapter and rows in PyTorch + PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Phi3ForCausalLM

from edgetune.data.encode import Example
from edgetune.formats.bundle import Bundle
from edgetune.model.lora import MAGNITUDE
from support.tiny_phi3 import weights

Array = NDArray[np.float32]


def cosine(a: Array, b: Array) -> float:
    """Of the angle between two arrays of one shape."""
    return float(np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def relative(found: Array, expected: Array) -> float:
    """The distance of two arrays of one shape, as a share of the length of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def peft_model(checkpoint: Path, bundle: Bundle, parameters: dict[str, Array]) -> PeftModel:
    """The checkpoint with the bundle's frozen weights and LoRA parameters, in float32 on the CPU."""
    model = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    if bundle.manifest.base.weights != "fp32":
        load_stored(model, bundle.path)
    lora = bundle.manifest.lora
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
        use_rslora=lora.rank_stabilised,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        use_dora=lora.dora,
    )
    peft = get_peft_model(model, config).eval()
    for name, parameter in trainable(peft).items():
        parameter.data = torch.from_numpy(np.array(parameters[name]))
    return peft


def trainable(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """LoRA parameters under the names of the bundle."""
    return {
        name.removeprefix("base_model.model.").replace(f"{MAGNITUDE}.default.weight", MAGNITUDE).replace(
            ".default.", "."
        ): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def load_stored(model: Any, genai_model: Path) -> None:
    """Replace every linear layer by what the GenAI model's stored weights stand for."""
    stored = {name: torch.from_numpy(value.copy()) for name, value in weights(genai_model).items()}
    # A tied head is quantised apart from the embedding.
    model.lm_head.weight = torch.nn.Parameter(stored["lm_head"])
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}"
        layer.self_attn.qkv_proj.weight.data = stored[f"{prefix}.attn.qkv_proj"]
        layer.self_attn.o_proj.weight.data = stored[f"{prefix}.attn.o_proj"]
        halves = [stored[f"{prefix}.mlp.{half}_proj"] for half in ("gate", "up")]
        layer.mlp.gate_up_proj.weight.data = torch.cat(halves)
        layer.mlp.down_proj.weight.data = stored[f"{prefix}.mlp.down_proj"]


def loss(model: PeftModel, examples: list[Example]) -> torch.Tensor:
    """Mean loss over the trained tokens of rows padded on the right."""
    length = max(len(example.input_ids) for example in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        count = len(example.input_ids)
        ids[row, :count] = torch.tensor(example.input_ids)
        labels[row, :count] = torch.tensor(example.labels)
        mask[row, :count] = 1
    result: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return result
